"""metrics.jsonl survives kills, full disks and NaN; the terminal's stdout stays the user's."""

import json
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hebasr_jax.errors import UserError
from hebasr_jax.tracking import (
    MetricsLog,
    describe,
    put_aside,
    read_metrics,
    training_display,
)

ROOT = Path(__file__).parents[1]


def train(step: int, **more: object) -> dict[str, object]:
    return {"kind": "train", "step": step, "loss": 1 / (step + 1), **more}


def validation(step: int) -> dict[str, object]:
    return {"kind": "validation", "step": step, "sets": {"d": {"wer": 0.5, "loss": step}}}


def without_time(path: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k != "time_s"} for line in read_metrics(path)]


STEPS = [line for k in range(9) for line in ([train(k)] if k % 4 else [train(k), validation(k)])]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8), st.integers(0, 8), st.binary(max_size=30), st.booleans())
def test_killed_and_resumed_holds_the_lines_of_the_uninterrupted(
    tmp_path_factory, saved, killed, torn, newline
) -> None:
    saved, killed = sorted((saved, killed))
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    first = MetricsLog(path, None)
    for line in STEPS:
        if line["step"] <= killed:
            first.append(line)
    with path.open("ab") as file:
        file.write(b'{"step": 1, "kind": "tr' + torn.replace(b"\n", b"") + b"\n" * newline)
    second = MetricsLog(path, saved)
    assert [line for line in STEPS if line["step"] <= saved] == without_time(path)
    for line in STEPS:
        if line["step"] > saved:
            second.append(line)
    assert without_time(path) == STEPS
    assert all(json.loads(line)["time_s"] > 1.6e9 for line in path.read_text().splitlines())
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_every_cut_of_the_last_line_is_read_up_to_it(tmp_path, capsys) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, None)
    for line in STEPS[:3]:
        log.append(line)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = sum(size >= end - 1 for end in ends)
        assert without_time(path) == STEPS[:complete]
    assert capsys.readouterr().err == ""


def test_a_damaged_line_within_is_named(tmp_path, capsys) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n\0\0\0\n[]\n{"step": 2, "kind": "train"}\n')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    warnings = capsys.readouterr().err
    assert "line 2 is damaged" in warnings
    assert "line 3 is damaged" in warnings


def test_beginning_anew_drops_all_and_no_file_is_no_lines(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    MetricsLog(path, 5).append(train(0))
    assert len(read_metrics(path)) == 1
    MetricsLog(path, None)
    assert read_metrics(path) == []


def test_a_line_is_on_file_once_append_returns(tmp_path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", None)
    for count in range(1, 4):
        log.append(train(count))
        assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == count


def strict(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@pytest.mark.parametrize("number", [float, np.float32, jnp.float32, np.array, jnp.bfloat16])
def test_numbers_that_are_not_finite_are_null_and_named(tmp_path, number) -> None:
    log = MetricsLog(tmp_path / "m", None)
    log.append(train(3, grad_norm=number(2.0), rates={"a": number(np.inf)}, tflops=number(np.nan)))
    log.append(train(4, sets={"x": {"ci95": (0.5, -np.inf)}}, skipped=np.int64(2)))
    text = (tmp_path / "m").read_text()
    one, two = (json.loads(line, parse_constant=strict) for line in text.splitlines())
    assert (one["grad_norm"], one["rates"], one["tflops"]) == (2.0, {"a": None}, None)
    assert one["nonfinite"] == {"rates/a": "inf", "tflops": "nan"}
    assert (two["sets"], two["skipped"]) == ({"x": {"ci95": [0.5, None]}}, 2)
    assert two["nonfinite"] == {"sets/x/ci95/1": "-inf"}


@settings(max_examples=60, deadline=None)
@given(st.text(), st.text(st.sampled_from('\udc80\udfff\u2028\u2029\0\x1f\x85\r\n\\"')))
def test_any_text_comes_back_on_one_line(tmp_path_factory, text, odd) -> None:
    path = tmp_path_factory.mktemp("run") / "m"
    MetricsLog(path, None).append({"kind": "sample", "step": 1, "texts": [text, odd]})
    assert path.read_bytes().count(b"\n") == 1
    assert json.loads(path.read_text())["texts"] == [text, odd]


def test_hebrew_is_written_as_hebrew(tmp_path) -> None:
    MetricsLog(tmp_path / "m", None).append({"kind": "sample", "step": 1, "text": "שלום"})
    assert "שלום" in (tmp_path / "m").read_text(encoding="utf-8")


def test_a_full_disk_is_one_warning_and_no_line_is_lost(tmp_path, capsys) -> None:
    """The limit on file size cuts a line in two, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, None)
    log.append(STEPS[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        for line in STEPS[1:5]:
            log.append(line)
        size = path.stat().st_size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("warning") == 1
    assert not path.read_bytes().endswith(b"\n")
    assert size > len(path.read_bytes().splitlines()[0])
    assert without_time(path) == STEPS[:1]
    for line in STEPS[5:]:
        log.append(line)
    assert without_time(path) == STEPS
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_taken_up_is_refused_and_left_whole(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, None)
    for line in STEPS:
        log.append(line)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            MetricsLog(path, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert without_time(path) == STEPS
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


# --- the terminal --------------------------------------------------------------------------

FULL = train(
    20,
    grad_norm=1.234,
    audio_s_per_s=2450.4,
    tflops=505.2,
    padding_audio=0.081,
    data_wait_share=0.004,
    memory_bytes=61 * 2**30,
    skipped=2,
)


def test_a_train_line_tells_what_is_known() -> None:
    assert describe(FULL).split("  ") == [
        "loss 0.0476",
        "gradient 1.23",
        "audio 2,450 s/s",
        "useful 505 TFLOP/s",
        "padding 8.1%",
        "data wait 0.4%",
        "memory 61 GiB",
        "skipped 2",
    ]
    assert (
        describe({"kind": "train", "step": 1, "loss": float("nan"), "tflops": None}) == "loss nan"
    )


def test_a_validation_line_tells_each_set() -> None:
    known = {"wer": 0.1234, "ci95": (0.11, 0.1355), "cer": 0.05, "loss": 1.5}
    empty = {"wer": float("nan"), "ci95": (float("nan"),) * 2, "cer": float("nan")}
    told = describe({"kind": "validation", "step": 1, "sets": {"d1": known, "x": empty}})
    assert (
        told == "d1: WER 12.3 % [11.0, 13.6] CER 5.0 % loss 1.5000  x: WER undefined CER undefined"
    )


def test_plain_lines_go_to_stderr(capsys, monkeypatch) -> None:
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with training_display(100) as show:
        show(train(10))
        show({"step": 11})
        show(train(20))
    out, err = capsys.readouterr()
    assert out == ""
    one, two = err.splitlines()
    assert one == "step 10/100  10%  loss 0.0909"
    assert two == "step 20/100  20%  left 0:04:00  loss 0.0476"


_SHOW = """
import sys
from hebasr_jax.tracking import training_display
with training_display(1000) as show:
    show({"step": 0})
    show({"kind": "train", "step": 500, "loss": 0.25})
    show({"kind": "validation", "step": 500, "sets": {"d[red]1": {"wer": 0.5}}})
    print("a result")
    print("a remark", file=sys.stderr)
    show({"step": 999})
"""


def test_a_panel_on_a_terminal_and_results_in_their_file(tmp_path) -> None:
    master, terminal = pty.openpty()
    with (tmp_path / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _SHOW], stdout=out, stderr=terminal, cwd=ROOT
        )
    os.close(terminal)
    shown = b""
    while part := _read(master):
        shown += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "out.txt").read_text() == "a result\n"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    last = text[text.rindex("step ") :]
    assert last.startswith("step 999/1,000  99%  left 0:00:00")
    assert "━" in last
    assert "loss 0.2500" in last
    assert "d[red]1: WER 50.0 %" in last
    assert "a remark" in text


def _read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:
        return b""


def test_a_record_that_was_put_aside_by_half_is_put_aside_by_the_next_start(tmp_path) -> None:
    """Killed between the two files, figures of before stood in the new run's ranking."""
    log = MetricsLog(tmp_path / "metrics.jsonl", None)
    log.append(train(1))
    (tmp_path / "best.json").write_text("{}")

    def killed(line: str) -> None:
        if "the old record" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put_aside(tmp_path, killed)
    put_aside(tmp_path, lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl.1", "best.json.1"}

"""A whole run, its averaging and export included, hit at random moments or by a full disk."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tone_runs import (
    arrays,
    checkpoints,
    end,
    losses,
    make_workspace,
    read_rows,
    same_bits,
    settings,
    start,
    train,
    validations,
    write_rows,
)

from hebasr_jax.cli import main
from hebasr_jax.run_folder import EXIT_RUN_AGAIN

STAGES = """
        stages=(
            Stage("top", steps=5, embedding=group, decoder=Group(2e-3, trained_layers=1),
                  conv_stem=Group(0.0), encoder=Group(0.0), projector=group),
            Stage("all", steps=5, embedding=group, decoder=group,
                  conv_stem=Group(0.0), encoder=Group(0.0), projector=group),
        ),
        average=Average(best=2),
        export=Export(layouts=("original",)),
        train=Train(checkpoint_steps=3, keep_last=2, keep_best=2, log_steps=2),
        validation=Validation(every_steps=4, bootstrap=20, batch_audio_s=8.0),
    )
"""
DONE = "exported "
REPORT = "report: "


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """A workspace with a config of two stages, a mean and an export, and its whole run."""
    folder = make_workspace(tmp_path_factory.getbasetemp(), "moments")
    config = (folder / "config.py").read_text().replace("buckets=2", "buckets=1")
    config = config.replace(
        "dev=(", 'test=(Source("held", "corpus/dev.jsonl"),),\n            dev=('
    )
    config = config.replace("(0.9, 1.0, 1.1)", "(1.0,)").replace("_masks=1", "_masks=0")
    (folder / "config.py").write_text(config[: config.index("        stages=")] + STAGES)
    dev = folder / "corpus" / "dev.jsonl"
    write_rows(dev, read_rows(dev)[:6])
    told = train(folder)
    assert DONE in told
    return folder


@pytest.fixture(scope="module")
def whole(space) -> Path:
    return space / "runs" / "whole"


def assert_same_run(run: Path, whole: Path) -> None:
    """All that a run tells and leaves, but for times, is the same to the bit."""
    assert losses(run) == losses(whole)
    assert validations(run) == validations(whole)
    assert checkpoints(run)[-1] == checkpoints(whole)[-1] == 10
    assert same_bits(arrays(run, 10), arrays(whole, 10))
    assert (run / "final.json").read_text() == (whole / "final.json").read_text()
    assert same_model(run, whole)
    assert not list(run.rglob("*partial*"))


def same_model(run: Path, whole: Path) -> bool:
    """Whether the same weights were chosen and written, to the bit."""
    keys = [json.loads((folder / "final.json").read_text())["key"] for folder in (run, whole)]
    files = [folder / "export" / "original" / "model.safetensors" for folder in (run, whole)]
    return keys[0] == keys[1] and files[0].read_bytes() == files[1].read_bytes()


# --- signals ---------------------------------------------------------------------------------

MOMENTS = {  # what the run says just before a moment of that kind
    "first compile": "attention:",
    "step": "stage top:",
    "between stages": "stage all:",
    "validation or save": "step 8/10",
    "averaging": "on the whole dev sets:",
    "export": "average of steps",
}


def hit(space: Path, name: str, cue: str, delay_s: float, number: signal.Signals) -> str:
    """Sends a signal some time after the run says `cue`; how it ended. Then all that it said."""
    programs = ["compute.cache_dir=afresh"] if cue == MOMENTS["first compile"] else []
    child, said = start(space, *settings(f"name={name}", *programs)), []
    for line in child.stderr:
        said.append(line)
        if line.startswith(cue):
            time.sleep(delay_s)
            child.send_signal(number)
            break
    said.append(child.communicate(timeout=300)[1])
    expected = (-number,) if number == signal.SIGKILL else (EXIT_RUN_AGAIN,)
    told = "".join(said)
    ended = child.returncode == 0 and REPORT in told  # it was quicker
    assert ended or child.returncode in expected, (cue, number, child.returncode, told)
    return "" if ended else told


def test_hit_at_random_moments_it_ends_as_the_whole_run(space, whole) -> None:
    """First by two signals, of which the second comes while it saves."""
    draw, run = random.Random(11), space / "runs" / "parts"
    asking = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    seal = {"call": "hebasr_jax.checkpoint.seal", "at": 2, "signal": ["SIGTERM", "SIGTERM"]}
    told = train(space, *settings("name=parts"), code=128 + signal.SIGTERM, meddle=seal)
    assert "SIGTERM again: left at once" in told
    assert checkpoints(run) == [3]
    hits = 1
    for moment, cue in MOMENTS.items():
        killed = moment in ("validation or save", "export")
        number = signal.SIGKILL if killed else draw.choice(asking)
        told = hit(space, "parts", cue, draw.uniform(0, 0.4), number)
        hits += bool(told)
        if moment == "first compile":
            assert "nothing to save yet" in told  # nothing new: step 3 is there
            assert checkpoints(run) == [3]
    assert hits >= 4
    train(space, *settings("name=parts"))
    assert_same_run(run, whole)


def test_a_signal_during_the_imports_has_nothing_to_save(space) -> None:
    words = ["-X", "importtime", "-m", "hebasr_jax", "train", "--config", "config.py"]
    child = subprocess.Popen(
        [sys.executable, *words, *settings("name=early")],
        cwd=space,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    next(line for line in child.stderr if line.split("|")[-1].strip() == "numpy")
    child.send_signal(signal.SIGTERM)
    assert "SIGTERM: nothing to save yet" in end(child, EXIT_RUN_AGAIN)
    assert not (space / "runs" / "early").exists()


LATE = """
import os, signal, time
from hebasr_jax.run_folder import StopSignal
with StopSignal() as stop:
    stop.worth_saving = True
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.requested:
        time.sleep(0.01)
    stop.leave_at_once("what is done is kept")
    print("went on")
"""


def test_a_signal_that_came_after_the_last_step_was_asked_about_still_counts() -> None:
    """As in the last batch of the last validation: averaging and export may take an hour."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", LATE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_RUN_AGAIN
    assert done.stdout == ""
    assert "what is done is kept" in done.stderr


# --- full disks ------------------------------------------------------------------------------

FULL = Path("/dev/full")  # the kernel's disk without space


@pytest.fixture(scope="module")
def halls(space, tmp_path_factory) -> Path:
    """A copy of the workspace, for runs that are there already."""
    return Path(shutil.copytree(space, tmp_path_factory.mktemp("disk") / "space"))


def again(capsys, code: int) -> str:
    """What the same command says in this process, as it ends with `code`."""
    assert main(["train", "--config", "config.py"]) == code
    told = capsys.readouterr().err
    if code:
        assert len(told.split("error: ")[1].splitlines()) <= 3, told
        assert "fault of hebasr" not in told
    return told


WRITTEN = (
    "plan.json",
    "env.json",
    "eval/candidates",
    "eval/test/held/hypotheses.jsonl",
    "final.json",
)


@pytest.mark.parametrize("what", WRITTEN)
def test_a_full_disk_under_a_file_is_told_and_the_run_goes_on_later(
    halls, whole, capsys, monkeypatch, what
) -> None:
    monkeypatch.chdir(halls)
    run = Path("runs/whole")
    path = run / what
    if path.is_dir():
        path = sorted(path.iterdir())[0]
        path.unlink()  # else it is not written again
    path.with_name("results.json").unlink(missing_ok=True)  # of a test set, likewise
    before = path.read_bytes() if path.exists() else None
    path.with_name(f".{path.name}.partial").symlink_to(FULL)
    told = again(capsys, 1)
    assert f"error: {path} cannot be written" in told
    assert "No space left on device" in told
    assert (path.read_bytes() if path.exists() else None) == before
    assert not list(run.rglob("*partial*"))
    assert REPORT in again(capsys, 0)
    assert path.exists()
    assert same_model(run, whole)


def test_a_full_disk_under_an_export_leaves_none(halls, whole, capsys, monkeypatch) -> None:
    monkeypatch.chdir(halls)
    run = Path("runs/whole")
    size = (run / "export" / "original" / "model.safetensors").stat().st_size
    shutil.rmtree(run / "export")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        told = again(capsys, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "error: runs/whole/export/original" in told
    assert not list((run / "export").iterdir())
    assert DONE in again(capsys, 0)
    assert same_model(run, whole)


def test_a_full_disk_under_the_report_is_told_and_no_more(halls, capsys, monkeypatch) -> None:
    monkeypatch.chdir(halls)
    Path(f"runs/whole/.report-{os.getpid()}.partial").symlink_to(FULL)
    assert "no report: runs/whole/report.html cannot be written" in again(capsys, 0)
    assert not list(Path("runs").rglob("*partial*"))

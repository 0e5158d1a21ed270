"""Two processes of one device each train as one process of two devices does, and stop together.

Of the fifth batch one clip makes the loss NaN: with two hosts only the second one reads it.
"""

import re
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tone_runs import (
    arrays,
    checkpoints,
    end,
    losses,
    make_workspace,
    settings,
    start,
    train,
    validations,
)

from hebasr_jax.tracking import read_metrics

CHANGES = (
    "data.buckets=1",
    "train.steps=10",
    "train.checkpoint_steps=4",
    "validation.every_steps=5",
    "train.log_steps=1",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def meddle(rows: str, *, mark: bool = True, at: int | None = None) -> dict:
    """For tests/meddled.py: rows go to a file, batch 4 is poisoned, a signal stops step `at`."""
    stop = {"call": "hebasr_jax.train.one_step", "at": at, "signal": "SIGTERM"} if at else {}
    return {"rows": rows, "poison": [0, 4], "mark": mark} | stop


def on_two_hosts(space: Path, *changes: str, code: int, at: int) -> list[str]:
    """What each host said; both must end with `code`. Rows that they read go to rows-0, rows-1.

    Args:
      at: the second host gets a signal at its step of this number.
    """
    port, hosts = free_port(), []
    for number in (0, 1):
        words = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(number))
        done = meddle(f"rows-{number}", mark=number == 1, at=at if number else None)
        hosts.append(start(space, *settings(*CHANGES, *changes), *words, meddle=done))
    try:
        return [end(host, code) for host in hosts]
    finally:
        for host in hosts:
            host.kill()


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> SimpleNamespace:
    """Runs `one`, of one host with two devices, and `two`, of one host, then two, then one.

    first, second: what the two hosts said. began, stopped: the steps that they went on from and
    stopped at. again: what the one host said that took the run over.
    """
    space = make_workspace(tmp_path_factory.getbasetemp(), "hosts")
    words = settings(*CHANGES, "name=two")
    train(space, *settings(*CHANGES, "name=one"), devices=2, meddle=meddle("rows"))
    train(space, *words, code=75, devices=2, meddle=meddle("rows-before", at=2))
    began = checkpoints(space / "runs" / "two")[-1]
    first, second = on_two_hosts(space, "name=two", code=75, at=3)
    stopped = checkpoints(space / "runs" / "two")[-1]
    again = train(space, *words, devices=2, meddle=meddle("rows-after"))
    return SimpleNamespace(
        one=space / "runs" / "one",
        two=space / "runs" / "two",
        first=first,
        second=second,
        began=began,
        stopped=stopped,
        again=again,
        space=space,
    )


def test_a_signal_to_one_host_stops_both_with_a_checkpoint(told) -> None:
    assert 2 <= told.began <= 4
    assert told.began + 3 <= told.stopped <= told.began + 5
    assert f"going on from step {told.began}" in told.first
    assert "SIGTERM" in told.second
    assert "SIGTERM" not in told.first
    assert f"going on from step {told.stopped}" in told.again


def test_what_the_first_host_refuses_is_told_by_both_at_once(told) -> None:
    """The other one waited five minutes for it, with the GPUs of both, or blamed hebasr."""
    hosts, port = [], free_port()
    began = time.monotonic()
    for number in (0, 1):
        words = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(number))
        other = settings(*CHANGES, "name=two", "seed=5")
        hosts.append(start(told.space, *other, *words))
    first = end(hosts[0], 1)
    try:
        second = end(hosts[1], 1)
    finally:
        hosts[1].kill()
    for told_by_one in (first, second):
        assert "was trained with other settings" in told_by_one
        assert "Shutdown barrier" not in told_by_one
    assert time.monotonic() - began < 150


def test_an_error_of_the_second_host_alone_ends_both(told) -> None:
    hosts, port = [], free_port()
    began = time.monotonic()
    for number in (0, 1):
        words = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(number))
        other = settings(*CHANGES, "name=other", *(["model.path=absent"] if number else []))
        hosts.append(start(told.space, *other, *words))
    assert "absent" in end(hosts[1], 1)
    try:
        hosts[0].communicate(timeout=120)
    finally:
        hosts[0].kill()
    assert hosts[0].returncode != 0
    assert time.monotonic() - began < 150


@pytest.mark.parametrize("setting", ["train.log_steps", "name"])
def test_processes_with_other_settings_are_no_run(told, setting) -> None:
    """Each would train on batches of its own, or wait for the other for ever."""
    hosts, port = [], free_port()
    for number in (0, 1):
        words = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(number))
        other = settings(*CHANGES, "name=unlike", f"{setting}={number + 1}")
        hosts.append(start(told.space, *other, *words))
    for host in reversed(hosts):
        said = end(host, 1)
        assert "processes 0 and 1 of the run are not of one mind" in said
        assert re.search(f'{setting}: "?1"? -> "?2', said)


def test_only_the_first_host_speaks(told) -> None:
    assert "compiled 8 x" in told.first
    assert [line for line in told.second.splitlines() if line] == [
        "SIGTERM: saving after this step; again to leave at once"
    ]


def test_losses_weights_and_wer_are_those_of_one_host(told) -> None:
    assert len(losses(told.one)) == 10
    ours, theirs = (np.array(losses(run), float) for run in (told.two, told.one))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert np.flatnonzero(np.isnan(ours)) == [4]
    for ours, theirs in zip(validations(told.two), validations(told.one), strict=True):
        mine, other = ours["sets"]["held"], theirs["sets"]["held"]
        assert ours["step"] == theirs["step"]
        assert ours["scored_on"] == theirs["scored_on"]
        assert mine.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-5)
        assert mine == other
    ours, theirs = arrays(told.two, 10), arrays(told.one, 10)
    for name, leaf in ours.items():
        if name.startswith("trained") and not name.endswith("key/bias"):  # its gradient is noise
            assert np.linalg.norm(leaf - theirs[name]) <= 1e-4 * np.linalg.norm(leaf), name


def test_padding_is_that_of_all_rows(told) -> None:
    """It was that of the first host's rows alone."""
    names = ("step", "padding_audio", "padding_text")
    two, one = (
        [
            [line[name] for name in names]
            for line in read_metrics(run / "metrics.jsonl")
            if line["kind"] == "train"
        ]
        for run in (told.two, told.one)
    )
    assert two == one
    assert len({padding for _, padding, _ in one}) > 5


def test_a_gradient_that_is_not_finite_on_one_host_is_skipped_by_both(told) -> None:
    assert "step 5 was skipped: loss nan" in told.first
    for run in (told.one, told.two):
        lines = read_metrics(run / "metrics.jsonl")
        [skipped] = [line for line in lines if line["kind"] == "skipped"]
        assert (skipped["step"], skipped["epoch"], skipped["batch"]) == (5, 0, 4)
        assert [line["skipped"] for line in lines if line["kind"] == "train"][-1] == 1


def read(space: Path, name: str) -> dict[int, set[str]]:
    """The rows that a process read of each batch of the first epoch."""
    batches: dict[int, set[str]] = {}
    for line in (space / name).read_text().splitlines():
        if line.startswith("tones 0 "):
            batches.setdefault(int(line.split()[2]), set()).add(line)
    return batches


def test_each_host_reads_only_its_half_of_every_batch(told) -> None:
    whole, first, second = (read(told.space, name) for name in ("rows", "rows-0", "rows-1"))
    assert first.keys() >= set(range(told.began, told.stopped))
    for number, mine in first.items():
        other = second.get(number, set())
        if number < told.stopped:
            assert mine | other == whole[number]
        assert not mine & other
        assert mine <= whole[number]
        assert len(mine) in (4, 1)  # the epoch's last row is in a batch of its own


def test_however_many_hosts_each_step_is_of_the_same_clips(told) -> None:
    whole, before, after = (
        read(told.space, name) for name in ("rows", "rows-before", "rows-after")
    )
    assert whole.keys() == set(range(9))
    assert before.keys() >= set(range(told.began))
    assert after.keys() == set(range(told.stopped, 9))
    assert all(after[number] == whole[number] for number in after)
    assert all(before[number] == whole[number] for number in range(told.began))

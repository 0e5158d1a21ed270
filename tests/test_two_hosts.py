"""Two processes of one device each train as one process of two devices does, and stop together."""

import socket
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

CHANGES = (
    "data.buckets=1",
    "train.steps=10",
    "train.checkpoint_steps=4",
    "validation.every_steps=5",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def on_two_hosts(space: Path, *changes: str, code: int, stop: dict) -> list[str]:
    """What each host said; both must end with `code`. Rows that they read go to rows-0, rows-1.

    Args:
      stop: what tests/meddled.py does to the second host.
    """
    port, hosts = free_port(), []
    for number in (0, 1):
        words = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(number))
        meddle = {"rows": f"rows-{number}"} | (stop if number else {})
        hosts.append(start(space, *settings(*CHANGES, *changes), *words, meddle=meddle))
    try:
        return [end(host, code) for host in hosts]
    finally:
        for host in hosts:
            host.kill()


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> SimpleNamespace:
    """Runs `one`, of one host with two devices, and `two`, of two hosts until they were stopped.

    first, second: what the two hosts said. stopped: their last step. again: what one host with
    two devices said that took the run over.
    """
    space = make_workspace(tmp_path_factory.getbasetemp(), "hosts")
    train(space, *settings(*CHANGES, "name=one"), devices=2, meddle={"rows": "rows"})
    stop = {"call": "hebasr_jax.train.one_step", "at": 6, "signal": "SIGTERM"}
    first, second = on_two_hosts(space, "name=two", code=75, stop=stop)
    stopped = checkpoints(space / "runs" / "two")[-1]
    again = train(space, *settings(*CHANGES, "name=two"), devices=2)
    return SimpleNamespace(
        one=space / "runs" / "one",
        two=space / "runs" / "two",
        first=first,
        second=second,
        stopped=stopped,
        again=again,
        space=space,
    )


def test_a_signal_to_one_host_stops_both_with_a_checkpoint(told) -> None:
    assert 6 <= told.stopped <= 8
    assert "SIGTERM" in told.second
    assert "SIGTERM" not in told.first
    assert f"going on from step {told.stopped}" in told.again


def test_only_the_first_host_speaks(told) -> None:
    assert "compiled 8 x" in told.first
    assert [line for line in told.second.splitlines() if line] == [
        "SIGTERM: saving after this step; again to leave at once"
    ]


def test_losses_weights_and_wer_are_those_of_one_host(told) -> None:
    assert len(losses(told.one)) == 10
    np.testing.assert_allclose(losses(told.two), losses(told.one), rtol=1e-6)
    for ours, theirs in zip(validations(told.two), validations(told.one), strict=True):
        mine, other = ours["sets"]["held"], theirs["sets"]["held"]
        assert ours["step"] == theirs["step"]
        assert mine.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-5)
        assert mine == other
    ours, theirs = arrays(told.two, 10), arrays(told.one, 10)
    for name, leaf in ours.items():
        if name.startswith("trained") and not name.endswith("key/bias"):  # its gradient is noise
            assert np.linalg.norm(leaf - theirs[name]) <= 1e-4 * np.linalg.norm(leaf), name


def test_each_host_reads_only_its_half_of_every_batch(told) -> None:
    whole, first, second = (
        {line for line in (told.space / name).read_text().splitlines() if "tones 0 " in line}
        for name in ("rows", "rows-0", "rows-1")
    )
    read = {int(line.split()[2]) for line in first}
    assert {line for line in whole if int(line.split()[2]) in read} == first | second
    assert not first & second
    assert read >= set(range(6))
    for number in read:
        rows = [sum(int(x.split()[2]) == number for x in part) for part in (first, second)]
        assert rows in ([4, 4], [1, 0])  # the epoch's last row is in a batch of its own

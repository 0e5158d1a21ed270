"""Two processes of one device each train as one process of two devices does, and stop together."""

import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tone_runs import (
    arrays,
    cache_folder,
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


def on_two_hosts(space: Path, *changes: str, code: int = 0, stop: dict | None = None) -> list[str]:
    """What each host said; both must end with `code`. Rows that they read go to rows-0, rows-1."""
    port, hosts = free_port(), []
    for number in (0, 1):
        words = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(number))
        meddle = {"rows": f"rows-{number}"} | (stop or {} if number else {})
        hosts.append(start(space, *settings(*CHANGES, *changes), *words, meddle=meddle))
    try:
        return [end(host, code) for host in hosts]
    finally:
        for host in hosts:
            host.kill()


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> SimpleNamespace:
    """Runs `one`, of one host with two devices, and `two`, of two hosts that were stopped once.

    space: where they are. first, second: what the two hosts said until they were stopped.
    again: what the first one said when they went on. stopped: their last step before.
    """
    cache = cache_folder(tmp_path_factory.getbasetemp())
    space = make_workspace(tmp_path_factory.mktemp("hosts") / "space", cache)
    train(space, *settings(*CHANGES, "name=one"), devices=2, meddle={"rows": "rows"})
    stop = {"call": "hebasr_jax.train.one_step", "at": 6, "signal": "SIGTERM"}
    first, second = on_two_hosts(space, "name=two", code=75, stop=stop)
    stopped = checkpoints(space / "runs" / "two")[-1]
    again, _ = on_two_hosts(space, "name=two")
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
    assert len(whole) == 65
    assert not first & second
    assert first | second == whole
    batches = [
        tuple(sum(line.split()[2] == str(n) for line in part) for part in (first, second))
        for n in range(9)
    ]
    assert sorted(batches) == [(1, 0)] + [(4, 4)] * 8

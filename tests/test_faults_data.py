"""A run in which a thread that reads data dies, or one clip makes a step's gradient NaN."""

from pathlib import Path

import poison
import pytest
from tone_runs import (
    QUICK,
    arrays,
    checkpoints,
    losses,
    make_workspace,
    read_rows,
    same_bits,
    settings,
)

from hebasr_jax import run_setup, train_step
from hebasr_jax.cli import main
from hebasr_jax.data import pipeline
from hebasr_jax.tracking import read_metrics

SMALL = (
    "data.batch_clips=16",
    "data.micro_audio_s=16",
    "train.steps=7",
    "train.checkpoint_steps=1",
    "validation.every_steps=0",
    *QUICK,
)


@pytest.fixture(scope="module")
def monkeymodule():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def space(tmp_path_factory, monkeymodule) -> Path:
    """A workspace, the place to be; all runs there differ in data only and share their programs."""
    folder = make_workspace(tmp_path_factory.getbasetemp(), "data")
    monkeymodule.chdir(folder)
    programs: dict = {}
    monkeymodule.setattr(train_step, "prepare_inputs", train_step.prepare_inputs)  # given back
    poison.know_the_mark()

    def compile_once(step, *shapes):
        key = step.audio_s, step.micro_batches, shapes[1].text_BX.shape
        if key not in programs:
            programs[key] = train_step.compile_step(step, *shapes)
        return programs[key]

    monkeymodule.setattr(run_setup, "compile_step", compile_once)
    return folder


def train(name: str, *changes: str) -> int:
    return main(["train", "--config", "config.py", *settings(f"name={name}", *SMALL, *changes)])


@pytest.fixture(scope="module")
def batches(space) -> list[tuple[int, int, int]]:
    """(epoch, number, bucket) of the steps of an uninterrupted run, runs/whole, in their order."""
    original, seen = pipeline.load_batch, set()

    def load(feed, plan, number, *rows):
        seen.add((plan.epoch, number, int(plan.bucket_N[number])))
        return original(feed, plan, number, *rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_batch", load)
        assert train("whole") == 0
    return sorted(seen)[:7]


def die_at(patch: pytest.MonkeyPatch, epoch: int, number: int) -> None:
    """The thread that loads this batch raises what nobody foresaw."""
    original = pipeline.load_batch

    def load(feed, plan, at, *rows):
        if (plan.epoch, at) == (epoch, number):
            raise RuntimeError("a decoder went mad")
        return original(feed, plan, at, *rows)

    patch.setattr(pipeline, "load_batch", load)


def test_a_thread_that_dies_ends_the_run_with_its_last_step_saved(space, batches, capsys) -> None:
    """After step 1, at the edge of a bucket and of an epoch; then the run ends as the whole one."""
    buckets = [bucket for _, _, bucket in batches]
    edge = next(n for n in range(2, 7) if buckets[n] != buckets[n - 1])
    turn = next(n for n, (epoch, _, _) in enumerate(batches) if epoch == 1)
    run = space / "runs" / "dying"
    for step in sorted({1, edge, turn}):
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, *batches[step][:2])
            assert train("dying", "train.checkpoint_steps=20") == 1
        told = capsys.readouterr().err
        assert "error: RuntimeError: a decoder went mad" in told
        assert len(told.split("error: ")[1].splitlines()) <= 3
        assert checkpoints(run)[-1] == step
        assert losses(run) == losses(space / "runs" / "whole")[:step]
    assert train("dying") == 0
    assert losses(run) == losses(space / "runs" / "whole")
    assert same_bits(arrays(run, 7), arrays(space / "runs" / "whole", 7))


def test_one_clip_without_a_finite_loss_costs_its_step_and_no_more(space, batches, capsys) -> None:
    run, whole = space / "runs" / "poisoned", space / "runs" / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_batch", pipeline.load_batch)  # given back
        poison.mark(*batches[3][:2])
        assert train("poisoned") == 0
    assert "step 4 was skipped: loss nan" in capsys.readouterr().err
    [skipped] = [x for x in read_metrics(run / "metrics.jsonl") if x["kind"] == "skipped"]
    assert (skipped["step"], skipped["epoch"], skipped["batch"]) == (4, *batches[3][:2])
    assert {*skipped["clips"]} <= {r["id"] for r in read_rows(Path("corpus/train.jsonl"))}
    assert losses(run)[:3] == losses(whole)[:3]
    before, after = arrays(run, 3), arrays(run, 4)
    assert (before.pop("step"), after.pop("step")) == (3, 4)
    assert same_bits(before, after)
    assert not same_bits(after, {k: v for k, v in arrays(run, 5).items() if k != "step"})
    assert checkpoints(run)[-1] == 7

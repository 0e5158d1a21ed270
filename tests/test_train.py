"""The train command: a run that is stopped and killed ends, bit for bit, as one that never was."""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import tone_runs
from tone_runs import (
    arrays,
    checkpoints,
    losses,
    make_workspace,
    same_bits,
    settings,
    train,
    validations,
)

from hebasr_jax.checkpoint import figures_of
from hebasr_jax.cli import main
from hebasr_jax.config import model_config, read_config
from hebasr_jax.paths import flat
from hebasr_jax.tracking import read_metrics
from hebasr_jax.trained import load_trained
from hebasr_jax.weights import load_params

STEP, SCORE, SEAL = (
    f"hebasr_jax.{name}" for name in ("train.one_step", "validate._hear", "checkpoint.seal")
)


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """A workspace in which a run of 30 steps went to its end: runs/whole."""
    folder = make_workspace(tmp_path_factory.getbasetemp(), "train")
    told = train(folder)
    assert "report: runs/whole/report.html" in told
    return folder


@pytest.fixture(scope="module")
def whole(space) -> Path:
    return space / "runs" / "whole"


def test_stopped_and_killed_anywhere_a_run_ends_as_the_whole_one(space, whole) -> None:
    """Stopped between steps, then within a validation, then killed while it saves."""
    name, run = settings("name=parts"), space / "runs" / "parts"

    told = train(space, *name, code=75, meddle={"call": STEP, "at": 5, "signal": "SIGTERM"})
    assert "SIGTERM: saving after this step" in told
    stopped = checkpoints(run)[-1]
    assert 5 <= stopped <= 7
    assert len(losses(run)) == stopped

    told = train(space, *name, code=75, meddle={"call": SCORE, "at": 1, "signal": "SIGTERM"})
    assert f"going on from step {stopped}" in told
    assert checkpoints(run)[-1] == 10
    assert [line["step"] for line in validations(run)] == [0]  # half a validation is none

    train(space, *name, code=-9, meddle={"call": SEAL, "at": 1, "signal": "SIGKILL"})
    assert checkpoints(run)[-1] == 10
    assert losses(run)[:10] == losses(whole)[:10]

    told = train(space, *name)
    assert "going on from step 10" in told
    assert losses(run) == losses(whole)
    assert validations(run) == validations(whole)
    assert same_bits(arrays(run, 30), arrays(whole, 30))
    starts = json.loads((run / "env.json").read_text())["starts"]
    assert [start["changes"] for start in starts] == [[]] * 4
    assert not list(run.rglob("*partial*"))


def test_a_finished_run_has_nothing_to_do(space, whole, monkeypatch, capsys) -> None:
    monkeypatch.chdir(space)
    monkeypatch.setattr("hebasr_jax.train.compile_programs", lambda *_: {})
    before = losses(whole), validations(whole), checkpoints(whole)
    assert main(["train", "--config", "config.py"]) == 0
    assert "going on from step 30" in capsys.readouterr().err
    assert (losses(whole), validations(whole), checkpoints(whole)) == before


def test_the_losses_are_the_golden_ones(whole) -> None:
    """Every change that moves the losses shows here; `tone_runs.py` says how to renew them."""
    golden = json.loads(tone_runs.GOLDEN.read_text())
    np.testing.assert_allclose(losses(whole), golden, rtol=1e-3)
    assert golden[-1] < golden[0] / 2


def test_each_start_is_recorded_with_the_data_that_it_read(whole) -> None:
    for start in json.loads((whole / "env.json").read_text())["starts"]:
        (row,) = start["data"].values()
        assert row["revision"].startswith("what was read has fingerprint ")
        assert row["clips"] > 0
        assert "licence" in row


def test_every_step_is_told_once_with_plausible_rates(whole) -> None:
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == sorted({*range(3, 31, 3), 8, 10, 16, 20, 24})
    assert sum(len(line["losses"]) for line in lines) == 30
    for line in lines:
        assert line["loss"] == pytest.approx(np.mean(line["losses"]))
        assert 0 <= line["padding_audio"] < 1
        assert line["skipped"] == 0
    # A line of one step, before a validation, once had the time of the line before it.
    rates = [line["audio_s_per_s"] for line in lines]
    assert max(rates) < 20 * statistics.median(rates)


def test_validation_comes_at_step_0_every_ten_steps_and_at_the_end(whole) -> None:
    told = validations(whole)
    assert [line["step"] for line in told] == [0, 10, 20, 30]
    best = json.loads((whole / "best.json").read_text())
    for line in told:
        held = line["sets"]["held"]
        assert held["clips"] == 12
        assert held["hits"] + held["substitutions"] + held["deletions"] == held["words"]
        if line["step"]:
            figures = {"loss": held["loss"], "wer": held["wer"]}
            assert best[str(line["step"])] == figures | {"scored_on": line["scored_on"]}


def test_the_broken_clip_is_on_record_and_the_run_went_on(whole) -> None:
    rows = tone_runs.read_rows(whole / "quarantine.jsonl")
    assert [(row["set"], row["id"]) for row in rows] == [("tones", "broken")]


def test_exactly_the_tensors_that_are_trained_change(space, whole) -> None:
    """Bug 2 of the project before: parts that were to be trained were never updated."""
    changes = ("name=top", "stages.0.decoder.trained_layers=1", "stages.0.encoder.learning_rate=0")
    small = ("data.buckets=1", "train.steps=2", "validation.every_steps=0", "data.micro_audio_s=64")
    train(space, *settings(*changes, *small))
    after = flat(load_trained(space / "runs" / "top" / "checkpoints" / "2"))
    config, layout = model_config(read_config(space / "tiny")), "transformers"
    before = flat(load_params(space / "tiny", config, layout, place=np.asarray))
    assert after.keys() == before.keys()
    for path, leaf in after.items():
        moved_L = [
            bool(np.any(ours != theirs)) for ours, theirs in zip(leaf, before[path], strict=True)
        ]
        if path.startswith("encoder/layers/"):
            assert not any(moved_L), path
        elif path.startswith("decoder/layers/"):
            assert moved_L == [False, False, True], path
        else:
            assert any(moved_L), path


def test_other_dev_data_ranks_checkpoints_anew(space, whole, monkeypatch, capsys) -> None:
    """Figures of before stood beside new ones, by which worse weights could be exported."""
    monkeypatch.chdir(space)
    monkeypatch.setattr("hebasr_jax.train.compile_programs", lambda *_: {})
    run = space / "runs" / "judged"
    shutil.copytree(whole, run)
    old = validations(run)[-1]

    def go(*words: str) -> list[dict]:
        assert main(["train", "--config", "config.py", *settings("name=judged"), *words]) == 0
        return validations(run)

    few = [*settings("validation.max_clips=6"), "--accept-changes"]
    new = go(*few)[-1]
    assert [line["step"] for line in go(*few)] == [0, 10, 20, 30, 30]
    assert new["sets"]["held"]["clips"] == 6
    figures = {name: new["sets"]["held"][name] for name in ("loss", "wer")}
    assert figures_of(run) == {"30": figures | {"scored_on": new["scored_on"]}}
    assert len(go("--accept-changes")) == 6  # undone, and told as the newest
    assert figures_of(run)["30"]["wer"] == old["sets"]["held"]["wer"]
    assert figures_of(run).keys() == {"10", "20", "30"}
    # As many clips as there are is no other data.
    assert len(go(*settings("validation.max_clips=None"), "--accept-changes")) == 6

"""Ablation: what each variant leaves out, paired intervals, and a small one from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tone_runs import checkpoints, losses, make_workspace, settings

from hebasr_jax.ablate import ITEMS, folder_name, variants
from hebasr_jax.cli import main
from hebasr_jax.config_file import flatten, load_config
from hebasr_jax.metrics import bootstrap_interval, paired_interval

CONFIGS = Path(__file__).parents[1] / "configs"


def test_every_item_of_the_recipes_is_left_out_alone() -> None:
    config = load_config(CONFIGS / "round2_5.py").config
    found = variants(config)
    left = {name.removeprefix("without ") for name in found} - {"all"}
    assert {name for name, _ in ITEMS} - left == {"Muon", "joining"}
    whole = flatten(config)
    for name, variant in found.items():
        part = flatten(variant)
        changed = {at.split(".")[0] for at, x in part.items() if whole.get(at) != x}
        changed |= {at.split(".")[0] for at in whole.keys() - part.keys()}
        assert len(changed) == (name != "all"), (name, changed)
    assert found["without averaging"].average.best == 1
    assert len(found["without stages"].stages) == 1
    assert found["without time stamps"].text.context_share == config.text.context_share
    rates = found["without rates by group and layer"].stages[1]
    assert rates.encoder.learning_rate == rates.projector.learning_rate == 3e-5
    assert rates.encoder.layer_decay == 1.0
    assert rates.conv_stem.learning_rate == 0.0
    assert rates.encoder.trained_layers == 8


def test_an_item_that_a_recipe_lacks_is_not_left_out() -> None:
    config = load_config(CONFIGS / "demo.py").config
    assert {"without SpecAugment", "without stages"}.isdisjoint(variants(config))
    assert "without Muon" in variants(config)
    plain = replace(config, optim=replace(config.optim, matrices="adamw"))
    assert "without Muon" not in variants(plain)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 20)), min_size=2),
    st.integers(0, 5),
)
def test_differences_are_of_corpus_rates_and_turn_their_sign(rows, seed) -> None:
    first, second, words = (np.array(column) for column in zip(*rows, strict=True))
    ours = paired_interval(np.stack([first, second]), words, resamples=200, seed=seed)
    theirs = paired_interval(np.stack([second, first]), words, resamples=200, seed=seed)
    assert ours["difference"] == pytest.approx((first.sum() - second.sum()) / words.sum())
    assert ours["difference"] == pytest.approx(-theirs["difference"])
    assert ours["ci95"] == pytest.approx([-x for x in theirs["ci95"][::-1]])
    assert ours["p_worse"] == pytest.approx(1 - theirs["p_worse"])
    same = paired_interval(np.stack([first, first]), words, resamples=50, seed=seed)
    assert (same["difference"], same["ci95"], same["p_worse"]) == (0.0, [0.0, 0.0], 0.5)
    alone = paired_interval(np.stack([first, 0 * first]), words, resamples=200, seed=seed)
    assert alone["ci95"] == pytest.approx(
        bootstrap_interval(first, words, resamples=200, seed=seed)
    )


def test_what_is_hard_for_both_cancels_and_groups_go_together() -> None:
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 50, 60)
    words = np.full(60, 100)
    paired = paired_interval(np.stack([hard + 2, hard]), words, resamples=300, seed=0)
    assert paired["ci95"] == pytest.approx([0.02, 0.02])
    better = np.repeat(rng.integers(-3, 4, 6), 10)
    by_clip, by_group = (
        paired_interval(np.stack([hard + 3 + better, hard]), words, groups, resamples=500, seed=0)
        for groups in (None, [f"g{n // 10}" for n in range(60)])
    )
    assert np.diff(by_group["ci95"]) > 1.5 * np.diff(by_clip["ci95"])
    one = paired_interval(np.stack([hard, hard]), words, ["a"] * 60, resamples=50, seed=0)
    assert np.isnan(one["ci95"]).all()


def test_an_ablation_from_end_to_end(tmp_path_factory, monkeypatch, capsys) -> None:
    """Same seed, same steps; what only follows the training is not trained again."""
    space = make_workspace(tmp_path_factory.getbasetemp(), "ablation")
    monkeypatch.chdir(space)
    monkeypatch.setenv("HF_REPO_ID", "some/one")  # nothing of an ablation is uploaded
    words = settings(
        "name=few",
        "train.steps=6",
        "train.checkpoint_steps=3",
        "validation.every_steps=3",
        "validation.bootstrap=50",
        "data.buckets=1",
        "augment.speed_factors=1.0",
        "optim.decay=none",
        "average.best=2",
    )
    command = ["train", "--config", "config.py", *words, "--ablate"]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert "ablation 3 of 3: without averaging" in told
    folder = space / "runs" / "few-ablation"
    rows = json.loads((folder / "ablation.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["all", "without SpecAugment", "without averaging"]
    assert rows[0]["difference"] == 0.0
    for row in rows:
        final = json.loads((folder / folder_name(row["variant"]) / "final.json").read_text())
        assert row["wer"] == pytest.approx(final["scores"]["test"]["held"]["wer"])
        assert final["step"] == 6
    runs = [folder / folder_name(row["variant"]) for row in rows]
    assert losses(runs[2]) == losses(runs[0])
    assert losses(runs[1])[0] != losses(runs[0])[0]
    chosen = [json.loads((run / "final.json").read_text()) for run in runs]
    assert len(chosen[0]["candidates"]) == 3
    assert len(chosen[2]["candidates"]) == 1
    ours, theirs = (next((run / "checkpoints" / "6").glob("*.json")) for run in (runs[0], runs[2]))
    assert ours.stat().st_ino == theirs.stat().st_ino
    assert checkpoints(runs[2]) == checkpoints(runs[0])
    assert (folder / "ablation.md").read_text().count("\n") == 5
    monkeypatch.setattr("hebasr_jax.train.compile_programs", lambda *_: {})
    assert main(command) == 0  # all is there: nothing is trained again

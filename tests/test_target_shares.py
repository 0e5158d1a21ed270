"""Time stamps and contexts at target shares of all rows of a mix, in each epoch and stage."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_pipeline import (
    all_batches,
    assert_same,
    clip,
    clip_set,
    feed_of,
    rows_of,
    tokenizer,
    with_,
)
from test_stamped_targets import read

from hebasr_jax import dry_run
from hebasr_jax.config_file import load_config
from hebasr_jax.data.clips import ClipSet
from hebasr_jax.data.draws import row_words
from hebasr_jax.data.pipeline import Feed
from hebasr_jax.data.targets import Target, Targets
from hebasr_jax.run_config import Config, Mix, Stage
from hebasr_jax.stages import _feed_of
from hebasr_jax.timestamps import Segment
from hebasr_jax.tiny import write_tiny_model

CONFIGS = Path(__file__).parents[1] / "configs"
WHAT = {"stamps": "stamped", "context": "context"}


def mix() -> list[ClipSet]:
    """Clips of 1 s: "both" with segments and contexts, "none" with neither, "context"."""
    lacks: dict[str, dict] = {
        "both": {},
        "none": {"segments": (), "context": ""},
        "context": {"segments": ()},
    }
    sizes = {"both": 200, "none": 250, "context": 150}
    return [
        clip_set([clip(n % 7, 1.0, **lacks[name]) for n in range(size)], name)
        for name, size in sizes.items()
    ]


def named(sets: list[ClipSet]) -> list[ClipSet]:
    return [
        replace(s, clips=tuple(replace(c, id=str(n)) for n, c in enumerate(s.clips))) for s in sets
    ]


def shares(stamps: float, context: float, **data) -> Config:
    """Batches of 50 rows; a share of each set for the mix."""
    return with_(
        text={"stamp_share": stamps, "context_share": context}, data={"batch_clips": 50} | data
    )


def realised(feed: Feed, epoch: int = 0) -> tuple[dict[str, float], int]:
    """What reached the batches: the share of all rows with each, and the number of rows."""
    rows = rows_of(all_batches(feed, epochs=epoch + 1, epoch=epoch))
    told = [read(row, feed.tokenizer) for row in rows]
    return {
        what: float(np.mean([bool(getattr(t, key)) for t in told])) for what, key in WHAT.items()
    }, len(rows)


def assert_met(feed: Feed, epoch: int = 0) -> None:
    """Each realised share lies within four binomial deviations of what was expected of it."""
    found, rows = realised(feed, epoch)
    for what in WHAT:
        target = getattr(feed.targets, what)
        able, chance = target.available * rows, target.probability
        deviation = (able * chance * (1 - chance)) ** 0.5 / rows
        assert found[what] == pytest.approx(target.expected, abs=4 * deviation + 1e-9), what


def with_shares(sets: list[ClipSet], *parts: float) -> list[ClipSet]:
    return [replace(s, share=part) for s, part in zip(sets, parts, strict=True)]


@pytest.mark.parametrize("parts", [(0.5, 0.3, 0.2), (0.3, 0.6, 0.1)])
def test_targets_are_of_all_rows_of_the_mix_that_is_drawn(parts) -> None:
    feed = feed_of(with_shares(named(mix()), *parts), shares(0.25, 0.3))
    stamps, context = feed.targets
    assert stamps.available == pytest.approx(parts[0], abs=0.01)
    assert context.available == pytest.approx(parts[0] + parts[2], abs=0.01)
    assert stamps.expected == pytest.approx(0.25)
    assert context.expected == pytest.approx(0.3)
    assert stamps.probability == pytest.approx(0.25 / stamps.available)
    assert not feed.targets.warnings()
    for epoch in (0, 1):
        assert_met(feed, epoch)


def test_a_target_that_cannot_be_met_takes_all_and_is_told() -> None:
    feed = feed_of(with_shares(named(mix()), 0.3, 0.6, 0.1), shares(0.4, 0.5))
    assert feed.targets.stamps.probability == feed.targets.context.probability == 1.0
    found, _ = realised(feed)
    assert found == pytest.approx({"stamps": 0.3, "context": 0.4}, abs=0.01)
    told = feed.targets.warnings()
    assert ["0.4 cannot be met: only 0.3" in told[0], "context_share = 0.5" in told[1]] == [
        True
    ] * 2
    nobody = feed_of([named(mix())[1]], shares(0.4, 0.0))
    assert nobody.targets.stamps == Target(0.4, 0.0)
    assert (nobody.targets.stamps.probability, len(nobody.targets.warnings())) == (0.0, 1)
    assert realised(nobody)[0] == {"stamps": 0.0, "context": 0.0}
    plain = feed_of(named(mix()), shares(0.0, 0.0))
    assert not plain.targets.warnings()


def test_drawn_anew_each_epoch_and_the_same_on_resume() -> None:
    sets = named(mix())
    feed = feed_of(sets, shares(0.2, 0.3))
    drawn = []
    for epoch in (0, 1):
        rows = rows_of(all_batches(feed, epochs=epoch + 1, epoch=epoch))
        told = [(read(row, tokenizer()), row.seed_B2.tobytes()) for row in rows]
        clip_of = {
            row_words(0, epoch, f"{s.name}/{c.id}").tobytes(): (s.name, c.id)
            for s in sets
            for c in s.clips
        }
        drawn.append({clip_of[words] for row, words in told if row.stamped})
    chance, able = feed.targets.stamps.probability, len(sets[0].clips)
    assert chance == pytest.approx(0.6)
    assert len(drawn[0] & drawn[1]) == pytest.approx(chance**2 * able, abs=4 * able**0.5 / 2)
    whole = all_batches(feed, epochs=2)
    epoch, number = whole[-5][:2]
    again = feed_of(sets, shares(0.2, 0.3, threads=3))
    assert again.targets == feed.targets
    assert_same(all_batches(again, epochs=2, epoch=epoch, batch=number), whole[-5:])


def test_the_plan_does_not_depend_on_the_shares() -> None:
    """Which rows make which batch; the shapes have room for stamps and context or have not."""
    plans = [feed_of(named(mix()), shares(*both)).plan(1) for both in ((0.1, 0.1), (0.9, 0.6))]
    for column in ("clips_C", "first_R", "visit_R", "speed_R"):
        one, two = (getattr(plan.rows, column) for plan in plans)
        np.testing.assert_array_equal(one, two)
    assert plans[0].buckets == plans[1].buckets


def test_each_stage_knows_its_own_mix() -> None:
    stages = (
        Stage("all"),
        Stage("timed", mix=(Mix("both"),)),
        Stage("half", mix=(Mix("both", 0.5), Mix("none", 0.5))),
        Stage("again"),
    )
    feed = feed_of(named(mix()), replace(shares(0.25, 0.2), stages=stages))
    feeds = [_feed_of(feed, number, 8) for number in range(len(stages))]
    available = [own.targets.stamps.available for own in feeds]
    assert available == pytest.approx([1 / 3, 1.0, 0.5, 1 / 3], abs=0.02)
    for own in feeds:
        assert own.targets.stamps.expected == pytest.approx(0.25)
        assert_met(own)


def test_a_joined_row_counts_once_and_as_a_whole() -> None:
    """Of clips of which every third has no times, few joined rows can be stamped."""
    clips = [clip(n % 50, 2.0, recording="r") for n in range(450)]
    clips = [
        replace(one, id=str(n), segments=() if n % 3 == 0 else one.segments)
        for n, one in enumerate(clips)
    ]
    clips.append(
        replace(clip(0, 8.0, text="x " * 60), id="l", segments=(Segment(0.0, 8.0, "x " * 60),))
    )
    feed = feed_of([clip_set(clips)], shares(0.1, 0.3, join_share=0.7))
    alone = feed_of([clip_set(clips)], shares(0.1, 0.3))
    assert alone.targets.stamps.available == pytest.approx(2 / 3, abs=0.01)
    assert 0.1 < feed.targets.stamps.available < 0.6
    assert feed.targets.stamps.expected == pytest.approx(0.1)
    assert_met(feed)


def test_both_shares_and_the_chance_are_in_the_table() -> None:
    rows = Targets(Target(0.4, 0.8), Target(0.5, 0.25)).table()
    assert [list(row.values()) for row in rows] == [
        ["time stamps", 0.4, 0.8, 0.5, pytest.approx(0.4)],
        ["context", 0.5, 0.25, 1.0, 0.25],
    ]


# --- the recipes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A tiny model, and a set for each source: thirty clips of a second, most with everything."""
    folder = tmp_path_factory.mktemp("recipes")
    write_tiny_model(folder / "model")
    lines = []
    for n in range(30):
        wave = np.sin(np.arange(16_000) * 0.05 * (1 + n % 5)).astype(np.float32) / 4
        soundfile.write(folder / f"{n}.wav", wave, 16_000)
        row = {"audio": f"{n}.wav", "id": str(n), "text": "שלום", "quality": n / 29}
        row |= {"recording": str(n // 5), "context": "תודה" if n % 5 else ""}
        row["segments"] = [{"start_s": 0.0, "end_s": 1.0, "text": "שלום"}]
        lines.append(json.dumps(row, ensure_ascii=False))
    (folder / "set.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["round2_5", "round3_knesset", "round3_mixed"])
def test_the_recipes_dry_run_on_local_sets(name, local, capsys) -> None:
    path = CONFIGS / f"{name}.py"
    data = load_config(path).config.data
    count = len(load_config(path).config.stages)
    dry_run.dry_run(
        load_config(
            path,
            [
                f"model.path={local / 'model'}",
                f"runs_dir={local / 'runs'}",
                "data.batch_clips=8",
                "compute.dtype=float32",
                "compute.devices=1",
                *(f"stages.{n}.decoder.trained_layers=1" for n in range(count)),
                *(f"stages.{n}.encoder.trained_layers=1" for n in range(1, count)),
                *(f"data.train.{n}.path={local / 'set.jsonl'}" for n in range(len(data.train))),
                *(f"data.dev.{n}.path={local / 'set.jsonl'}" for n in range(len(data.dev))),
                *(f"data.train.{n}.without=" for n in range(len(data.train))),
                *(f"data.dev.{n}.only=None" for n in range(len(data.dev))),
                *(f"data.dev.{n}.split=None" for n in range(len(data.dev))),
            ],
        )
    )
    out = capsys.readouterr().out
    _, _, table = out.partition("Shares of all rows of the mix")
    assert "time stamps" in table
    assert "effective_epochs" in out
    best = [line for line in out.splitlines() if line.startswith("knesset-best ")]
    assert bool(best) == (name == "round3_mixed")
    assert all(line.split()[1] == "3" for line in best)  # of thirty, those of quality 0.9


def test_the_phases_are_those_of_the_source() -> None:
    first, second = (
        load_config(CONFIGS / f"{name}.py").config for name in ("round3_knesset", "round3_mixed")
    )
    assert [source.name for source in first.data.train] == ["knesset"]
    assert (first.stages[0].epochs, second.stages[0].epochs) == (3, 2)
    assert second.model.path == f"{first.runs_dir}/{first.name}/export/{first.export.layouts[0]}"
    for config in (first, second):
        stage, optim = config.stages[0], config.optim
        groups = (stage.conv_stem, stage.encoder, stage.projector, stage.embedding, stage.decoder)
        assert {group.learning_rate for group in groups} == {1e-5}
        assert (optim.warmup_steps, optim.decay, config.data.batch_clips) == (800, "linear", 32)
        assert (config.text.stamp_share, config.text.context_share) == (0.4, 0.5)
    assert [part.share for part in second.stages[0].mix] == [0.9, 0.025, 0.075]

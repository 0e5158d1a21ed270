"""Stages: one run that trains other parts from a step on, at other rates and on other data."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tone_runs import (
    arrays,
    checkpoints,
    losses,
    make_workspace,
    read_rows,
    same_bits,
    settings,
    train,
    validations,
    write_rows,
)

from hebasr_jax.data.draws import SetInfo, Table, select_sets
from hebasr_jax.data.pipeline import Feed
from hebasr_jax.errors import UserError
from hebasr_jax.model.asr import abstract_params, init_params
from hebasr_jax.optim import (
    GROUPS,
    join,
    make_optimizer,
    rate_table,
    split,
)
from hebasr_jax.paths import flat, look_up
from hebasr_jax.run_config import Group, Optim, Stage
from hebasr_jax.sharding import make_mesh
from hebasr_jax.stages import Part, checked_rates, enter, last_steps, schedule_steps
from hebasr_jax.tiny import TINY
from hebasr_jax.tracking import read_metrics
from hebasr_jax.train_step import init_state
from hebasr_jax.trained import load_trained

FROZEN = Group(0.0)
OPTIM = Optim(warmup_steps=4, decay="none", weight_decay=0.0, clip_norm=1e9)
TOP = Stage(
    "top",
    conv_stem=FROZEN,
    encoder=FROZEN,
    embedding=Group(1e-3),
    projector=Group(4e-3),
    decoder=Group(2e-3, trained_layers=1),
)
WIDE = replace(TOP, name="wide", encoder=Group(3e-3, trained_layers=1), decoder=Group(1e-3))
SHAPES = abstract_params(TINY)


def part(stage: Stage, **changes) -> Part:
    trained, _ = split(init_params(TINY, jax.random.key(0)), stage)
    optim = replace(OPTIM, **changes)
    optimizer = make_optimizer(optim, stage, trained, 100)
    return Part(stage, optim, object.__new__(Feed), optimizer, 0, 10, 100, 10, 0.0)


def moved(state, here: Part, seed: int):
    """The state after an update with random gradients."""
    grads = jax.tree.map(lambda w: jax.random.normal(jax.random.key(seed), w.shape), state.trained)
    updates, moments = here.optimizer.update(grads, state.moments, state.trained)
    return state.replace(trained=optax.apply_updates(state.trained, updates), moments=moments)


def named(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def test_entering_a_stage_keeps_weights_and_what_was_known_of_them() -> None:
    """Bug 3 of the project before: moments were lost, and new parts shared old counts."""
    top, wide = part(TOP), part(WIDE)
    state = init_state(*split(init_params(TINY, jax.random.key(0)), TOP), top.optimizer)
    for seed in range(3):
        state = moved(state, top, seed)
    before, weights = named(state.moments), named(join(state.trained, state.frozen))
    entered = enter(state, wide, SHAPES, make_mesh(1))
    after = named(entered.moments)
    whole = named(join(entered.trained, entered.frozen))
    assert all(np.array_equal(whole[path], leaf) for path, leaf in weights.items())
    fresh = named(init_state(entered.trained, entered.frozen, wide.optimizer).moments)
    assert after.keys() == fresh.keys()
    grown = 0
    for path, leaf in after.items():
        if path not in before:
            np.testing.assert_array_equal(leaf, fresh[path])
            assert "encoder" in path, path
        elif leaf.shape == before[path].shape:
            np.testing.assert_array_equal(leaf, before[path])
        else:  # one layer of the decoder was trained, now there are three
            np.testing.assert_array_equal(leaf[-1:], before[path])
            np.testing.assert_array_equal(leaf[:-1], 0)
            grown += 1
    assert grown > 20


def test_what_joins_later_warms_up_by_itself_and_the_rest_goes_on() -> None:
    """Adam's first step is the rate itself: a quarter of it for what is new, all for the rest."""
    top, wide = part(TOP), part(WIDE)
    state = init_state(*split(init_params(TINY, jax.random.key(0)), TOP), top.optimizer)
    ones = jax.tree.map(jnp.ones_like, state.trained)
    for _ in range(5):
        _, moments = top.optimizer.update(ones, state.moments, state.trained)
        state = state.replace(moments=moments)
    entered = enter(state, wide, SHAPES, make_mesh(1))
    ones = jax.tree.map(jnp.ones_like, entered.trained)
    updates, _ = wide.optimizer.update(ones, entered.moments, entered.trained)
    found = {path: -np.asarray(update) for path, update in flat(updates).items()}
    up = found["decoder/layers/up/kernel"].reshape(3, -1)
    np.testing.assert_allclose(up[:2], 1e-3 / 4, rtol=1e-4)
    np.testing.assert_allclose(up[2], 1e-3, rtol=1e-4)
    np.testing.assert_allclose(found["encoder/layers/up/kernel"], 3e-3 / 4, rtol=1e-4)
    np.testing.assert_allclose(found["projector/out/kernel"], 4e-3, rtol=1e-4)


def test_a_new_schedule_warms_all_up_and_keeps_moments() -> None:
    top, again = part(TOP), part(replace(TOP, name="again", new_schedule=True))
    state = init_state(*split(init_params(TINY, jax.random.key(0)), TOP), top.optimizer)
    state = moved(state, top, 0)
    before = named(state.moments)
    after = named(enter(state, again, SHAPES, make_mesh(1)).moments)
    for path, leaf in after.items():
        rates = path.startswith("[2]")
        assert np.array_equal(leaf, 0 * leaf if rates else before[path]), path


def test_fewer_layers_than_before_are_the_last_ones() -> None:
    wide, top = part(WIDE), part(TOP)
    state = init_state(*split(init_params(TINY, jax.random.key(0)), WIDE), wide.optimizer)
    state = moved(state, wide, 0)
    before = named(state.moments)
    for path, leaf in named(enter(state, top, SHAPES, make_mesh(1)).moments).items():
        kept = before[path][-leaf.shape[0] :] if leaf.ndim else before[path]
        np.testing.assert_array_equal(leaf, kept)


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [TOP, WIDE, replace(WIDE, decoder=Group(1e-3, None, 0.5))])
def test_measured_rates_are_those_of_the_table(stage, matrices) -> None:
    measured = checked_rates(part(stage, matrices=matrices), SHAPES)
    for row in rate_table(SHAPES, stage):
        if row.trained_parameters:
            assert measured[row.group] == pytest.approx(row.peak_rate, rel=1e-4)
        else:
            assert row.group not in measured


@pytest.mark.parametrize(
    ("epsilon", "clip_norm"), [(1e-4, 1.0), (1.0, 1.0), (1e-6, 0.03), (1e-8, 1e-9)]
)
def test_rates_are_measured_whatever_clipping_and_epsilon_do(epsilon, clip_norm) -> None:
    measured = checked_rates(part(WIDE, epsilon=epsilon, clip_norm=clip_norm), SHAPES)
    assert measured["decoder"] == pytest.approx(1e-3, rel=1e-3)


def test_an_optimiser_with_other_rates_than_the_table_is_found() -> None:
    """Bug 2 of the project before: the optimiser of another stage went on."""
    wide = part(WIDE)
    for other in (
        replace(WIDE, encoder=Group(2e-3, trained_layers=1)),
        replace(WIDE, decoder=Group(1e-3, layer_decay=0.9)),
        TOP,
    ):
        with pytest.raises((AssertionError, ValueError)):
            checked_rates(replace(wide, optimizer=part(other).optimizer), SHAPES)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.none() | st.integers(1, 500))
def test_stages_share_the_steps_of_a_run(lengths, steps) -> None:
    if steps is not None and steps < len(lengths):
        with pytest.raises(UserError, match="too few"):
            last_steps(lengths, steps)
        return
    ends = last_steps(lengths, steps)
    assert ends[-1] == (sum(lengths) if steps is None else steps)
    assert all(np.diff([0, *ends]) >= 1)
    if steps is not None:
        exact = steps * np.cumsum(lengths) / sum(lengths)
        assert np.all(np.abs(np.array(ends) - exact) <= len(lengths))


def test_schedules_reach_to_the_next_stage_that_begins_one() -> None:
    stages = [Stage("a"), Stage("b"), Stage("c", new_schedule=True), Stage("d")]
    assert [schedule_steps(stages, [0, 10, 30, 60, 100], n) for n in range(4)] == [30, 30, 70, 70]


def test_sets_are_selected_with_their_clips() -> None:
    infos = tuple(
        SetInfo(name, count, None, name) for name, count in (("a", 2), ("b", 3), ("c", 1))
    )
    column = np.arange(6)
    table = select_sets(Table(infos, *[column] * 9), {"c": 0.25, "a": None})
    assert [(info.name, info.share) for info in table.sets] == [("a", None), ("c", 0.25)]
    assert table.key_C.tolist() == [0, 1, 5]
    assert [table.set_of(n) for n in range(3)] == [0, 0, 1]


# --- a run of two stages ---------------------------------------------------------------------

STAGES = """
        stages=(
            Stage(
                "top", steps=4, mix=(Mix("tones"),),
                conv_stem=Group(0.0), encoder=Group(0.0), embedding=Group(1e-3),
                projector=Group(4e-3), decoder=Group(2e-3, trained_layers=1),
            ),
            Stage(
                "wide", steps=5, mix=(Mix("others", 0.5), Mix("tones", 0.5)),
                conv_stem=Group(0.0), encoder=Group(3e-3, trained_layers=1),
                embedding=Group(1e-3), projector=Group(4e-3),
                decoder=Group(1e-3, trained_layers=2),
            ),
        ),
"""
STEP = "hebasr_jax.train.one_step"
EACH = (
    "train.checkpoint_steps=1",
    "data.buckets=1",
    "train.keep_last=20",
    "train.log_steps=1",
    "train.steps=None",
)
FLAT = ("optim.decay=none", "optim.weight_decay=0", "validation.every_steps=4")


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """A workspace whose config has two stages and two sets, and its uninterrupted run."""
    folder = make_workspace(tmp_path_factory.getbasetemp(), "stages")
    rows = read_rows(folder / "corpus" / "train.jsonl")
    write_rows(folder / "corpus" / "train.jsonl", rows[:40])
    write_rows(
        folder / "corpus" / "others.jsonl", [r | {"id": f"o-{r['id']}"} for r in rows[40:60]]
    )
    config = (folder / "config.py").read_text()
    line = next(line for line in config.splitlines() if "stages=" in line)
    sets = 'Source("tones", "corpus/train.jsonl"),'
    config = config.replace(line, STAGES).replace(
        sets, f'{sets} Source("others", "corpus/others.jsonl"),'
    )
    (folder / "config.py").write_text(config)
    told = train(folder, *settings("name=whole", *EACH, *FLAT))
    assert "stage top: steps 1 to 4, on tones" in told
    assert "stage wide: steps 5 to 9, on tones, others" in told
    assert "  encoder: layer 0 frozen, layer 1 0.003, measured 0.003" in told
    return folder


def test_after_the_switch_a_step_changes_every_tensor_that_is_trained_and_no_other(space) -> None:
    """Bugs 2 and 4: the second part never began, or began an epoch late."""
    run = space / "runs" / "whole"
    assert checkpoints(run) == list(range(1, 10))
    for step, encoder, decoder in ((3, [], [2]), (4, [1], [1, 2]), (8, [1], [1, 2])):
        before, after = (flat(load_trained(run / "checkpoints" / str(n))) for n in (step, step + 1))
        for path, leaf in after.items():
            group = look_up(GROUPS, path)
            changed = [n for n, x in enumerate(leaf) if np.any(x != before[path][n])]
            if "/layers/" in path:
                layers = {"encoder": encoder, "decoder": decoder}[group]
                assert changed == layers, (step, path)
            else:
                assert bool(changed) == (group != "conv_stem"), (step, path)


def test_rates_in_the_log_are_those_that_weights_moved_by(space) -> None:
    """Of tensors at their first update, which Adam moves by the rate itself."""
    run = space / "runs" / "whole"
    lines = {x["step"]: x for x in read_metrics(run / "metrics.jsonl") if x["kind"] == "train"}
    assert [lines[step]["stage"] for step in (1, 4, 5, 9)] == ["top", "top", "wide", "wide"]
    before, after = (flat(load_trained(run / "checkpoints" / str(n))) for n in (4, 5))
    path = "encoder/layers/query/kernel"
    moved = np.median(np.abs(after[path][1] - before[path][1]))
    assert lines[5]["rates"]["encoder"] == pytest.approx(3e-3 / 3)
    assert moved == pytest.approx(3e-3 / 3, rel=0.01)
    assert lines[4]["rates"]["encoder"] == 0.0
    assert lines[4]["rates"]["decoder"] == pytest.approx(2e-3)
    assert lines[5]["rates"]["decoder"] == pytest.approx(1e-3)  # no second warm-up
    assert lines[1]["rates"]["projector"] == pytest.approx(4e-3 / 3)


def test_stopped_in_each_stage_and_between_them_it_ends_as_the_whole_run(space) -> None:
    run, words = space / "runs" / "parts", settings("name=parts", *EACH[1:], *FLAT)
    whole = space / "runs" / "whole"
    for at, code in ((2, 75), (2, 75), (3, 75), (None, 0)):
        meddle = at and {"call": STEP, "at": at, "signal": "SIGTERM"}
        train(space, *words, code=code, meddle=meddle)
    assert losses(run) == losses(whole)
    assert validations(run) == validations(whole)
    assert same_bits(arrays(run, 9), arrays(whole, 9))
    assert [line["step"] for line in validations(run)] == [0, 4, 8, 9]
    plan = json.loads((run / "plan.json").read_text())
    assert [row["name"] for row in plan["sets of stage wide"]] == ["tones", "others"]


def test_a_mix_must_name_sets_that_there_are(space, capsys, monkeypatch) -> None:
    from hebasr_jax.cli import main

    monkeypatch.chdir(space)
    assert main(["train", "--config", "config.py", *settings("stages.1.mix.0.set=x")]) == 1
    assert "stage wide: its mix is of x, tones" in capsys.readouterr().err

"""Averages of checkpoints: who is in them, what they weigh, and that the best of all is taken."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

from hebasr_jax.average import Choice, average, compare, describe
from hebasr_jax.checkpoint import seal
from hebasr_jax.errors import UserError
from hebasr_jax.members import Member, best_members, member_weights
from hebasr_jax.paths import flat

TARGET = {"encoder": {"norm": {"scale": 0.5}}, "decoder": {"embed": {"embedding": -0.25}}}
SHAPES = {"encoder": {"norm": {"scale": (7,)}}, "decoder": {"embed": {"embedding": (5, 3)}}}


def tree(step: int, off: float = 0.1) -> dict:
    """Weights that miss TARGET by `off` in a random direction, the step's own."""
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda mean, shape: (mean + off * rng.standard_normal(shape)).astype(np.float32),
        TARGET,
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def load(member: Member) -> dict:
    """The fake checkpoint's weights; from step 900 on they are bad."""
    step = int(member.checkpoint.name)
    return tree(step, 5.0 if step >= 900 else 0.1)


def score(params: dict) -> dict:
    """Two dev sets; the errors are the distance to TARGET."""
    misses = {path: abs(leaf - flat(TARGET)[path]).mean() for path, leaf in flat(params).items()}
    wer = float(np.mean(list(misses.values())))
    common = {"ci95": (wer / 2, wer * 2), "cer": wer / 3, "clips": 9, "samples": ["long"]}
    return {
        "one": {"wer": wer, "loss": wer * 2, **common},
        "two": {"wer": wer / 2, "loss": float("nan"), **common},
    }


def make_run(folder: Path, rows: dict[int, tuple[float | None, float | None]], **fixed) -> Path:
    """A run folder with a sealed checkpoint for each step: (loss, wer)."""
    for step in rows:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "weights").write_text(f"{folder.name} {step}")
        seal(folder / "checkpoints" / str(step), {"step": step})
    table = {str(step): {"loss": loss, "wer": wer} for step, (loss, wer) in rows.items()}
    (folder / "best.json").write_text(json.dumps(table))
    fixed = {"model": {"a": [2, 3]}, "tokenizer": "t", **fixed}
    (folder / "env.json").write_text(json.dumps({"fixed": fixed}))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    figures = {200: (0.30, 0.12), 400: (0.25, 0.10), 600: (0.26, 0.09), 800: (0.27, 0.10)}
    return make_run(tmp_path / "a", {**figures, 1000: (0.2, None), 1200: (None, 0.11)})


def names(members: list[Member]) -> list[str]:
    return [member.name for member in members]


def silent(line: str) -> None:
    """Nothing is to be told, or it is of no matter."""


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert 1 <= len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def chosen(members, weights=None, **options) -> Choice:
    weights = weights or member_weights(members, "uniform")
    options = {"load": load, "score": score, "say": silent} | options
    choice = compare(members, weights, options.pop("load"), options.pop("score"), **options)
    assert choice is not None
    return choice


# The mean.


def test_the_mean_is_the_float64_mean_and_no_member() -> None:
    trees = [tree(step, 10.0 ** (step - 3)) for step in range(6)]
    weights = [0.05, 0.1, 0.15, 0.2, 0.2, 0.3]
    mean = flat(average(iter(trees), weights))
    for path, leaf in mean.items():
        exact = sum(
            w * flat(t)[path].astype(np.float64) for w, t in zip(weights, trees, strict=True)
        )
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, exact.astype(np.float32))
        for member in trees:
            assert not np.any(leaf == flat(member)[path])


def test_it_is_added_in_float64() -> None:
    """In float32 one would be lost beside 2^25 and its negative."""
    parts = [{"a": np.full(3, value, np.float32)} for value in (2.0**25, 1.0, -(2.0**25), 0.0)]
    np.testing.assert_array_equal(average(parts, [0.25] * 4)["a"], 0.25)


def test_the_order_of_members_is_nothing() -> None:
    trees, weights = [tree(1), tree(2), tree(3)], [0.5, 0.3, 0.2]
    mean, turned = average(trees, weights), average(trees[::-1], weights[::-1])
    for ours, theirs in zip(jax.tree.leaves(mean), jax.tree.leaves(turned), strict=True):
        np.testing.assert_array_almost_equal_nulp(ours, theirs, 1)


def test_one_member_is_in_memory_at_a_time() -> None:
    seen: list[weakref.ref] = []

    def read(step: int) -> dict:
        gc.collect()
        assert not [ref for ref in seen if ref() is not None], "the tree before is still held"
        made = tree(step)
        seen.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(made))
        return made

    average(map(read, range(3)), [1 / 3] * 3)
    assert len(seen) == 6


def test_what_is_no_mean_is_refused() -> None:
    good = tree(1)
    unlike = {**good, "decoder": {"embed": {"embedding": np.zeros((5, 4), np.float32)}}}
    assert "(5, 3) -> " in refused(lambda: average([good, unlike], [0.5, 0.5])).replace('"', "")
    lacking = {"encoder": good["encoder"]}
    assert "decoder/embed/embedding" in refused(lambda: average([lacking, good], [0.5, 0.5]))
    whole = {**good, "decoder": {"embed": {"embedding": np.zeros((5, 3), np.int32)}}}
    assert "holds int32" in refused(lambda: average([good, whole], [0.5, 0.5]))
    ill = tree(2)
    ill["encoder"]["norm"]["scale"][3] = np.nan
    told = refused(lambda: average([good, ill], [0.5, 0.5]))
    assert told.startswith("member 2 of 2")
    assert "encoder/norm/scale holds NaN" in told
    assert "sum to 0.9" in refused(lambda: average([good, good], [0.5, 0.4]))


# Members.


def test_the_best_come_first_by_the_figure_asked_for(run) -> None:
    assert names(best_members([run], 3, "wer", say=silent)) == ["step 600", "step 400", "step 800"]
    assert names(best_members([run], 2, "loss", say=silent)) == ["step 1000", "step 400"]
    (member,) = best_members([run], 1, "wer", say=silent)
    assert (member.loss, member.wer) == (0.26, 0.09)
    assert member.checkpoint == run / "checkpoints" / "600"


def test_of_equals_the_later_step_is_first(tmp_path) -> None:
    run = make_run(tmp_path / "a", dict.fromkeys((200, 1000, 400), (0.3, 0.1)))
    assert names(best_members([run], 2, "wer", say=silent)) == ["step 1000", "step 400"]


def test_what_was_validated_but_not_kept_is_no_member(run) -> None:
    shutil.rmtree(run / "checkpoints" / "600")
    (run / "checkpoints" / "900.partial").mkdir()
    told: list[str] = []
    assert len(best_members([run], 9, "wer", say=told.append)) == 4
    assert told == ["4 checkpoints instead of 9: no more are whole and validated"]


def test_a_damaged_checkpoint_is_passed_over_and_told(run) -> None:
    (run / "checkpoints" / "600" / "weights").write_text("a 601")
    told: list[str] = []
    assert names(best_members([run], 2, "wer", say=told.append)) == ["step 400", "step 800"]
    (line,) = told
    assert "600 is damaged and passed over: weights is not as it was saved" in line
    named = run / "checkpoints" / "600"
    assert "is damaged" in refused(lambda: best_members([named], 2, "wer", say=silent))


def test_several_runs_are_one_pool(run, tmp_path) -> None:
    other = make_run(tmp_path / "b", {300: (0.1, 0.095), 400: (0.9, 0.5)})
    best = [f"{run} step 600", f"{other} step 300", f"{run} step 400"]
    for order in ([run, other], [other, run], [other, run, other]):
        assert names(best_members(order, 3, "wer", say=silent)) == best


def test_a_named_checkpoint_is_a_member_as_it_is(run, tmp_path) -> None:
    named = run / "checkpoints" / "200"
    found = best_members([named, named, run], 2, "wer", say=silent)
    assert names(found) == ["step 200", "step 600", "step 400"]
    found = best_members([run / "checkpoints" / "600", run], 1, "wer", say=silent)
    assert names(found) == ["step 600", "step 400"]
    other = make_run(tmp_path / "b", {300: (None, None)})
    found = best_members([other / "checkpoints" / "300", run], 1, "wer", say=silent)
    assert names(found) == [f"{other} step 300", f"{run} step 600"]
    assert found[0].wer is None


def test_runs_that_cannot_be_averaged_are_refused(run, tmp_path) -> None:
    fault = lambda *paths, best=3: refused(  # noqa: E731
        lambda: best_members(list(paths), best, "wer", say=silent)
    )
    sizes = make_run(tmp_path / "sizes", {1: (1.0, 1.0)}, model={"a": [2, 4]})
    assert "different models: a: [2, 3] -> [2, 4]" in fault(run, sizes)
    words = make_run(tmp_path / "words", {1: (1.0, 1.0)}, tokenizer="u")
    assert "the tokenizers differ" in fault(run, words / "checkpoints" / "1")
    unrated = make_run(tmp_path / "unrated", {1: (1.0, None)})
    assert "has a dev wer in best.json" in fault(unrated)
    assert "neither a run folder nor a checkpoint" in fault(tmp_path / "none")
    assert "at least 1" in fault(run, best=0)


def test_runs_scored_on_other_data_are_not_ranked_together(run, tmp_path) -> None:
    other = make_run(tmp_path / "b", {300: (0.1, 0.095)})
    for folder, kind, most in ((run, "x", 500), (other, "y", 100)):
        table = json.loads((folder / "best.json").read_text())
        rows = {step: row | {"scored_on": kind} for step, row in table.items()}
        (folder / "best.json").write_text(json.dumps(rows))
        config = {"validation.max_clips": {"value": most}}
        (folder / "config.json").write_text(json.dumps(config))
    told = refused(lambda: best_members([run, other], 2, "wer", say=silent))
    assert "their dev data differ: validation.max_clips: 500 -> 100" in told
    (other / "best.json").write_text((other / "best.json").read_text().replace('"y"', '"x"'))
    assert len(best_members([run, other], 2, "wer", say=silent)) == 2


# Weights.


def test_weights_of_each_kind() -> None:
    members = [Member(f"step {n}", Path(str(n)), 0.30 + 0.01 * n, 0.1) for n in range(3)]
    assert member_weights(members, "uniform") == [1 / 3] * 3
    soft = member_weights(members, "softmax")
    np.testing.assert_allclose(soft, np.exp([0, -1, -2]) / np.exp([0, -1, -2]).sum(), rtol=1e-9)
    flatter = member_weights(members, "softmax", 0.02)
    assert flatter[0] / flatter[1] == pytest.approx(np.exp(0.5))
    far = [*members, Member("step 9", Path("9"), 1e6, 0.1)]
    assert member_weights(far, "softmax") == [*soft, 0.0]
    assert member_weights(members, [0.5, 0.3, 0.2]) == [0.5, 0.3, 0.2]


def test_weights_that_do_not_suit_are_refused() -> None:
    members = [Member(f"step {n}", Path(str(n)), 0.3) for n in range(3)]
    fault = lambda *how: refused(lambda: member_weights(members, *how))  # noqa: E731
    assert "2 weights for 3 checkpoints" in fault([0.5, 0.5])
    assert "step 0, step 1, step 2" in fault([0.5, 0.5])
    told = fault([3.0, 2.0, 2.0])
    assert "sum to 7, not 1" in told
    do = [float(part) for part in told.splitlines()[-1].removeprefix("give ").split(",")]
    np.testing.assert_allclose(member_weights(members, do), np.array([3, 2, 2]) / 7, atol=1e-4)
    for bad in ([1.5, -0.5, 0.0], [0.5, 0.5, 0.0], [float("nan"), 0.5, 0.5]):
        assert "share above 0" in fault(bad)
    assert "temperature" in fault("softmax", 0.0)
    members.append(Member("step 7", Path("7")))
    assert "step 7 has no dev loss" in fault("softmax")


# Candidates.


def members_of(run: Path, *steps: int) -> list[Member]:
    return [Member(f"step {step}", run / "checkpoints" / str(step)) for step in steps]


def test_the_mean_of_good_members_beats_them_and_is_chosen(run) -> None:
    told: list[str] = []
    choice = chosen(members_of(run, 200, 400, 600), say=told.append)
    assert choice.name == "average of steps 200, 400 and 600"
    assert choice.weights == {f"step {step}": 1 / 3 for step in (200, 400, 600)}
    mean = average(map(tree, (200, 400, 600)), [1 / 3] * 3)
    jax.tree.map(np.testing.assert_array_equal, choice.params, mean)
    scores = score(mean)
    assert choice.scores["one"]["wer"] == scores["one"]["wer"]
    assert choice.scores["two"]["loss"] is None  # as JSON has it
    assert [row["name"] for row in choice.table] == [
        choice.name,
        "step 200",
        "step 400",
        "step 600",
    ]
    for row, params in zip(choice.table, (mean, *map(tree, (200, 400, 600))), strict=True):
        found = score(params)
        assert row["wer"] == pytest.approx((found["one"]["wer"] + found["two"]["wer"]) / 2)
        assert row["sets"]["one"]["ci95"] == list(found["one"]["ci95"])
        assert "samples" not in row["sets"]["one"]
    assert [line.split(":")[0] for line in told] == [row["name"] for row in choice.table]


def test_a_member_is_chosen_where_it_is_the_best(run) -> None:
    choice = chosen(members_of(run, 200, 400), [0.01, 0.99])
    better = chosen(members_of(run, 900, 400))
    assert better.name == "step 400"
    assert better.weights == {"step 400": 1.0}
    jax.tree.map(np.testing.assert_array_equal, better.params, tree(400))
    assert choice.table[0]["weights"] == {"step 200": 0.01, "step 400": 0.99}


def test_wer_counts_before_loss_and_the_mean_wins_a_tie(run) -> None:
    def fixed(*pairs):
        rows = iter(
            {"dev": {"wer": w, "loss": x, "ci95": (0.0, 1.0), "cer": 0.0, "clips": 1}}
            for w, x in pairs
        )
        return chosen(members_of(run, 200, 400), score=lambda params: next(rows)).name

    assert fixed((0.2, 0.1), (0.1, 0.9), (0.3, 0.1)) == "step 200"
    assert fixed((0.1, 0.2), (0.1, 0.9), (0.1, 0.1)) == "step 400"
    assert fixed((0.1, 0.2), (0.1, 0.2), (0.1, 0.2)) == "average of steps 200 and 400"
    assert fixed((float("nan"), 0.2), (0.9, 0.2), (float("nan"), 0.2)) == "step 200"


def test_one_member_is_scored_once_and_is_no_average(run) -> None:
    choice = chosen(members_of(run, 400))
    assert (choice.name, len(choice.table)) == ("step 400", 1)


def test_soup_leaves_a_bad_member_out_and_keeps_the_good(run) -> None:
    members = members_of(run, 1000, 200, 400, 1200, 600)
    plain = chosen(members)
    choice = chosen(members, soup=True)
    assert plain.table == choice.table[: len(plain.table)]
    assert choice.name.startswith("soup of ")
    assert set(choice.weights) == {"step 200", "step 400", "step 600"}
    assert set(choice.weights.values()) == {1 / 3}
    tried = [row["weights"].keys() for row in choice.table[len(plain.table) :]]
    good = {"step 200", "step 400", "step 600"}
    assert [len(keys) for keys in tried] == [2, 3, 4, 4]
    assert [keys - good for keys in tried[2:]] in (
        [{"step 1000"}, {"step 1200"}],
        [{"step 1200"}, {"step 1000"}],
    )
    mean = average(map(tree, (200, 400, 600)), [1 / 3] * 3)
    for ours, theirs in zip(*map(jax.tree.leaves, (choice.params, mean)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)


def test_in_a_soup_a_member_that_changes_nothing_stays(run) -> None:
    same = {"dev": {"wer": 0.1, "loss": 0.1, "ci95": (0.0, 1.0), "cer": 0.0, "clips": 1}}
    choice = chosen(members_of(run, 200, 400, 600, 800), soup=True, score=lambda params: same)
    assert [len(row["weights"]) for row in choice.table] == [4, 1, 1, 1, 1, 2, 3]


def test_a_signal_ends_it(run) -> None:
    members = members_of(run, 200, 400)
    weights = member_weights(members, "uniform")
    assert compare(members, weights, load, lambda params: None, say=silent) is None


def test_scores_are_kept_and_not_made_twice(run, tmp_path) -> None:
    calls: list[dict] = []

    def counted(params: dict) -> dict | None:
        calls.append(params)
        return score(params) if len(calls) != 3 else None

    def once(members, weights=None, key="dev 1", **options) -> int:
        calls.append({})  # so that only the very third call stops
        before = len(calls)
        chosen(members, weights, score=counted, kept=tmp_path / "kept", key=key, **options)
        return len(calls) - before

    members = members_of(run, 200, 400, 600)
    halves = member_weights(members, "uniform")
    options = {"kept": tmp_path / "kept", "key": "dev 1", "say": silent}
    assert compare(members, halves, load, counted, **options) is None
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert once(members) == 2  # the two that had no scores
    assert once(members) == 0
    assert once(members[::-1]) == 0
    assert once(members, [0.5, 0.3, 0.2]) == 1
    assert once(members, key="dev 2") == 4
    again, anew = chosen(members, **options), chosen(members)
    assert again.table == anew.table
    assert again.scores == anew.scores
    jax.tree.map(np.testing.assert_array_equal, again.params, anew.params)
    (run / "checkpoints" / "600" / "weights").write_text("trained on")
    seal(run / "checkpoints" / "600", {"step": 600})
    assert once(members) == 2  # the member and the mean


def test_a_line_tells_the_interval_of_every_set() -> None:
    common = {"ci95": (0.05, 0.2), "cer": 0.03, "clips": 96}
    one = {"dev": {"wer": 0.1234, **common}}
    assert describe("x", one) == "x: WER 12.3 % [5.0, 20.0], CER 3.0 %, 96 clips"
    two = {**one, "b": {"wer": None, **common, "ci95": (None, None)}}
    assert describe("x", two).startswith("x: mean WER ? %; dev: WER 12.3 % [5.0, 20.0], ")
    assert "b: WER ? % [?, ?]" in describe("x", two)

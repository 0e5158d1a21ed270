"""The epoch plan: every clip once, in a row and a bucket that hold it, whoever asks."""

import dataclasses
import functools
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.draws import (
    SetInfo,
    Table,
    clip_key,
    compose_rows,
    draws_per_set,
    row_words,
    uniform,
)
from hebasr_jax.data.plan import (
    audio_tokens,
    choose_buckets,
    plan_epoch,
    plan_fingerprint,
    plan_table,
)
from hebasr_jax.errors import UserError
from hebasr_jax.model import encoder
from hebasr_jax.run_config import Augment, Data

SPEEDS = Augment(speed_factors=(0.9, 1.0, 1.1))
PROMPT = 20


def make_table(sets, seed: int = 0, language=None) -> Table:
    """A table from {set name: (durations in seconds, share)}."""
    rng = np.random.default_rng(seed)
    infos = [SetInfo(name, len(lengths), share, name) for name, (lengths, share) in sets.items()]
    duration_C = np.concatenate([np.asarray(lengths, float) for lengths, _ in sets.values()])
    text_C = np.round(5 * duration_C).astype(np.int64)
    keys = [clip_key(info.name, str(i)) for info in infos for i in range(info.clips)]
    return Table(
        tuple(infos),
        clip_C=np.concatenate([np.arange(info.clips) for info in infos]),
        key_C=np.array(keys, np.uint64),
        samples_C=np.round(duration_C * SAMPLE_RATE).astype(np.int64),
        tokens_C=PROMPT + 4 + text_C,
        added_tokens_C=text_C,
        recording_C=rng.integers(-1, 4, len(keys)),
        language_C=rng.integers(0, 2, len(keys)) if language is None else np.full(len(keys), 0),
        timed_C=np.zeros(len(keys), np.int8),
        context_C=np.zeros(len(keys), np.int8),
    )


@functools.cache
def ivrit_mix(clips: int = 20_000) -> Table:
    """The seeded length mix of the design, section 5."""
    rng = np.random.default_rng(0)
    short = rng.random(clips) < 0.7
    podcast = np.clip(rng.lognormal(np.log(3.9), 0.65, clips), 0.6, 20.0)
    slices = np.clip(30.0 - rng.exponential(4.0, clips), 8.0, 30.0)
    return make_table({"mix": (np.where(short, podcast, slices), None)}, language=0)


lengths = st.lists(st.floats(0.3, 30.0), min_size=1, max_size=60)
tables = st.builds(
    make_table,
    st.dictionaries(st.sampled_from("abc"), st.tuples(lengths, st.none()), min_size=1),
    seed=st.integers(0, 9),
)
datas = st.builds(
    Data,
    batch_clips=st.integers(1, 12),
    buckets=st.integers(1, 6),
    join_share=st.sampled_from([0.0, 0.5, 1.0]),
    join_gap_s=st.sampled_from([0.0, 0.3]),
)


@settings(max_examples=60)
@given(tables, datas, st.integers(0, 3), st.integers(0, 5))
def test_every_clip_once_in_a_row_that_holds_it(table, data, seed, epoch) -> None:
    buckets = choose_buckets(table, data, SPEEDS, seed)
    assert 1 <= len(buckets) <= data.buckets
    plan = plan_epoch(table, buckets, data, SPEEDS, seed, epoch)
    drawn = []
    for number in range(len(plan)):
        bucket, batch = plan.bucket(number), plan.batch(number)
        assert bucket.rows == data.batch_clips
        assert bucket.positions % 2 == 0
        for row in batch:
            drawn += row.clips
            clips = list(row.clips)
            gaps = round(data.join_gap_s * SAMPLE_RATE) * (len(clips) - 1)
            samples = int((table.samples_C[clips].sum() + gaps) / row.speed)
            tokens = table.tokens_C[clips[0]] + table.added_tokens_C[clips[1:]].sum()
            assert row.speed in SPEEDS.speed_factors
            assert samples <= bucket.audio_s * SAMPLE_RATE
            assert tokens <= bucket.text_tokens
            assert len({table.set_of(clip) for clip in clips}) == 1
            assert len(set(table.language_C[clips])) == 1
    assert sorted(drawn) == list(range(len(table.clip_C)))
    partial = [n for n in range(len(plan)) if len(plan.batch(n)) < plan.bucket(n).rows]
    assert len(partial) <= 1
    assert all(plan.bucket(number) == buckets[-1] for number in partial)


def test_a_clip_of_twenty_minutes_among_short_ones_does_not_hold_up_the_shapes() -> None:
    """It did, for half a minute: every pair of 1,200 seconds was tried."""
    lengths = [*np.random.default_rng(0).uniform(1.0, 30.0, 400).tolist(), 1200.0]
    table = make_table({"long": (lengths, None)})
    start = time.process_time()
    buckets = choose_buckets(table, Data(batch_clips=8, buckets=4), Augment(), 0)
    assert time.process_time() - start < 3
    assert [b.audio_s for b in buckets][-1] == 1200
    assert buckets[-2].audio_s <= 30


def listed(plan) -> list:
    return [(plan.bucket(number), plan.batch(number)) for number in range(len(plan))]


def test_the_plan_follows_from_seed_and_epoch_alone() -> None:
    table, data = ivrit_mix(2000), Data(batch_clips=16, join_share=0.5)
    buckets = choose_buckets(table, data, SPEEDS, 0)
    plan = functools.partial(plan_epoch, table, buckets, data, SPEEDS)
    # A number from the plan itself: another process, with another hash seed, finds the same.
    assert plan(7, 3).rows.clips_C[:4].tolist() == GOLDEN_CLIPS
    assert listed(plan(7, 3)) == listed(plan(7, 3))
    assert listed(plan(7, 3)) != listed(plan(7, 4))
    assert listed(plan(7, 3)) != listed(plan(8, 3))
    first, second = plan(7, 0).rows, plan(7, 1).rows
    speeds = [dict(zip(r.clips_C[r.first_R[:-1]], r.speed_R, strict=True)) for r in (first, second)]
    assert {speeds[0][clip] == speeds[1].get(clip) for clip in speeds[0]} == {True, False}


GOLDEN_CLIPS = [1965, 631, 642, 718]


def test_rows_and_batches_are_shuffled() -> None:
    plan = plan_of(ivrit_mix(5000), Data(batch_clips=16))
    buckets = plan.bucket_N
    assert (np.diff(buckets) != 0).mean() > 0.5
    heads = np.concatenate([[row.clips[0] for row in plan.batch(n)] for n in range(len(plan))])
    assert abs(np.corrcoef(heads, np.arange(len(heads)))[0, 1]) < 0.05


def plan_of(table, data, augment=Augment(), seed=0, epoch=0):  # noqa: B008  (frozen)
    return plan_epoch(table, choose_buckets(table, data, augment, seed), data, augment, seed, epoch)


def test_speed_factors_are_drawn_with_equal_chance() -> None:
    speeds = plan_of(ivrit_mix(6000), Data(), SPEEDS).rows.speed_R
    assert [np.mean(speeds == factor) for factor in SPEEDS.speed_factors] == pytest.approx(
        [1 / 3] * 3, abs=0.02
    )


def test_without_joining_a_row_is_a_clip() -> None:
    plan = plan_of(ivrit_mix(1000), Data(join_share=0.0))
    assert (np.diff(plan.rows.first_R) == 1).all()


def test_the_joined_share_and_neighbours() -> None:
    """Half of the short clips are joined, with clips of their recording unless it is used up."""
    table = make_table({"a": (np.full(4000, 2.0), None)}, language=0)
    table = dataclasses.replace(table, recording_C=np.arange(4000) // 400)
    rows = compose_rows(table, Data(join_share=0.5, max_clip_s=30.0), Augment(), 0, 0)
    assert (np.diff(rows.first_R) == 1).all()  # two do not fit into the longest clip's length
    table.samples_C[0], table.tokens_C[0] = 30 * SAMPLE_RATE, 174
    rows = compose_rows(table, Data(join_share=0.5), Augment(), 0, 0)
    clips = np.diff(rows.first_R)
    assert clips[clips > 1].sum() == pytest.approx(2000, abs=150)
    joined = [rows.clips_C[a : a + n] for a, n in zip(rows.first_R, clips, strict=False) if n > 1]
    assert all((np.diff(row) != 0).all() for row in joined)
    mixed = [row for row in joined if len(set(table.recording_C[row])) > 1]
    assert len(mixed) <= 9  # at most one row at each border of ten recordings
    one = [row for row in joined if len(set(table.recording_C[row])) == 1]
    assert all((np.diff(row) > 0).all() and np.ptp(row) < 80 for row in one)


def shares(*sets: tuple[int, float | None]) -> list[SetInfo]:
    return [SetInfo(str(n), clips, share, "") for n, (clips, share) in enumerate(sets)]


def test_shares_and_their_cap() -> None:
    four, nine = Data(max_repeats=4.0), Data(max_repeats=9.0)
    assert draws_per_set(shares((90, None), (10, None)), four) == [90, 10]
    assert draws_per_set(shares((900, 0.5), (100, 0.5)), four) == [500, 400]  # capped
    assert draws_per_set(shares((900, 0.2), (100, 0.2)), nine) == [500, 500]  # relative to the sum
    assert draws_per_set(shares((800, None), (100, 0.4), (100, None)), nine) == [533, 400, 67]
    assert draws_per_set(shares((10**6, 0.9), (3, 1e-9)), four) == [10**6 + 3, 1]


def test_temperature_flattens_what_has_no_share() -> None:
    sets = shares((8000, None), (1000, None), (1000, 0.1))
    told = {
        t: draws_per_set(sets, Data(temperature=t, max_repeats=9.0)) for t in (None, 1.0, 3.0, 1e9)
    }
    assert told[None] == told[1.0] == [8000, 1000, 1000]
    assert told[3.0] == [6000, 3000, 1000]  # 2 : 1, as the cube roots of 8 : 1
    assert told[1e9] == [4500, 4500, 1000]
    capped = draws_per_set(sets, Data(temperature=3.0, max_repeats=2.0))
    assert capped == [6000, 2000, 1000]
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="temperature"):
            draws_per_set(sets, Data(temperature=bad))


def test_an_epoch_until_all_sets_are_exhausted() -> None:
    """ivrit.ai's second phase: 288 thousand draws, in which the slowest set is drawn once."""
    sets = shares((203_800, 0.9), (6_900, 0.025), (21_600, 0.075))
    assert draws_per_set(sets, Data(exhaust=True)) == [259_200, 7_200, 21_600]
    assert draws_per_set(sets, Data(exhaust=True, max_repeats=1.25))[0] == 254_750
    unshared = shares((900, None), (100, None))
    assert draws_per_set(unshared, Data(exhaust=True)) == [900, 100]


@pytest.mark.parametrize(
    "sets",
    [
        shares((10, 0.7), (10, 0.7)),
        shares((10, 1.0), (10, None)),
        shares((10, -0.1), (10, None)),
        shares((10, float("nan")), (10, None)),
    ],
)
def test_shares_that_cannot_be_met(sets) -> None:
    with pytest.raises(UserError, match=r"shares|drawn"):
        draws_per_set(sets, Data())


@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 9))
def test_all_clips_are_covered_evenly_over_epochs(clips, draws, epochs) -> None:
    """After any number of epochs no clip was drawn twice more than another."""
    total = max(draws, 2)
    table = make_table({"a": (np.ones(clips), draws / (2 * total))}, language=0)
    big = make_table({"b": (np.ones(7), None)}, language=0)
    table = concatenated(table, big)
    seen, visits = np.zeros(clips + 7, int), []
    for epoch in range(epochs):
        rows = compose_rows(table, Data(max_repeats=1e9), Augment(), 0, epoch)
        np.add.at(seen, rows.clips_C, 1)
        visits += zip(rows.clips_C.tolist(), rows.visit_R.tolist(), strict=True)
    assert np.ptp(seen[:clips]) <= 1
    assert np.ptp(seen[clips:]) <= 1
    assert len(set(visits)) == len(visits)  # a clip's second visit is told from its first


def concatenated(one: Table, two: Table) -> Table:
    names = [field.name for field in dataclasses.fields(Table)][1:]
    columns = [np.concatenate([getattr(one, n), getattr(two, n)]) for n in names]
    return Table(one.sets + two.sets, *columns)


def test_rows_from_a_budget_of_seconds() -> None:
    data = Data(batch_clips=None, batch_audio_s=480.0)
    buckets = choose_buckets(ivrit_mix(), data, Augment(), 0, row_multiple=8)
    for bucket in buckets:
        assert bucket.rows % 8 == 0
        assert bucket.rows == max(8, 480 // bucket.audio_s // 8 * 8)
    tight = dataclasses.replace(data, batch_audio_s=31.0)
    assert {bucket.rows for bucket in choose_buckets(ivrit_mix(), tight, Augment(), 0)} == {
        8,
    }


def test_few_rows_with_much_text_do_not_widen_every_bucket() -> None:
    table = make_table({"a": (np.full(5000, 9.5), None)}, language=0)
    table.tokens_C[:5] = 400
    buckets = choose_buckets(table, Data(buckets=4), Augment(), 0)
    assert [bucket.text_tokens for bucket in buckets] == [72, 400]
    assert [bucket.audio_s for bucket in buckets] == [10, 10]


def test_no_more_buckets_than_batches() -> None:
    table = make_table({"a": (np.linspace(1, 30, 40), None)}, language=0)
    assert len(choose_buckets(table, Data(buckets=6, batch_clips=64), Augment(), 0)) == 1
    with pytest.raises(UserError, match="buckets"):
        choose_buckets(table, Data(buckets=0), Augment(), 0)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(1, 3))
def test_no_choice_of_whole_seconds_is_better(seconds, count) -> None:
    """Dynamic programming against all choices; texts that hide nothing."""
    from itertools import combinations

    table = make_table({"a": (seconds, None)}, language=0)
    table.tokens_C[:] = 2
    data = Data(buckets=count, batch_clips=1)
    found = choose_buckets(table, data, Augment(), 0)

    def cost(ends) -> int:
        return sum(min(end for end in ends if end >= second) for second in seconds)

    choices = combinations(range(1, max(seconds)), min(count - 1, max(seconds) - 1))
    best = min(cost([*choice, max(seconds)]) for choice in choices)
    by_parity = 2 * len(seconds)  # columns that make position counts even may cost this many
    assert 13 * cost([bucket.audio_s for bucket in found]) <= 13 * best + by_parity


@pytest.mark.parametrize(("buckets", "join_share", "most"), [(12, 0.0, 0.10), (6, 1.0, 0.06)])
def test_padding_on_the_ivrit_mix(buckets, join_share, most) -> None:
    """Gaps between joined clips and empty rows count as padding."""
    table, data = ivrit_mix(), Data(buckets=buckets, join_share=join_share)
    plan = plan_of(table, data)
    *each, total = plan_table(table, plan, data)["buckets"]
    assert 0.0 < total["encoder_padding"] <= most
    assert 0.0 < total["decoder_padding"] <= most
    assert total["clips"] == len(table.clip_C) == sum(row["clips"] for row in each)
    assert total["steps"] == len(plan)
    assert total["hours"] == pytest.approx(table.samples_C.sum() / SAMPLE_RATE / 3600)


def test_hours_and_epochs_of_each_set() -> None:
    table = make_table({"a": (np.full(30, 6.0), 0.25), "b": (np.full(30, 2.0), 0.75)}, language=0)
    data = Data(batch_clips=4)
    told = plan_table(table, plan_of(table, data), data)
    assert [row["draws"] for row in told["sets"]] == [15, 45]
    assert [row["share"] for row in told["sets"]] == [0.25, 0.75]
    assert [row["effective_epochs"] for row in told["sets"]] == [0.5, 1.5]
    hours = [row["hours"] for row in told["sets"]]
    assert hours == [pytest.approx(15 * 6 / 3600), pytest.approx(45 * 2 / 3600)]
    assert sum(hours) == pytest.approx(told["buckets"][-1]["hours"])


def test_the_padding_of_a_plan_done_by_hand() -> None:
    table = make_table({"a": ([1.0, 2.0, 2.5, 4.0], None)}, language=0)
    data = Data(batch_clips=3, buckets=1)
    told = plan_table(table, plan_of(table, data), data)
    frames = (100 + 200 + 250 + 400) / (6 * 400)
    text = sum(24 + n for n in (5, 10, 12, 20))
    positions = (13 + 26 + 26 + 7 + 52 + text) / (6 * (52 + 44))
    assert told["buckets"][-1]["encoder_padding"] == pytest.approx(1 - frames)
    assert told["buckets"][-1]["decoder_padding"] == pytest.approx(1 - positions)
    counts = {"clips": 4, "draws": 4, "share": 1.0, "effective_epochs": 1.0}
    assert told["sets"] == [{"name": "a"} | counts | {"hours": pytest.approx(9.5 / 3600)}]


def test_the_fingerprint_changes_with_whatever_changes_the_plan() -> None:
    table, data = make_table({"a": ([1.0, 2.0], 0.5), "b": ([3.0], None)}), Data(batch_clips=2)
    buckets = choose_buckets(table, data, SPEEDS, 0)
    changed = [
        (table, buckets, data, SPEEDS, 0),
        (table, buckets, data, SPEEDS, 1),
        (table, buckets, data, Augment(), 0),
        (table, buckets, dataclasses.replace(data, join_share=0.1), SPEEDS, 0),
        (table, buckets, dataclasses.replace(data, max_repeats=2.0), SPEEDS, 0),
        (table, buckets, dataclasses.replace(data, temperature=2.0), SPEEDS, 0),
        (table, buckets, dataclasses.replace(data, exhaust=True), SPEEDS, 0),
        (table, (dataclasses.replace(buckets[0], rows=1), *buckets[1:]), data, SPEEDS, 0),
    ]
    for name in [field.name for field in dataclasses.fields(Table)][1:]:
        column = getattr(table, name) + np.ones((), getattr(table, name).dtype)
        changed.append((dataclasses.replace(table, **{name: column}), buckets, data, SPEEDS, 0))
    infos = (table.sets[0]._replace(fingerprint="other"), table.sets[1])
    changed.append((dataclasses.replace(table, sets=infos), buckets, data, SPEEDS, 0))
    prints = [plan_fingerprint(*arguments) for arguments in changed]
    assert len(set(prints)) == len(prints) == len({*prints, plan_fingerprint(*changed[0])})


def test_words_and_numbers_of_a_clip() -> None:
    words = [row_words(*which) for which in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]]
    assert len({tuple(pair) for pair in words}) == 4
    assert words[0].dtype == np.uint32
    assert row_words(0, 0, "a").tolist() == GOLDEN_WORDS
    numbers = uniform(np.arange(100_000, dtype=np.uint64), 3, 0, "what")
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx([10_000] * 10, rel=0.04)
    other = uniform(np.arange(100_000, dtype=np.uint64), 4, 0, "what")
    assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.02


GOLDEN_WORDS = [2546023930, 1575798040]


def test_audio_tokens_are_those_of_the_encoder() -> None:
    frames = np.arange(0, 3500)
    assert (audio_tokens(frames) == np.asarray(encoder.audio_tokens(jnp.asarray(frames)))).all()

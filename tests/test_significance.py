"""Paired tests: MAPSSWE against NIST's sctk, the bootstrap against kaldialign, and properties."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hebasr_jax.metrics import align_words, bootstrap_interval, word_errors
from hebasr_jax.significance import compare, matched_pairs, segment_errors
from tests import significance_peers as peers

GOLDEN = json.loads((Path(__file__).parent / "golden_significance.json").read_text())
ONCE = {"resamples": 50, "seed": 0}
WORDS = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)


@pytest.mark.parametrize(("of_set", "row"), [(s, i) for i, s in enumerate(peers.SETS)])
def test_mapsswe_is_that_of_sctk(of_set, row) -> None:
    found = compare(*peers.systems(*of_set), None, **ONCE)
    theirs, realigned = GOLDEN["sc_stats"][row], GOLDEN["sclite"][row]
    assert found["mapsswe_segments"] == theirs["segments"]
    assert found["mapsswe_z"] == pytest.approx(theirs["z"], abs=0.00051)
    # sclite weighs a substitution less than a deletion and an insertion: other segments.
    assert found["mapsswe_segments"] == pytest.approx(realigned["segments"], rel=0.01)
    assert found["mapsswe_z"] == pytest.approx(realigned["z"], abs=0.05)


@pytest.mark.sctk
def test_sctk_still_says_so() -> None:
    assert peers.sctk_figures(peers.our_alignments) == GOLDEN["sc_stats"]
    assert peers.sctk_figures(peers.sclite_alignments) == GOLDEN["sclite"]


@pytest.mark.parametrize(("of_set", "row"), [(s, i) for i, s in enumerate(peers.SETS)])
def test_the_bootstrap_is_that_of_kaldialign(of_set, row) -> None:
    """Its bounds are 1.96 deviations about the mean of the draws, ours are quantiles."""
    references, *sides = peers.systems(*of_set)
    theirs = GOLDEN["kaldialign"][row]
    for number, side in enumerate(sides, start=1):
        counts = word_errors(references, side)
        ours = bootstrap_interval(counts.errors_N, counts.length_N, resamples=10_000, seed=0)
        bounds = theirs[f"min_{number}"], theirs[f"max_{number}"]
        assert ours == pytest.approx(bounds, abs=0.08 * (bounds[1] - bounds[0]))
    found = compare(references, *sides, None, resamples=10_000, seed=0)
    # It counts a draw without a difference as no improvement, we as half of one.
    assert found["p_worse"] == pytest.approx(theirs["second_better"], abs=0.03)


@pytest.mark.kaldialign
def test_kaldialign_still_says_so() -> None:
    assert peers.kaldialign_figures() == GOLDEN["kaldialign"]


@pytest.mark.parametrize(
    ("reference", "first", "second", "segments"),
    [
        ("a b c d", "a b c d", "a b c d", []),
        ("a b c d", "x b c d", "a b c d", [(1, 0)]),
        ("a b c d e", "x b c d y", "a b c d e", [(1, 0), (1, 0)]),
        ("a b c d", "x b c d", "a b c x", [(1, 0), (0, 1)]),
        ("a b c", "x b c", "a b x", [(1, 1)]),  # one right word parts nothing
        ("a b c d", "x b z c d", "a b c d", [(2, 0)]),  # nor do two with a word between
        ("a b c d", "a b c d x y", "a b c d z", [(2, 1)]),
        ("a b c d", "a b c d", "a b c d z", [(0, 1)]),
        ("", "x", "", [(1, 0)]),
        ("a b c", "", "a b c", [(3, 0)]),
    ],
)
def test_segments_are_parted_by_two_words_right_in_both(reference, first, second, segments) -> None:
    found = segment_errors(align_words(reference, first), align_words(reference, second))
    assert [tuple(row) for row in found.tolist()] == segments


@settings(max_examples=100)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), max_size=6))
def test_segments_hold_every_error_and_sides_are_alike(rows) -> None:
    references, first, second = ([row[side] for row in rows] for side in range(3))
    for row in rows:
        found = segment_errors(*(align_words(row[0], side) for side in row[1:]))
        errors = [int(word_errors([row[0]], [side]).errors_N[0]) for side in row[1:]]
        assert found.sum(0).tolist() == errors
        assert found.any(1).all()
    ours = compare(references, first, second, None, **ONCE)
    theirs = compare(references, second, first, None, **ONCE)
    for name in ("difference", "mapsswe_z"):
        assert ours[name] == pytest.approx(-theirs[name], nan_ok=True)
    assert ours["mapsswe_p"] == pytest.approx(theirs["mapsswe_p"], nan_ok=True)
    assert ours["wer_first"] == pytest.approx(theirs["wer_second"], nan_ok=True)


def test_z_and_p_where_they_are_not_of_a_sample() -> None:
    assert matched_pairs(np.array([[2, 1], [1, 2]])) == (0.0, 1.0)
    assert matched_pairs(np.zeros((0, 2), np.int64)) == (0.0, 1.0)
    for without_spread in ([[1, 0]], [[1, 0], [2, 1]]):
        assert all(map(math.isnan, matched_pairs(np.array(without_spread))))
    z, p = matched_pairs(np.array([[1, 0]] * 6 + [[0, 1]] * 2))  # mean 1/2, deviation sqrt(6/7)
    assert z == pytest.approx(0.5 / math.sqrt(6 / 7 / 8))
    assert p == pytest.approx(0.12663045794761786)


def test_texts_are_normalised_and_groups_are_drawn_whole() -> None:
    found = compare(["שָׁלוֹם, עולם"], ["שלום עולם!"], ['שלו"ם'], None, **ONCE)
    assert (found["wer_first"], found["wer_second"], found["difference"]) == (0.0, 0.5, -0.5)
    references, first, second = peers.systems(5, 60, 0.1, 0.3)
    groups = [f"g{row // 30}" for row in range(60)]
    widths = [
        np.diff(compare(references, first, second, names, resamples=300, seed=0)["ci95"])
        for names in (None, groups)
    ]
    assert widths[0] != widths[1]
    one = compare(references, first, second, ["one"] * 60, **ONCE)
    assert np.isnan(one["ci95"]).all()
    assert one["mapsswe_segments"] > 2

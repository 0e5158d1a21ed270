"""Scores: the normaliser against the packages it restates, errors against jiwer, the interval
against the binomial."""

import math
import random
from itertools import product

import jiwer
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hebasr_jax.metrics import (
    align_words,
    bootstrap_interval,
    character_errors,
    normalize_ivrit,
    score,
    word_errors,
)

FORMAT_MARKS = "\u061c\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
FORMAT_MARKS += "\u2066\u2067\u2068\u2069\ufeff"
TEXTS = st.text(
    st.one_of(
        st.sampled_from("אבגדהוזםןףץ "),
        st.sampled_from("<>[]()<>[]()\"'״׳”’־–-.,%₪½ \t\n\u00a0\u00ad" + FORMAT_MARKS),
        st.characters(min_codepoint=0x0591, max_codepoint=0x05F4),
        st.characters(min_codepoint=0xFB1D, max_codepoint=0xFB4F),
        st.characters(min_codepoint=0x20, max_codepoint=0x17F),
        st.characters(),
    ),
    max_size=30,
)
WORDS = st.lists(st.sampled_from(["אב", "ג", "שלום", "שלומות"]), max_size=6).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), max_size=8)


@pytest.fixture(scope="module")
def official():
    """The four steps by the packages that the leaderboard's script calls."""
    from hebrew import Hebrew
    from whisper_normalizer.basic import BasicTextNormalizer

    whisper, deleted = BasicTextNormalizer(), str.maketrans("", "", FORMAT_MARKS)

    def normalize(text: str) -> str:
        text = Hebrew(text.translate(deleted)).no_niqqud().string
        return whisper(text.replace('"', "").replace("'", "")).strip()

    return normalize


@settings(max_examples=400, deadline=None)
@given(TEXTS)
@example("א(ב[ג)ד]ה")
@example("<א]ב>ג")
@example("(())א()ב)")
@example("וּשׁ\u05bdא\u05bfב")
@example("İΑΣ ẞ ﬃ Ⅷ")
def test_the_normaliser_is_the_packages(official, text) -> None:
    assert normalize_ivrit(text) == official(text)


def test_every_character_of_hebrew_normalises_as_by_the_packages(official) -> None:
    blocks = (range(0x250), range(0x590, 0x620), range(0x2000, 0x2100), range(0xFB00, 0xFB50))
    for letter in (chr(point) for block in blocks for point in block):
        for text in (letter, f"א{letter}ב", f"A{letter}"):
            assert normalize_ivrit(text) == official(text), ascii(text)


# Every sign of the table of verified consequences, and what the normaliser names.
SIGNS = [*"\"'״׳”“’‘´<>[](),.:/%₪|-–0123456789", *FORMAT_MARKS, "\u00ad", "''"]
SIGNS += [chr(point) for point in (*range(0x591, 0x5C8), *range(0xFB1D, 0xFB50))]


def test_the_normaliser_is_the_packages_on_twenty_thousand_strings(official) -> None:
    draw, seen = random.Random(0), set()
    parts = [*SIGNS, *"אבגדהוזחטיכךלמםנןסעףפצץקרשת" * 3, *"    ", "API", "Google", "İ", "½", "ﬃ"]
    for _ in range(20_000):
        drawn = draw.choices(parts, k=draw.randint(1, 24))
        seen.update(drawn)
        text = "".join(drawn)
        assert normalize_ivrit(text) == official(text), ascii(text)
    assert seen == set(parts)


def test_the_scores_are_those_of_the_leaderboards_arithmetic(official) -> None:
    """One call of jiwer over all rows; what is missing is an empty text and counts."""
    draw = random.Random(1)
    words = ['צה"ל', "צה״ל", "שָׁלוֹם", "ב-5", "כן,", "כן", "[רעש]", "…", "API", "1,000"]
    for _ in range(150):
        sides = [
            [" ".join(draw.choices(words, k=draw.choice([0, 0, 1, 2, 3, 9]))) for _ in range(rows)]
            for rows in [draw.randint(1, 9)] * 2
        ]
        ours = score(*sides, resamples=1, seed=0)
        theirs = jiwer.process_words(*([official(text) for text in side] for side in sides))
        assert [ours[name] for name in NAMES] == [getattr(theirs, name) for name in NAMES]
        assert ours["wil"] == pytest.approx(theirs.wil, abs=1e-12)
        if ours["words"]:
            assert ours["wer"] == theirs.wer


@settings(max_examples=400, deadline=None)
@given(TEXTS)
@example("a\ud800")
def test_normalising_twice_changes_nothing(text) -> None:
    once = normalize_ivrit(text)
    assert normalize_ivrit(once) == once
    assert once == " ".join(once.split()) == once.lower()


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ('צה"ל', "צהל"),
        ("צה״ל", "צה ל"),
        ("צה”ל", "צה ל"),
        ("ג'ירפה", "גירפה"),
        ("ג׳ירפה", "ג ירפה"),
        ("ג’ירפה", "ג ירפה"),
        ("בן־גוריון", "בן גוריון"),
        ("בן-גוריון", "בן גוריון"),
        ("בן–גוריון", "בן גוריון"),
        ("1,000", "1 000"),
        ("3.5", "3 5"),
        ("10:30", "10 30"),
        ("13/5/2025", "13 5 2025"),
        ("50%", "50"),
        ("₪50", "50"),
        ("ב-1948", "ב 1948"),
        ("שָׁל֑וֹם", "של ום"),
        ("מ\u05bdלך", "מ לך"),
        ("<|0.00|>שלום<|1.20|>", "שלום"),
        ("א<ב ג", "א ב ג"),
        ("א<ב ג]ד", "אד"),
        ("א\u00adב", "א\u00adב"),
        ("API של Google", "api של google"),
        ("\u200fשלום\u202c \ufeffעולם", "שלום עולם"),
    ],
)
def test_the_table_of_the_fact_sheet(text, normalized) -> None:
    assert normalize_ivrit(text) == normalized


@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_counts_are_jiwers(pairs) -> None:
    references, hypotheses = [a for a, _ in pairs], [b for _, b in pairs]
    for ours, theirs in (
        (word_errors(references, hypotheses), jiwer.process_words(references, hypotheses)),
        (
            character_errors(references, hypotheses),
            jiwer.process_characters(references, hypotheses),
        ),
    ):
        totals = {name: int(getattr(ours, f"{name}_N").sum()) for name in NAMES}
        assert totals == {name: getattr(theirs, name) for name in NAMES}
        if ours.length_N.sum():
            assert ours.rate == getattr(theirs, "wer", None) or ours.rate == theirs.cer
    for row, (reference, hypothesis) in enumerate(pairs):
        alone = jiwer.process_words(reference, hypothesis)
        counts = word_errors(references, hypotheses)
        assert [getattr(counts, f"{n}_N")[row] for n in NAMES] == [getattr(alone, n) for n in NAMES]
        assert counts.length_N[row] == len(reference.split())


NAMES = ("hits", "substitutions", "deletions", "insertions")


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS)
def test_an_alignment_holds_both_texts_and_the_counted_errors(reference, hypothesis) -> None:
    columns = align_words(reference, hypothesis)
    assert [c.reference for c in columns if c.reference is not None] == reference.split()
    assert [c.hypothesis for c in columns if c.hypothesis is not None] == hypothesis.split()
    counts = word_errors([reference], [hypothesis])
    for operation, name in zip(("equal", "substitute", "delete", "insert"), NAMES, strict=True):
        found = [c for c in columns if c.operation == operation]
        assert len(found) == getattr(counts, f"{name}_N")[0]
        assert all((c.reference is None) == (operation == "insert") for c in found)
        assert all((c.hypothesis is None) == (operation == "delete") for c in found)
        assert all((c.reference == c.hypothesis) == (operation == "equal") for c in found)


def test_missing_text_counts() -> None:
    counts = word_errors(["a b", "", "", "c"], ["", "x y z", "", "c"])
    assert counts.deletions_N.tolist() == [2, 0, 0, 0]
    assert counts.insertions_N.tolist() == [0, 3, 0, 0]
    assert counts.rate == 5 / 3


def test_a_rate_without_reference_words_is_no_number() -> None:
    for references, hypotheses in (([], []), ([""], [""]), (["", ""], ["a b", ""])):
        assert math.isnan(word_errors(references, hypotheses).rate)
        assert math.isnan(score(references, hypotheses, resamples=9, seed=0)["wer"])


def test_wil_without_words_is_jiwers() -> None:
    for references, hypotheses in ((["", ""], ["", ""]), ([""], ["a b"]), (["a b"], [""])):
        ours = score(references, hypotheses, resamples=1, seed=0)["wil"]
        assert ours == jiwer.process_words(references, hypotheses).wil
    assert score([], [], resamples=1, seed=0)["wil"] == 0


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="1 references for 0"):
        word_errors(["a"], [])
    one, two = np.ones(1, np.int64), np.ones(2, np.int64)
    with pytest.raises(ValueError, match="length"):
        bootstrap_interval(two, two, ["a"], resamples=9, seed=0)
    with pytest.raises(ValueError, match="length"):
        bootstrap_interval(one, one, ["a", "b"], resamples=9, seed=0)


# --- the interval --------------------------------------------------------------------------


def test_the_interval_is_that_of_the_binomial() -> None:
    """N one-word rows: the bootstrap distribution of the rate is binomial(N, errors / N) / N."""
    rows, wrong = 600, 150
    errors_N = np.array([1] * wrong + [0] * (rows - wrong))
    low, high = bootstrap_interval(errors_N, np.ones(rows, np.int64), resamples=20_000, seed=1)
    p = wrong / rows
    chances = [math.comb(rows, k) * p**k * (1 - p) ** (rows - k) for k in range(rows + 1)]
    expected = [np.searchsorted(np.cumsum(chances), q) / rows for q in (0.025, 0.975)]
    assert (low, high) == pytest.approx(expected, abs=1.01 / rows)


def test_the_interval_is_that_of_all_draws_of_groups() -> None:
    errors_N, words_N = np.array([3, 1, 0, 5, 2, 2, 4]), np.array([4, 9, 7, 8, 8, 20, 10])
    groups_N = ["a", "a", "b", "c", "c", "a", "d"]
    errors_G, words_G = np.array([6, 0, 7, 4]), np.array([33, 7, 16, 10])
    rates = [
        errors_G[list(draw)].sum() / words_G[list(draw)].sum()
        for draw in product(range(4), repeat=4)
    ]
    found = bootstrap_interval(errors_N, words_N, groups_N, resamples=30_000, seed=0)
    expected = np.quantile(rates, [0.025, 0.975], method="inverted_cdf")
    assert found == pytest.approx(expected)
    assert min(rates) < found[0] < found[1] < max(rates)


def test_the_draws_are_those_of_one_at_a_time() -> None:
    """Draws are made in blocks that bound the memory: 700 of 3,500 groups are two blocks."""
    rng = np.random.default_rng(0)
    errors_N, words_N = rng.integers(0, 5, 3500), rng.integers(0, 9, 3500)
    rng, rates = np.random.default_rng(7), []
    for _ in range(700):
        drawn = rng.integers(3500, size=3500)
        rates.append(errors_N[drawn].sum() / words_N[drawn].sum())
    ours = bootstrap_interval(errors_N, words_N, resamples=700, seed=7)
    assert ours == tuple(np.quantile(rates, [0.025, 0.975]))


def test_coverage_of_groups_that_share_their_errors() -> None:
    """95 % intervals by group hold the truth about as often as they say; by row they do not."""
    rng, held = np.random.default_rng(0), {True: 0, False: 0}
    for trial in range(200):
        p_G = rng.beta(2, 8, size=40)  # each speaker has an error rate; the truth is 0.2
        errors_N = rng.binomial(25, np.repeat(p_G, 6))
        words_N, names = np.full(240, 25), [f"s{g}" for g in np.repeat(range(40), 6)]
        for grouped in held:
            low, high = bootstrap_interval(
                errors_N, words_N, names if grouped else None, resamples=300, seed=trial
            )
            held[grouped] += low <= 0.2 <= high
    assert 0.88 <= held[True] / 200 <= 0.99
    assert held[False] / 200 < 0.75


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=20))
def test_the_interval_repeats_and_rows_without_names_are_their_own(rows) -> None:
    errors_N, words_N = (np.array(column) for column in zip(*rows, strict=True))
    kwargs = {"resamples": 200, "seed": 3}
    found = bootstrap_interval(errors_N, words_N, **kwargs)
    assert found == bootstrap_interval(errors_N, words_N, [""] * len(rows), **kwargs)
    assert found == bootstrap_interval(
        errors_N, words_N, [f"{i}" for i in range(99)][: len(rows)], **kwargs
    )


def test_one_recording_has_no_interval() -> None:
    errors_N, words_N = np.array([1, 2, 3]), np.array([9, 9, 0])
    assert all(np.isnan(bootstrap_interval(errors_N, words_N, ["a"] * 3, resamples=9, seed=0)))
    assert all(
        np.isnan(bootstrap_interval(errors_N, words_N, ["a", "a", "b"], resamples=9, seed=0))
    )
    low, high = bootstrap_interval(errors_N, words_N, resamples=500, seed=0)
    assert np.isfinite([low, high]).all()


def test_a_score_normalises_both_sides_and_names_everything() -> None:
    result = score(
        ["שָׁלוֹם, עולם!", "Yes (no)", "כן"], ["שלום עולם", "yes", "..."], resamples=200, seed=0
    )
    low, high = result.pop("ci95")
    assert 0.0 == low <= 0.25 <= high <= 1.0
    assert result.pop("cer_ci95")[1] <= 1.0
    assert result.pop("tolerant_ci95") == (low, high)
    assert result == {
        "wer": 0.25,
        "cer": 2 / 14,
        "hits": 3,
        "substitutions": 0,
        "deletions": 1,
        "insertions": 0,
        "words": 4,
        "clips": 3,
        "empty": 1,
        "wil": 0.25,
        "tolerant_wer": 0.25,
        "normalizer": "ivrit-1",
    }

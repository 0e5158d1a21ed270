"""What is told of a set: slices that add up, signs of made-up text, and the macro mean."""

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hebasr_jax.hypotheses import Hypothesis
from hebasr_jax.metrics import score
from hebasr_jax.scoring import bin_name, bin_names, macro_mean, repetitions, score_rows

DRAWS = {"resamples": 30, "seed": 0}


def make_row(number: int, reference: str, hypothesis: str, **known) -> Hypothesis:
    return Hypothesis(f"c{number:04}", reference, hypothesis, **{"duration_s": 4.0, **known})


def random_rows(count: int, length: int) -> list[Hypothesis]:
    draw = random.Random(0)
    words = [f"מלה{number}" for number in range(3000)]
    rows = []
    for number in range(count):
        said = draw.choices(words, k=length)
        heard = [w if draw.random() < 0.9 else draw.choice(words) for w in said]
        heard += draw.choices(words, k=draw.choice([0, 0, 1, 6]))
        known = {"source": f"s{number % 7}", "speaker": f"p{number % 40}", "group": f"g{number}"}
        known |= {"duration_s": draw.uniform(0, 90), "snr_db": draw.choice([None, 5.0, 15.0])}
        rows.append(make_row(number, " ".join(said), " ".join(heard), **known))
    return rows


def test_the_headline_is_of_the_styled_text_and_the_raw_score_is_beside_it() -> None:
    rows = [
        make_row(0, 'צה"ל בא', "צה״ל בא", loops=2, duration_s=1.5),
        make_row(1, "שלום", "שָׁל֑וֹם", finished=False),
    ]
    found = score_rows(rows, style=True, **DRAWS)
    assert (found["style"], found["wer"], found["raw_wer"]) == ("hebrew-1", 0.0, 4 / 3)
    texts = [row.reference for row in rows], [row.hypothesis for row in rows]
    raw = score(*texts, **DRAWS)
    assert found["raw"] == raw
    assert (found["audio_s"], found["loops"], found["unfinished"]) == (5.5, 2, 1)
    plain = score_rows(rows, style=False, **DRAWS)
    assert plain["style"] is None
    assert {name: plain[name] for name in raw} == plain["raw"] == raw


def test_the_interval_draws_the_groups_of_the_rows() -> None:
    rows = random_rows(40, 5)
    one = score_rows([replace(row, group="all") for row in rows], style=True, **DRAWS)
    assert np.isnan(one["ci95"]).all()
    assert np.isfinite(score_rows(rows, style=True, **DRAWS)["ci95"]).all()


def test_slices_add_up_and_are_the_scores_of_their_rows() -> None:
    rows = random_rows(60, 6)
    found = score_rows(rows, style=True, **DRAWS)
    slices = found["slices"]
    assert {kind: len(of_kind) for kind, of_kind in slices.items()} == {
        "duration": 6,
        "source": 7,
        "speaker": 20,
        "SNR": 2,
    }
    for kind in ("duration", "source"):
        assert sum(part["clips"] for part in slices[kind]) == 60
        assert sum(part["words"] for part in slices[kind]) == found["words"]
        errors = sum(part["wer"] * part["words"] for part in slices[kind])
        assert errors == pytest.approx(found["wer"] * found["words"])
    assert sum(part["clips"] for part in slices["SNR"]) == sum(r.snr_db is not None for r in rows)
    for kind, value in (("source", lambda r: r.source), ("speaker", lambda r: r.speaker)):
        for part in slices[kind]:
            chosen = [row for row in rows if value(row) == part["name"]]
            alone = score_rows(chosen, style=True, **DRAWS)
            assert {name: part[name] for name in ("wer", "ci95", "words", "clips")} == {
                name: alone[name] for name in ("wer", "ci95", "words", "clips")
            }
    words = [part["words"] for part in slices["speaker"]]
    assert words == sorted(words, reverse=True)
    names = [part["name"] for part in slices["duration"]]
    assert names == ["under 5 s", "5 to 10 s", "10 to 20 s", "20 to 30 s", "30 to 60 s"] + [
        "60 to 300 s"
    ]


def test_what_all_clips_share_or_nobody_knows_is_no_slice() -> None:
    rows = [make_row(n, "שלום", "שלום", speaker="one", snr_db=20.0) for n in range(3)]
    assert score_rows(rows, style=True, **DRAWS)["slices"] == {}
    assert score_rows([], style=True, **DRAWS)["slices"] == {}
    mixed = [*rows, make_row(3, "שלום", "", speaker="two", snr_db=None)]
    slices = score_rows(mixed, style=True, **DRAWS)["slices"]
    assert list(slices) == ["speaker"]


@given(st.floats(0, 1000), st.lists(st.floats(1, 900), min_size=1, unique=True).map(sorted))
def test_a_value_is_in_the_bin_that_names_it(value, edges) -> None:
    name = bin_name(value, edges, "s")
    at = bin_names(edges, "s").index(name)
    bounds = [-math.inf, *edges, math.inf]
    assert bounds[at] <= value < bounds[at + 1]
    assert name.startswith("under") == (at == 0)
    assert name.endswith("more") == (at == len(edges))


# --- made-up text --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("", 0),
        ("כן", 1),
        ("כן לא", 1),
        ("כן כן כן", 3),
        ("לא כן כן כן כן לא", 4),
        ("תודה רבה " * 5, 5),
        ("א " + "ב ג " * 3 + "ב", 3),
        ("א ב ג ד ה ו ז ח ט י " * 4, 4),
        ("א ב ג ד ה ו ז ח ט י כ " * 4, 1),
    ],
)
def test_repetitions_of_up_to_ten_words(text, times) -> None:
    assert repetitions(text.split()) == times


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_repetitions_are_those_of_every_place_and_size(words) -> None:
    most = min(len(words), 1)
    for size in range(1, 11):
        for start in range(len(words)):
            times, part = 1, words[start : start + size]
            while len(part) == size and words[start + times * size :][:size] == part:
                times += 1
            most = max(most, times)
    assert repetitions(words) == most


def test_signs_of_made_up_text() -> None:
    rows = [
        make_row(0, "כן כן כן כן", "כן כן כן כן"),  # the speaker said so
        make_row(1, "כן", "כן, כן, כן, כן."),
        make_row(2, "שלום לך", "שלום א ב ג ד ה לך"),
        make_row(3, "שלום לך", "א ב שלום ג ד לך ה"),  # five, but not in a row
        make_row(4, "", "תודה רבה", silent=True),
        make_row(5, "", "[שקט] ...", silent=True),
        make_row(6, "", "תודה רבה"),
    ]
    found = score_rows(rows, style=True, **DRAWS)["hallucinations"]
    assert found == {
        "loops": {"count": 1, "ids": ["c0001"]},
        "insertion_bursts": {"count": 1, "ids": ["c0002"]},
        "text_on_silence": {"count": 1, "ids": ["c0004"], "silent": 2},
    }
    many = [make_row(n, "", "א ב ג ד ה", silent=True) for n in range(30)]
    for of_kind in score_rows(many, style=True, **DRAWS)["hallucinations"].values():
        assert len(of_kind["ids"]) == min(of_kind["count"], 20)


# --- the macro mean ------------------------------------------------------------------------


def test_the_macro_mean_says_what_it_is_a_mean_of() -> None:
    names = ["a", "b", "c"]
    sets = {"a": {"wer": 0.1, "cer": 0.02, "words": 9}, "b": {"wer": 0.3, "cer": 0.04, "words": 99}}
    found = macro_mean(sets, names)
    assert found.pop("wer") == pytest.approx(0.2)
    assert found.pop("cer") == pytest.approx(0.03)
    assert found == {"sets": ["a", "b"], "missing": ["c"], "complete": False}
    whole = macro_mean(sets | {"c": {"wer": 0.5, "cer": 0.0}, "other": {"wer": 9, "cer": 9}}, names)
    assert (whole["wer"], whole["complete"]) == (pytest.approx(0.3), True)
    for unscored in ({"wer": None, "cer": None}, {"wer": math.nan, "cer": math.nan}, {}):
        assert macro_mean(sets | {"c": unscored}, names)["missing"] == ["c"]
    assert math.isnan(macro_mean({}, names)["wer"])


def test_scoring_takes_seconds() -> None:
    """3,000 clips, then 17 recordings of 1,000 words, with all slices and 1,000 resamples."""
    for rows in (random_rows(3000, 5), random_rows(17, 1000)):
        start = time.process_time()
        score_rows(rows, resamples=1000, seed=0, style=True)
        assert time.process_time() - start < 12  # about 2 and 1, of one core

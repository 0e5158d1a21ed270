"""The reference's writing style, and the score that forgives spelling."""

import json
import re
from collections import defaultdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hebasr_jax.metrics import normalize_ivrit, normalize_tolerant, score
from hebasr_jax.output_style import to_reference_style
from tests.conftest import SHARED

MARKS = "\u00ad\u061c\u200b\u200e\u200f\u202a\u202e\u2066\u2069\ufeff\u0591\u05af\u05b0\u05bc"
MARKS += "\u05bd\u05bf\u05c1\u05c7"
QUOTES = "\"'״׳”“„‟″’‘‛′´`"
HEBREW = st.text(
    st.one_of(
        st.sampled_from("אבגדהוזחטיכךלמםנןסעפףצץקרשת "),
        st.sampled_from(QUOTES + MARKS + "\ufb2a\ufb31\ufb4b\ufb4f"),
        st.sampled_from("aZ09 ,.-–־!?<>[]()%₪"),
    ),
    max_size=30,
)


@pytest.mark.parametrize(
    ("written", "reference"),
    [
        ("צה״ל", 'צה"ל'),
        ("צה”ל", 'צה"ל'),
        ("צה“ל", 'צה"ל'),
        ("צה''ל", 'צה"ל'),
        ("צה׳׳ל", 'צה"ל'),
        ("צה’’ל", 'צה"ל'),
        ("צה\u200f״\u200fל", 'צה"ל'),
        ("ג׳ירפה", "ג'ירפה"),
        ("ג’ירפה", "ג'ירפה"),
        ("ג´ירפה", "ג'ירפה"),
        ("ג`ירפה", "ג'ירפה"),
        ("שָׁל֑וֹם", "שלום"),
        ("מ\u05bdלך", "מלך"),
        ("כ\u05bfל", "כל"),
        ("\ufb2aלום", "שלום"),
        ("א\u00adב", "אב"),
        ("\u202bשלום\u202c", "שלום"),
        ("בן־גוריון", "בן־גוריון"),
        ("don’t “stop”", "don’t “stop”"),
        ("1,000 3.5 50% ₪50", "1,000 3.5 50% ₪50"),
    ],
)
def test_a_hypothesis_in_the_references_style_scores_as_the_reference(written, reference) -> None:
    assert to_reference_style(written) == reference
    assert normalize_ivrit(to_reference_style(written)) == normalize_ivrit(reference)


def test_another_encoding_costs_errors_that_the_style_takes_away() -> None:
    references = ['צה"ל', "ג'ירפה", "שלום", "אב"]
    written = ["צה״ל", "ג׳ירפה", "שָׁל֑וֹם", "א\u00adב"]
    styled = [to_reference_style(text) for text in written]
    assert score(references, written, resamples=1, seed=0)["wer"] == 7 / 4
    assert score(references, styled, resamples=1, seed=0)["wer"] == 0


@settings(max_examples=500)
@given(HEBREW)
def test_letters_and_digits_stay_and_words_only_join(text) -> None:
    before, after = (normalize_ivrit(t).replace("\u00ad", "") for t in (text, styled(text)))
    assert after.replace(" ", "") == before.replace(" ", "")
    ends = {len(before[:at].replace(" ", "")) for at in _gaps(before)}
    kept = {len(after[:at].replace(" ", "")) for at in _gaps(after)}
    assert kept <= ends
    signs = len(re.findall(f"[{QUOTES}{MARKS}\ufb1d-\ufb4f]", text))
    assert len(ends) - len(kept) <= signs
    assert signs or styled(text) == text


@settings(max_examples=500)
@given(st.one_of(HEBREW, st.text(max_size=30)))
@example("א''''ב")
@example("א’”ב")
@example("a\ud800")
def test_every_text_has_a_style_and_keeps_it(text) -> None:
    once = styled(text)
    assert styled(once) == once
    assert not set(once) & set(MARKS + "״׳")
    tolerant = normalize_tolerant(text)
    assert normalize_tolerant(tolerant) == tolerant


styled = to_reference_style


def _gaps(text: str) -> list[int]:
    return [at for at, sign in enumerate(text) if sign == " "]


# --- the tolerant score --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("צה״ל", 'צה"ל'),
        ("שָׁל֑וֹם", "שלום"),
        ("1,000,000", "1000000"),
        ("ב-1948", "ב1948"),
        ("וה־API", "והapi"),
        ("תכנית", "תוכנית"),
        ("ולתכניות", "ולתוכניות"),
        ("שהיתה", "שהייתה"),
        ("הדוגמא", "הדוגמה"),
        ("גירסא", "גרסה"),
    ],
)
def test_two_spellings_of_one_word_are_one(one, other) -> None:
    assert normalize_tolerant(one) == normalize_tolerant(other)
    assert normalize_ivrit(one) != normalize_ivrit(other)


@pytest.mark.parametrize(
    "pair",
    ["אם עם", "לא לו", "את עט", "הם הן", "זה זו", "כל קול", "אתה איתה", "שניים שנים"]
    + ["פעמיים פעמים", "רווח רוח", "מוות מות", "דווח דוח", "חכמה חוכמה", "עצמה עוצמה"]
    + ["חדש חודש", "אמנות אומנות", "1,00 100", "1,0000 10000", "1.000 1000"]
    + ["א,123 א123", "גב-5 גב5", "שמים שמיים"],
)
def test_two_words_stay_two(pair) -> None:
    one, other = pair.split()
    assert normalize_tolerant(one) != normalize_tolerant(other)


def test_the_tolerant_score_stands_beside_the_headline() -> None:
    found = score(["התוכנית הייתה טובה"], ["התכנית היתה רעה"], resamples=1, seed=0)
    assert (found["wer"], found["tolerant_wer"]) == (1.0, 1 / 3)


@pytest.mark.shared
def test_few_word_types_of_real_text_merge_and_all_are_spellings() -> None:
    files = [*SHARED.glob("data/text/*.jsonl"), *SHARED.glob("data/he_*/manifest.jsonl")]
    lines = [line for path in files for line in path.read_bytes().splitlines()]
    types = {word for line in lines for word in normalize_ivrit(json.loads(line)["text"]).split()}
    merged = defaultdict(set)
    for word in types:
        merged[normalize_tolerant(word)].add(word)
    assert len(types) > 15_000
    assert sorted(sorted(words) for words in merged.values() if len(words) > 1) == [
        ["הייתה", "היתה"],
        ["לשנתיים", "לשנתים"],
        ["מאד", "מאוד"],
        ["שנתיים", "שנתים"],
    ]

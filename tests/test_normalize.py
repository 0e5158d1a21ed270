"""The training normaliser: one encoding for each word, no remark, no label, every word kept."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hebasr_jax.data.normalize import effect, normalize_hebrew
from hebasr_jax.metrics import normalize_ivrit

LETTERS = "אבגדהוזחטיכךלמםנןסעפףצץקרשת"
MARKS = "\u00ad\u034f\u061c\u200b\u200f\u202a\u2060\u2066\ufeff\u0591\u05af\u05b0\u05bc\u05bd\u05bf"
MARKS += "\u05c1\u05c4\u05c7"
QUOTES = "״׳”“„‟″’‘‛′´`"
PIECES = st.sampled_from(
    [*LETTERS, *MARKS, *QUOTES, *"\"' \n\r\t:,.!?-–־׀׃()[]<>0159aZ%₪e\u0301\u0338"]
    + ["\ufb2a", "\ufb31", "\ufb4f", "\u1fef", "\u2028", "\ud800", "\x00", "=", "<|0.00|>"]
    + ['היו"ר כהן: ', "היו״ר", "קריאה:", "משה גפני:\n", " הוא אמר: ", "''", "(צחוק)", "מר לוי :"]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=25).map("".join), st.text(max_size=30))


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("צה״ל", 'צה"ל'),
        ("צה”ל", 'צה"ל'),
        ("צה''ל", 'צה"ל'),
        ("צה׳׳ל", 'צה"ל'),
        ("צה\u200f״\u200fל", 'צה"ל'),
        ("ג׳ירפה", "ג'ירפה"),
        ("ג’ירפה", "ג'ירפה"),
        ("ג´ירפה", "ג'ירפה"),
        ("הוא אמר “שלום”", 'הוא אמר "שלום"'),
        ("שָׁל֑וֹם", "שלום"),
        ("מ\u05bdלך כ\u05bfל", "מלך כל"),
        ("\ufb2aלום", "שלום"),
        ("ש\u05c1לום", "שלום"),
        ("caf\u0065\u0301", "caf\u00e9"),
        ("caf\u0065\u0592\u0301", "caf\u00e9"),
        ("א\u00adב", "אב"),
        ("\u202bשלום\u202c", "שלום"),
        ("בן־גוריון", "בן-גוריון"),
        ("וה־API", "וה-API"),
        ("אור׃ויהי", "אור ויהי"),
        ("אמר ׀ משה", "אמר משה"),
        ("1,000 3.5 10:30 50% ₪50 ב-1948", "1,000 3.5 10:30 50% ₪50 ב-1948"),
        ("שלום  \n עולם\t", "שלום עולם"),
        ("\u05b0\u05c1\u0591", ""),
        ("a\ud800b", "a b"),
    ],
)
def test_every_encoding_of_a_word_becomes_one(written, normal) -> None:
    assert normalize_hebrew(written) == normal
    assert normalize_ivrit(normalize_hebrew(written)) == normalize_ivrit(normal)


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("תודה (מחיאות כפיים) רבה", "תודה רבה"),
        ("תודה [צחוק].", "תודה."),
        ("תודה <רעש>, רבה", "תודה, רבה"),
        ("<< יור >> תודה", "תודה"),
        ("(א (ב) ג) ד", "ד"),
        ("שלום (כן בוא נלך", "שלום כן בוא נלך"),
        ("שלום כן] בוא נלך", "שלום כן בוא נלך"),
        ("א) תודה ב) רבה (ג", "א תודה ב רבה ג"),
        ("(כן [צחוק] לא", "כן לא"),
        ("(א [ב) ג] ד", "ג ד"),
        ("החום < 5 מעלות והלחות > 80 אחוז", "החום 5 מעלות והלחות 80 אחוז"),
        ("( " + "מילה " * 60 + ") סוף", "מילה " * 60 + "סוף"),
    ],
)
def test_remarks_go_and_a_lone_bracket_takes_no_words(written, normal) -> None:
    assert normalize_hebrew(written) == normal


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ('היו"ר כהן: תודה', "תודה"),
        ("היו״ר אברהם בורג:\nתודה רבה", "תודה רבה"),
        ("חה״כ גפני: לא\nהשרה לבני: כן", "לא כן"),
        ("שר האוצר משה כחלון: אדוני", "אדוני"),
        ("גב׳ לוי: שלום", "שלום"),
        ("קריאה: בושה!\nקריאות: נכון", "בושה! נכון"),
        ("<< דובר >> משה גפני (יהדות התורה): << דובר >>\nאדוני", "אדוני"),
        ("תודה.\nמשה גפני:\nאדוני היושב-ראש", "תודה. אדוני היושב-ראש"),
        ("אני חושב ש – –\nמשה גפני:\nלא", "אני חושב ש – – לא"),
        ('היו"ר כהן:\nמשה גפני:\nלא', "לא"),
        ('היו"ר\nכהן: תודה', "תודה"),
    ],
)
def test_speakers_labels_go(written, normal) -> None:
    assert normalize_hebrew(written) == normal


@pytest.mark.parametrize(
    "speech",
    [
        "השר אמר לי: תבוא",
        "מר כהן שאל: מתי",
        "אני אומר דבר אחד: לא",
        'אז היו"ר כהן: תודה',
        "ואז הוא אמר:",
        "משה גפני:",
        "השעה 10:30 בבוקר",
        "השר כהן, בבקשה: תענה",
        "קריאה ראשונה: הצעת חוק",
        'היו"ר כהן:תודה',
        "מר כהן הסכים לדבר אחד: כסף",
        "מר כהן ואני החלטנו היום: נוסעים",
    ],
)
def test_what_only_looks_like_a_label_is_speech(speech) -> None:
    assert normalize_hebrew(speech) == speech


def test_a_line_that_introduces_speech_is_no_label() -> None:
    assert normalize_hebrew("כן.\nואז הוא אמר:\nבוא") == "כן. ואז הוא אמר: בוא"
    assert normalize_hebrew("ראיתי את\nמשה גפני:\nבוא") == "ראיתי את משה גפני: בוא"


@settings(max_examples=1500, deadline=None)
@given(TEXTS)
@example("א'’ב")
@example('היו"ר\nכהן : א')
@example("<\u200f\u0338a>")
@example('(היו"ר כהן:) מר לוי: א')
def test_every_text_has_a_normal_form_and_keeps_it(text) -> None:
    normal = normalize_hebrew(text)
    assert normalize_hebrew(normal) == normal
    assert not set(normal) & set(MARKS + QUOTES + "()[]<>־׀׃\n\t\ud800\x00")
    assert normal == " ".join(normal.split())
    normal.encode()


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from(LETTERS + MARKS + QUOTES + ' "-–־׀׃,.!?019aZ(<'), max_size=40))
def test_without_pairs_and_labels_no_letter_or_digit_goes(text) -> None:
    def spoken(text: str) -> list[str]:
        return [sign for sign in text if sign.isalnum()]

    assert spoken(normalize_hebrew(text)) == spoken(text)


@pytest.mark.parametrize(
    "unit", ["(", "((]]", "(]", "''", "\u05b0", "א", ":\n", 'היו"ר כהן: ', "אב ", " \n", "א-", "<|"]
)
def test_a_long_text_takes_no_long_time(unit) -> None:
    start = time.perf_counter()
    normal = normalize_hebrew(unit * (100_000 // len(unit)))
    assert time.perf_counter() - start < 2
    assert normalize_hebrew(normal) == normal


def test_the_effect_on_a_set_is_counted_and_shown() -> None:
    texts = {str(n): f"שלום {n}" for n in range(40)}
    texts |= {
        "points": "שָׁלוֹם לכם",
        "remark": "(מחיאות כפיים)",
        "label": "מר כהן: " + "כן " * 9 + "כן",
    }
    found = effect(texts)
    assert (found["texts"], found["changed"], found["emptied"]) == (43, 3, 1)
    shown = {row["id"]: (row["before"], row["after"]) for row in found["examples"]}
    assert next(iter(shown)) == "remark"  # of which most goes
    assert shown == {name: (texts[name], normalize_hebrew(texts[name])) for name in shown}
    assert shown.keys() == {"points", "remark", "label"}


def test_examples_are_few_and_reach_over_the_set() -> None:
    found = effect({str(n): "(צחוק) " + "מילה " * (n + 1) + "סוף" for n in range(100)})
    shown = [int(row["id"]) for row in found["examples"]]
    assert len(shown) == len(set(shown)) == 12
    assert shown[:6] == [0, 1, 2, 3, 4, 5]
    assert max(shown) > 80

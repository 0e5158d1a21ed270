"""The training normaliser of Hebrew transcripts: one encoding, and only what is spoken.

Versioned: texts made by another version are other training data. Words, number style, spelling
and punctuation stay as the source has them.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from hebasr_jax.output_style import to_reference_style

HEBREW_V1 = "hebrew-v1"

# Zero-width and directional characters, soft hyphen, grapheme joiner, variation selectors.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)
# What no text file can hold or show; a tokenizer cannot encode a lone surrogate.
_UNWRITABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
_SIGNS = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u05f4\uff02", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4`\u05f3\u02b9\u02bc\uff07", "'")
    # Maqaf joins words: deleting it fuses them, and a space loses how the word is written. The
    # scorer makes a space of it and of "-" alike, and typed corpora have "-": one form to learn.
    | dict.fromkeys("\u05be\u2010\u2011", "-")
    | dict.fromkeys("\u05c0\u05c3\u05c6", " ")  # paseq, sof pasuq, inverted nun
)

_CLOSED_BY = {")": "(", "]": "[", ">": "<"}
_BRACKET = re.compile(r"[()\[\]<>]")
_LESS = re.compile(r"<\s*\d")  # a comparison: what follows is said
_LONGEST_REMARK = 200  # characters; a pair further apart is two signs without a partner

_LOOSE_MARK = re.compile(r" +(?=[.,;:!?](?: |$))")
_WORD = r"[\u05d0-\u05ea]+(?:['\"-]+[\u05d0-\u05ea]+)*'?"
_OFFICE = (  # the words behind it are the office's and the name's
    'ה?יו"ר|(?:ה?יושבת?|יושבי)[ -]ראש|ראש[ -]הממשלה|(?:סגן|סגנית)[ -]ה?שרת?|השר|השרה|שר|שרת|'
    "מזכירת?[ -]הכנסת"
)
_PERSON = 'חה?"כ|ח(?:בר|ברת)[ -]הכנסת|מר|ה?גב\'|ה?גברת|ד"ר|פרופ\'|פרופסור|עו"ד'
_TITLED = re.compile(
    rf"\s*(קריאה|קריאות|(?:{_OFFICE})(?:\s+{_WORD}){{0,5}}|(?:{_PERSON})(?:\s+{_WORD}){{0,3}})"
    r"\s*:(?=\s|$)"
)
_SENTENCE_ENDS = (".", "!", "?", "…", '"', "-", "–", "—")  # a dash: somebody was cut short
_NAME_LINE = re.compile(rf"\s*({_WORD}(?:\s+{_WORD}){{1,3}})\s*:\s*")
# A colon behind one of these introduces what somebody said: that is speech, and no label.
_NOT_IN_NAMES = frozenset(
    re.findall(
        r"\w+",
        """
    אמר אמרה אמרו אומר אומרת אומרים אמרתי אמרת אמרנו שאל שאלה שאלו שואל שואלת שאלתי ענה ענתה ענו
    עונה השיב השיבה הודיע הודיעה הוסיף הוסיפה כתב כתבה כתבו כותב כותבת טען טענה טוען טוענת ביקש
    ביקשה מבקש הבטיח הבטיחה הסביר הסבירה מסביר סיפר סיפרה מספר ציטט קרא קראה קורא צעק דיבר דיברה
    חשב חשבה חושב חושבת יודע יודעת רוצה לומר להגיד לשאול להוסיף אגיד נאמר כתוב
    אני אתה את אנחנו אתם הוא היא הם הן לי לו לה לנו לכם להם לך שלי שלו שלה של על אל אם כי גם רק
    לא כן זה זו זאת אלה היה הייתה היתה היו יש אין מה מי איך למה כאן שם אז אבל או ואז עוד הנה
    """,
    )
)


def normalize_hebrew(text: str) -> str:
    r"""A transcript as `hebrew-v1` writes it; the rules are those of the Hebrew traps.

    1. NFC, presentation forms as letters; zero-width and directional marks, soft hyphen, points,
    cantillation, meteg and rafe are deleted, control characters and lone surrogates a space.
    2. Every encoding of gershayim and geresh is ASCII, `''` between two letters is `"`, maqaf is
    `-`, and paseq and sof pasuq are a space. 3. Remarks in `()`, `[]` and `<>` go, as in the
    scorer, and a bracket without a partner goes alone: no words go because of it. 4. A speaker's
    label at the start of a line goes: an office and at most five words before a colon, a person's
    title and at most three, or a line of its own, of two to four words and a colon, with speech
    below. 5. White space is one space, and none before a mark that ends a word.

    For every string; twice is as once.
    """
    text = _UNWRITABLE.sub(" ", _UNSEEN.sub("", text))
    text = unicodedata.normalize("NFC", text).translate(_SIGNS)
    # Deleting a point can bring a letter and its accent together.
    text = unicodedata.normalize("NFC", to_reference_style(text))
    text = _without_labels(_without_remarks(text))
    return _LOOSE_MARK.sub("", " ".join(text.split()))


def effect(texts: Mapping[str, str], most: int = 12) -> dict[str, Any]:
    """What `hebrew-v1` does to a set's texts by id: how many change, and examples.

    Examples are half those of which the largest part goes, half spread over the others.
    """
    changes = {
        name: (text, new) for name, text in texts.items() if (new := normalize_hebrew(text)) != text
    }
    lost = sorted(changes, key=lambda name: (len(changes[name][1]) / len(changes[name][0]), name))
    others = lost[most // 2 :]
    spread = others[:: max(1, len(others) // (most - most // 2))]
    shown = [*lost[: most // 2], *spread][:most]
    return {
        "texts": len(texts),
        "changed": len(changes),
        "emptied": sum(not new for _, new in changes.values()),
        "examples": [
            {"id": name, "before": changes[name][0], "after": changes[name][1]} for name in shown
        ],
    }


def _without_remarks(text: str) -> str:
    """The text without bracketed remarks and without any bracket, each of which is a space.

    A closing sign belongs to the last open sign of its kind.
    """
    opened: dict[str, list[int]] = {"(": [], "[": [], "<": []}
    pieces: list[tuple[int, int]] = []
    for found in _BRACKET.finditer(text):
        at = start = found.start()
        if _LESS.match(text, at):
            pass
        elif found[0] in opened:
            opened[found[0]].append(at)
        elif partners := opened[_CLOSED_BY[found[0]]]:
            partner = partners.pop()
            for places in opened.values():  # what opened within the pair has no partner behind it
                while places and places[-1] > partner:
                    places.pop()
            start = partner if at - partner <= _LONGEST_REMARK else at
        while pieces and pieces[-1][0] >= start:
            pieces.pop()
        pieces.append((start, at + 1))
    kept: list[str] = []
    end = 0
    for start, stop in pieces:
        kept.append(text[end:start])
        end = stop
    return " ".join([*kept, text[end:]])


def _without_labels(text: str) -> str:
    """The lines of a text without speakers' labels, in one line."""
    lines = [line for line in text.splitlines() if line.strip()]
    kept: list[str] = []
    for number, line in enumerate(lines):
        name = _NAME_LINE.fullmatch(line)
        ended = not kept or kept[-1].endswith(_SENTENCE_ENDS)
        if number + 1 < len(lines) and ended and name and _is_name(name[1]):
            continue
        if rest := _without_titled(line).strip():
            kept.append(rest)
    # A label may be broken over two lines; it must not be one only when read again.
    return _without_titled(" ".join(" ".join(kept).split()))


def _without_titled(line: str) -> str:
    at = 0
    while (found := _TITLED.match(line, at)) and _is_name(found[1]):
        at = found.end()
    return line[at:]


def _is_name(words: str) -> bool:
    return not _NOT_IN_NAMES & set(words.split())

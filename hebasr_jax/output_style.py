"""Hypotheses rewritten in the writing style of the references: quotes, geresh and marks only.

The benchmark's normaliser deletes ASCII quotes but makes a space of every other quote and of
most Hebrew marks, so that a right word in another encoding counts as two wrong ones.
"""

import re
import unicodedata

STYLE = "hebrew-1"

_LETTER = "[\u05d0-\u05ea]"
_PRESENTATION = re.compile("[\ufb1d-\ufb4f]+")  # letters with their points in one character
_FORMAT_MARKS = "\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff"  # and the soft hyphen
_POINTS = "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"  # cantillation, niqqud, meteg, rafe
_DELETED = re.compile(f"[{_FORMAT_MARKS}{_POINTS}]")
_MARKS = str.maketrans("\u05f3\u05f4", "'\"")
_SINGLE = re.compile(f"(?<={_LETTER})[\u2018\u2019\u201b\u2032\u00b4`]+")
_DOUBLE = re.compile(f"(?<={_LETTER})[\u201c-\u201f\u2033](?={_LETTER})")
_TWO_SINGLE = re.compile(f"(?<={_LETTER})''(?={_LETTER})")


def to_reference_style(text: str) -> str:
    r"""ASCII gershayim and geresh, and no mark that is neither letter nor punctuation.

    1. Presentation forms (U+FB1D to FB4F) become letters and points. 2. Points, cantillation,
    meteg, rafe, directional and zero-width marks and the soft hyphen are deleted; maqaf stays.
    3. U+05F4 becomes `"` and U+05F3 `'`; curly quotes, primes, acute and back-tick do so where a
    geresh (behind a Hebrew letter) or gershayim (between two) can stand, and `''` between two
    letters is `"`.

    For hypotheses alone, before `normalize_ivrit`: letters, digits and their order stay. Defined
    for every string, and twice is as once.
    """
    text = _PRESENTATION.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = _DELETED.sub("", text).translate(_MARKS)
    text = _SINGLE.sub(lambda found: "'" * len(found[0]), text)
    return _TWO_SINGLE.sub('"', _DOUBLE.sub('"', text))

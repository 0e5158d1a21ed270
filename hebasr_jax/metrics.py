"""Word and character errors, their confidence interval, and the normaliser of the benchmark.

Rates are of the whole corpus, total errors over total reference words, as the public Hebrew
leaderboard reports them; the mean of the clips' own rates is another number and never given.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import jiwer
import numpy as np
from jaxtyping import Int

from hebasr_jax.output_style import to_reference_style

NORMALIZER = "ivrit-1"  # what `normalize_ivrit` does; another rule has another name

_FORMAT_MARKS = "\u061c\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff"
_POINTS = "\u05b0-\u05bc\u05c1\u05c2\u05c4\u05c5\u05c7"  # no meteg, rafe, maqaf, cantillation
_DELETED = re.compile(f"[{_FORMAT_MARKS}{_POINTS}\"']")
_BRACKETED = re.compile(r"[<\[][^>\]]*[>\]]")
_PARENTHESISED = re.compile(r"\([^)]+\)")


def normalize_ivrit(text: str) -> str:
    r"""What the benchmark of ivrit.ai compares (`evaluate_model.py` of ivrit-ai/asr-training).

    1. Directional and zero-width marks are deleted, 2. vowel points as the package hebrew 0.8.1
    deletes them, 3. ASCII `"` and `'`. 4. Whisper's BasicTextNormalizer: lower case, `<...>`,
    `[...]` and then `(...)` deleted, NFKC, every mark, symbol and punctuation sign becomes a
    space, and white space one space. White space around the text is dropped.

    Defined for every string. Doing it twice changes nothing, for its output holds no sign, bracket
    or capital, nor a mark (but where lower-casing makes one, as of a composed capital I with dot).
    It is not a map of words: text inside an open bracket goes up to the
    next closing one of either kind, and a Hebrew gershayim splits a word that `"` would join.
    """
    text = _DELETED.sub("", text).lower()
    text = _PARENTHESISED.sub("", _BRACKETED.sub("", text))
    text = unicodedata.normalize("NFKC", text)
    text = "".join(" " if unicodedata.category(c)[0] in "MSP" else c for c in text)
    return " ".join(text.lower().split())


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_GLUED = re.compile(r"(?<!\w)([ושהבלכמ]{1,3})[-\u05be\u2010-\u2013](?=[0-9A-Za-z])")
_DOUBLETS = dict(
    re.findall(
        r"(\w+)=(\w+)",
        """
היתה=הייתה אמא=אימא תכנית=תוכנית תכניות=תוכניות צהריים=צוהריים אמנם=אומנם קרבנות=קורבנות
עתון=עיתון עתונים=עיתונים עתונות=עיתונות עתונאי=עיתונאי נסיון=ניסיון נסיונות=ניסיונות
נסיוני=ניסיוני זכרונות=זיכרונות כשרון=כישרון כשרונות=כישרונות רשיון=רישיון רשיונות=רישיונות
שעור=שיעור בקור=ביקור תקון=תיקון בטול=ביטול חפוש=חיפוש שפור=שיפור קבוץ=קיבוץ איזור=אזור
דוגמא=דוגמה קופסא=קופסה טבלא=טבלה נוסחא=נוסחה סדנא=סדנה סיסמא=סיסמה גרסא=גרסה גירסה=גרסה
גירסא=גרסה מליון=מיליון מליונים=מיליונים מליארד=מיליארד מאד=מאוד עכשו=עכשיו דוקא=דווקא
בודאי=בוודאי בועדה=בוועדה לועדה=לוועדה שויון=שוויון טלויזיה=טלוויזיה מוסיקה=מוזיקה
פיסיקה=פיזיקה שנתים=שנתיים שעתים=שעתיים עינים=עיניים ירושליים=ירושלים אניה=אונייה
בנינים=בניינים ענינים=עניינים מענין=מעניין מעונין=מעוניין מעונינת=מעוניינת
מעונינים=מעוניינים מסויים=מסוים מסויימת=מסוימת מסויימים=מסוימים מצויין=מצוין
מצויינת=מצוינת מצויינים=מצוינים מחוייב=מחויב מחוייבת=מחויבת מחוייבים=מחויבים אלהים=אלוהים
""",
    )
)
_DOUBLET = re.compile(rf"(?<!\w)([ושהבלכמ]{{0,3}})({'|'.join(_DOUBLETS)})(?!\w)")


def normalize_tolerant(text: str) -> str:
    """`normalize_ivrit` that also forgives what two careful writers of Hebrew may do differently.

    1. `to_reference_style`, here on both sides: marks and the encodings of gershayim and geresh.
    2. `1,000` is `1000`. 3. A prefix is glued to a number or to Latin letters: `ב-5` is `ב5`.
    4. Spellings of one word, full and defective, of a closed list, with up to three prefix
    letters. No general rule of doubled vav and yod or of vowel letters: it would merge רווח with
    רוח and שניים with שנים. A second score beside the headline, never instead of it.
    """
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), to_reference_style(text))
    text = normalize_ivrit(_GLUED.sub(r"\1", text))
    return _DOUBLET.sub(lambda found: found[1] + _DOUBLETS[found[2]], text)


@dataclass(frozen=True, eq=False)
class ErrorCounts:
    """Errors of each of N pairs of reference and hypothesis, in words or in characters."""

    hits_N: Int[np.ndarray, " N"]
    substitutions_N: Int[np.ndarray, " N"]
    deletions_N: Int[np.ndarray, " N"]
    insertions_N: Int[np.ndarray, " N"]

    @property
    def errors_N(self) -> Int[np.ndarray, " N"]:
        return self.substitutions_N + self.deletions_N + self.insertions_N

    @property
    def length_N(self) -> Int[np.ndarray, " N"]:
        """Words (or characters) of each reference."""
        return self.hits_N + self.substitutions_N + self.deletions_N

    @property
    def rate(self) -> float:
        """Total errors over total reference length; above 1 where much is inserted.

        NaN when no reference has a word: jiwer would give the number of insertions, which is no
        rate. The insertions are in `insertions_N`.
        """
        length = int(self.length_N.sum())
        return int(self.errors_N.sum()) / length if length else float("nan")

    @property
    def information_lost(self) -> float:
        """WIL, 1 - H/N * H/P over N reference and P hypothesis words (Morris et al., 2004).

        As jiwer: 1 where one side alone has words, 0 where neither has.
        """
        hits, length = int(self.hits_N.sum()), int(self.length_N.sum())
        written = hits + int(self.substitutions_N.sum() + self.insertions_N.sum())
        if not length or not written:
            return float(length != written)
        return 1 - (hits / length) * (hits / written)


Operation = Literal["equal", "substitute", "delete", "insert"]


class AlignedWord(NamedTuple):
    """One column of an alignment; None where the other side has a word alone."""

    reference: str | None
    hypothesis: str | None
    operation: Operation


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Word errors as `jiwer.process_words` counts them, pair by pair; normalise both sides first.

    All rows count: an empty hypothesis is all deletions, an empty reference all insertions.
    """
    return _counts(jiwer.process_words, references, hypotheses)


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Character errors as `jiwer.process_characters` counts them; spaces between words count."""
    return _counts(jiwer.process_characters, references, hypotheses)


def align_words(reference: str, hypothesis: str) -> list[AlignedWord]:
    """The alignment that `word_errors` counts, word by word."""
    output = jiwer.process_words([reference], [hypothesis])
    reference_words, hypothesis_words = output.references[0], output.hypotheses[0]
    columns = []
    for chunk in output.alignments[0]:
        ours = reference_words[chunk.ref_start_idx : chunk.ref_end_idx]
        theirs = hypothesis_words[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for i in range(max(len(ours), len(theirs))):
            pair = ours[i] if ours else None, theirs[i] if theirs else None
            columns.append(AlignedWord(*pair, cast(Operation, chunk.type)))
    return columns


def bootstrap_interval(
    errors_N: Int[np.ndarray, " N"],
    words_N: Int[np.ndarray, " N"],
    groups_N: Sequence[str] | None = None,
    *,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the corpus rate (Bisani and Ney, ICASSP 2004).

    Whole groups are drawn with replacement: errors in one recording, or of one speaker, go
    together. `groups_N` names each row's group; a row named "" or without names is its own.
    (NaN, NaN) when fewer than two groups have reference words: one recording says nothing of the
    spread. A draw without any reference word has no rate and does not count.
    """
    group_N = _group_numbers(groups_N, len(errors_N))
    errors_G = np.bincount(group_N, weights=errors_N)  # ValueError when the rows do not match
    words_G = np.bincount(group_N, weights=words_N)
    errors_R, words_R = _draws(np.stack([errors_G, words_G]), resamples, seed)
    return _quantiles(errors_R / words_R)


def paired_interval(
    errors_2N: Int[np.ndarray, "2 N"],
    words_N: Int[np.ndarray, " N"],
    groups_N: Sequence[str] | None = None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """How much the first system's corpus rate is above the second's, on the same references.

    Paired bootstrap (Bisani and Ney, ICASSP 2004): the same groups are drawn for both, so that
    what is hard for both cancels. `groups_N` as in `bootstrap_interval`.

    Returns:
      wer of the first, difference, ci95 of it, and p_worse, the share of draws above 0 with half
      of those that are 0; interval and share are NaN for fewer than two groups with words.
    """
    group_N = _group_numbers(groups_N, len(words_N))
    errors_2G = np.stack([np.bincount(group_N, weights=errors_N) for errors_N in errors_2N])
    words_G = np.bincount(group_N, weights=words_N)
    wer, other = (
        float(e / words_G.sum()) if words_G.any() else float("nan") for e in errors_2G.sum(1)
    )
    found = {"wer": wer, "difference": wer - other}
    first_R, second_R, words_R = _draws(np.stack([*errors_2G, words_G]), resamples, seed)
    drawn_R = (first_R - second_R) / words_R
    worse = (drawn_R > 0) + 0.5 * (drawn_R == 0)
    p_worse = float(worse.mean()) if len(worse) else float("nan")
    return found | {"ci95": list(_quantiles(drawn_R)), "p_worse": p_worse}


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that is told of one set's texts, each side normalised here.

    wer, cer and their 95 % intervals, wil, word error counts, reference words, clips, how many
    hypotheses are empty though the reference is not, and the normaliser's name. tolerant_wer and
    its interval are of `normalize_tolerant`, every other figure of `normalize_ivrit`.
    """
    ours, theirs = ([normalize_ivrit(text) for text in side] for side in (references, hypotheses))
    words, characters = word_errors(ours, theirs), character_errors(ours, theirs)
    tolerant = word_errors(
        *([normalize_tolerant(text) for text in side] for side in (references, hypotheses))
    )
    ci95, cer_ci95, tolerant_ci95 = (
        bootstrap_interval(c.errors_N, c.length_N, groups, resamples=resamples, seed=seed)
        for c in (words, characters, tolerant)
    )
    return {
        "wer": words.rate,
        "ci95": ci95,
        "cer": characters.rate,
        "cer_ci95": cer_ci95,
        "wil": words.information_lost,
        "tolerant_wer": tolerant.rate,
        "tolerant_ci95": tolerant_ci95,
        "hits": int(words.hits_N.sum()),
        "substitutions": int(words.substitutions_N.sum()),
        "deletions": int(words.deletions_N.sum()),
        "insertions": int(words.insertions_N.sum()),
        "words": int(words.length_N.sum()),
        "clips": len(ours),
        "empty": sum(not b and bool(a) for a, b in zip(ours, theirs, strict=True)),
        "normalizer": NORMALIZER,
    }


def _group_numbers(groups_N: Sequence[str] | None, rows: int) -> np.ndarray:
    """A number for each row's group; a row named "", or without names, is a group of its own."""
    number: dict[str | int, int] = {}
    names = groups_N if groups_N is not None else [""] * rows
    return np.array([number.setdefault(n or i, len(number)) for i, n in enumerate(names)], int)


def _draws(totals_KG: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums [K, R] over groups drawn with replacement; the last row, of words, is never 0.

    R is less than `resamples` by the draws without words, and 0 when not two groups have any.
    """
    groups = totals_KG.shape[1]
    if np.count_nonzero(totals_KG[-1]) < 2:
        return np.zeros((len(totals_KG), 0))
    rng, most = np.random.default_rng(seed), max(1, 2**21 // groups)  # bounds the memory
    sums_KR = np.concatenate(
        [
            totals_KG[:, rng.integers(groups, size=(min(most, resamples - start), groups))].sum(-1)
            for start in range(0, resamples, most)
        ],
        axis=1,
    )
    return sums_KR[:, sums_KR[-1] > 0]


def _quantiles(drawn_R: np.ndarray) -> tuple[float, float]:
    if not len(drawn_R):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn_R, [0.025, 0.975])
    return float(low), float(high)


def _counts(
    process: Callable[[list[str], list[str]], jiwer.WordOutput | jiwer.CharacterOutput],
    references: Sequence[str],
    hypotheses: Sequence[str],
) -> ErrorCounts:
    if len(references) != len(hypotheses):  # jiwer takes one against none for a pair
        raise ValueError(f"{len(references)} references for {len(hypotheses)} hypotheses")
    operations = get_args(Operation)
    counts_4N = np.zeros((4, len(references)), np.int64)
    rows = process(list(references), list(hypotheses)).alignments if references else []
    for row, chunks in enumerate(rows):
        for chunk in chunks:
            ours = chunk.ref_end_idx - chunk.ref_start_idx
            theirs = chunk.hyp_end_idx - chunk.hyp_start_idx
            counts_4N[operations.index(chunk.type), row] += max(ours, theirs)
    return ErrorCounts(*counts_4N)

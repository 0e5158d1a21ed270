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

    Defined for every string. Doing it twice changes nothing, for its output holds no mark, sign,
    bracket or capital. It is not a map of words: text inside an open bracket goes up to the
    next closing one of either kind, and a Hebrew gershayim splits a word that `"` would join.
    """
    text = _DELETED.sub("", text).lower()
    text = _PARENTHESISED.sub("", _BRACKETED.sub("", text))
    text = unicodedata.normalize("NFKC", text)
    text = "".join(" " if unicodedata.category(c)[0] in "MSP" else c for c in text)
    return " ".join(text.lower().split())


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
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the corpus rate (Bisani and Ney, ICASSP 2004).

    Whole groups are drawn with replacement: errors in one recording, or of one speaker, go
    together. `groups_N` names each row's group; a row named "" or without names is its own.
    (NaN, NaN) when fewer than two groups have reference words: one recording says nothing of the
    spread. A draw without any reference word has no rate and does not count.
    """
    group_N = _group_numbers(groups_N, len(errors_N))
    errors_G = np.bincount(group_N, weights=errors_N)  # ValueError when the rows do not match
    words_G = np.bincount(group_N, weights=words_N)
    if np.count_nonzero(words_G) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(resamples):
        drawn_G = rng.integers(len(words_G), size=len(words_G))
        if words := words_G[drawn_G].sum():
            rates.append(errors_G[drawn_G].sum() / words)
    if not rates:
        return float("nan"), float("nan")
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(
    errors_2N: Int[np.ndarray, "2 N"],
    words_N: Int[np.ndarray, " N"],
    groups_N: Sequence[str] | None = None,
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
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
    if np.count_nonzero(words_G) < 2:
        return found | {"ci95": [float("nan")] * 2, "p_worse": float("nan")}
    rng = np.random.default_rng(seed)
    differences = []
    for _ in range(resamples):
        drawn_G = rng.integers(len(words_G), size=len(words_G))
        if words := words_G[drawn_G].sum():
            first, second = errors_2G[:, drawn_G].sum(1)
            differences.append((first - second) / words)
    drawn = np.array(differences or [float("nan")])
    ci95 = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return found | {"ci95": ci95, "p_worse": float(np.mean((drawn > 0) + 0.5 * (drawn == 0)))}


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that is told of one dev set's texts, each side normalised here.

    wer, cer and their 95 % intervals, word error counts, reference words, clips, and how many
    hypotheses are empty though the reference is not.
    """
    ours = [normalize_ivrit(text) for text in references]
    theirs = [normalize_ivrit(text) for text in hypotheses]
    words, characters = word_errors(ours, theirs), character_errors(ours, theirs)
    intervals = [
        bootstrap_interval(c.errors_N, c.length_N, groups, resamples=resamples, seed=seed)
        for c in (words, characters)
    ]
    return {
        "wer": words.rate,
        "ci95": intervals[0],
        "cer": characters.rate,
        "cer_ci95": intervals[1],
        "hits": int(words.hits_N.sum()),
        "substitutions": int(words.substitutions_N.sum()),
        "deletions": int(words.deletions_N.sum()),
        "insertions": int(words.insertions_N.sum()),
        "words": int(words.length_N.sum()),
        "clips": len(ours),
        "empty": sum(not b and bool(a) for a, b in zip(ours, theirs, strict=True)),
    }


def _group_numbers(groups_N: Sequence[str] | None, rows: int) -> np.ndarray:
    """A number for each row's group; a row named "", or without names, is a group of its own."""
    number: dict[str | int, int] = {}
    names = groups_N if groups_N is not None else [""] * rows
    return np.array([number.setdefault(n or i, len(number)) for i, n in enumerate(names)], int)


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

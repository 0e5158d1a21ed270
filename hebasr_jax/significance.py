"""Whether one system is better than another on the same clips: two tests, paired."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from hebasr_jax.metrics import (
    AlignedWord,
    align_words,
    normalize_ivrit,
    paired_interval,
    word_errors,
)

_MIN_RIGHT = 2  # words right in both systems that part two segments: the default of sc_stats


def compare(
    references: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    groups: Sequence[str] | None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """How much the first system's corpus WER is above the second's; texts are normalised here.

    Returns:
      wer_first, wer_second, difference (of the two, above 0 where the second is better), ci95 and
      p_worse of it by the paired bootstrap over `groups` (as `paired_interval`), mapsswe_z (above
      0 where the second is better), mapsswe_p (two-sided) and mapsswe_segments.
    """
    ours, one, two = (
        [normalize_ivrit(text) for text in side] for side in (references, first, second)
    )
    counts = [word_errors(ours, side) for side in (one, two)]
    found = paired_interval(
        np.stack([count.errors_N for count in counts]),
        counts[0].length_N,
        groups,
        resamples=resamples,
        seed=seed,
    )
    errors_S2 = np.concatenate(
        [np.zeros((0, 2), np.int64)]
        + [
            segment_errors(align_words(reference, a), align_words(reference, b))
            for reference, a, b in zip(ours, one, two, strict=True)
        ]
    )
    z, p = matched_pairs(errors_S2)
    return {
        "wer_first": found.pop("wer"),
        "wer_second": counts[1].rate,
        **found,
        "mapsswe_z": z,
        "mapsswe_p": p,
        "mapsswe_segments": len(errors_S2),
    }


def matched_pairs(errors_S2: Int[np.ndarray, "S 2"]) -> tuple[float, float]:
    """z and two-sided p of the Matched Pairs Sentence-Segment Word Error test.

    Gillick and Cox, ICASSP 1989; Pallett et al., ICASSP 1990. Segments count as independent,
    which errors of one speaker are not: the bootstrap over recordings is the careful one. Equal
    totals give (0, 1); differences without spread, as of one segment, have no z: (NaN, NaN).
    """
    difference_S = errors_S2[:, 0] - errors_S2[:, 1]
    if not difference_S.sum():
        return 0.0, 1.0
    if not difference_S.std():
        return float("nan"), float("nan")
    error = difference_S.std(ddof=1) / math.sqrt(len(difference_S))
    z = float(difference_S.mean() / error)
    return z, math.erfc(abs(z) / math.sqrt(2))


def segment_errors(
    first: Sequence[AlignedWord], second: Sequence[AlignedWord]
) -> Int[np.ndarray, "S 2"]:
    """Errors of both systems in each segment of one reference that has any.

    Segments as in sc_stats of NIST: they are bounded by two words or more in a row that both
    systems have right, with nothing inserted between, or by an end of the text.
    """
    segments: list[np.ndarray] = []
    errors_2, right = np.zeros(2, np.int64), 0
    for inserted_2, wrong_2 in np.stack([_by_word(first), _by_word(second)], axis=-1):
        errors_2 = errors_2 + inserted_2 + wrong_2
        right = 0 if wrong_2.any() else 1 if inserted_2.any() else right + 1
        if right >= _MIN_RIGHT and errors_2.any():
            segments.append(errors_2)
            errors_2 = np.zeros(2, np.int64)
    if errors_2.any():
        segments.append(errors_2)
    return np.array(segments, np.int64).reshape(-1, 2)


def _by_word(columns: Sequence[AlignedWord]) -> Int[np.ndarray, "W 2"]:
    """Words inserted before each reference word, and 1 where it is wrong; the end is a word."""
    rows = [[0, 0]]
    for column in columns:
        if column.reference is None:
            rows[-1][0] += 1
        else:
            rows[-1][1] = int(column.operation != "equal")
            rows.append([0, 0])
    return np.array(rows)

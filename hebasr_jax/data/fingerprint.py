"""Audio fingerprints: is a piece of one sound a copy of a piece of another?

The scheme is that of Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR
2002): every 16 ms, 32 bits say in which of 33 bands the energy, against that of the next band,
has grown. Equal words of 32 bits propose an alignment; the share of equal bits around it decides.
A change of gain leaves each bit as it is, and sound above 3.5 kHz plays no part. Unlike the paper,
the windows are short (speech changes faster than music), and quiet frames do not count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int16, UInt32

from hebasr_jax.audio import SAMPLE_RATE

HOP = 256  # samples between frames
_WINDOW = 1024
_SMOOTH = 6  # spectra that a frame's energies are averaged over, and hops to those compared with
SPAN = _WINDOW + (2 * _SMOOTH - 1) * HOP  # samples that a frame looks at: 0.24 s
_BITS = 32
_BAND_HZ = (250.0, 3500.0)  # what a telephone lets through
_BLOCK_FRAMES = 1875  # 30 s at a time
_QUIET = 1e-4  # 40 dB under the loudest frame of a block
_COMPARED = 192  # frames around a proposed alignment that decide: 3 s
_MIN_FRAMES = 32  # of them that must be loud in both: half a second
MIN_SHARE = 0.75  # the paper takes 0.65, which repeated phrases of one voice reach
_SPREAD = 2.0  # shorter pieces agree by chance more often: docs/evaluation.md
_COMMON = 256  # a word that stands in the index more often than this proposes nothing
_AT_ONCE = 4096  # alignments compared at a time


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Frame t looks at samples HOP * t to HOP * t + SPAN. `loud_T`: what its bits say counts."""

    bits_T: UInt32[np.ndarray, " T"]
    loud_T: Bool[np.ndarray, " T"]

    @property
    def too_short(self) -> bool:
        """Whether no copy can be found: too little sound, or too little that is not silence."""
        return int(self.loud_T.sum()) < _MIN_FRAMES


@dataclass(frozen=True, eq=False)
class Index:
    """Clips to be looked for: the frames of all, one clip after the other, and where words stand.

    13 bytes a frame, 2.9 MB an hour. Clip c has frames start_D[c] to start_D[c + 1].
    """

    bits_G: UInt32[np.ndarray, " G"]
    loud_G: Bool[np.ndarray, " G"]
    start_D: Int[np.ndarray, " D"]
    word_N: UInt32[np.ndarray, " N"]  # those of loud frames, in order
    at_N: Int[np.ndarray, " N"]  # the frame of each


class Match(NamedTuple):
    """A copy: where it lies in the clip of the index, and in the sound that was looked at.

    score: share of the bits that agree over the best 3 s (or all that both have, where that is
    less); 0.5 by chance, 1 for the same samples.
    """

    clip: int
    start_s: float
    end_s: float
    other_start_s: float
    other_end_s: float
    score: float


def fingerprint(wave_S: Int16[np.ndarray, " S"]) -> Fingerprint:
    """The fingerprint of int16 samples at 16 kHz, any number of them; under SPAN it is empty."""
    frames = max(0, (len(wave_S) - SPAN) // HOP + 1)
    parts = [
        _block(wave_S[HOP * first : HOP * (min(first + _BLOCK_FRAMES, frames) - 1) + SPAN])
        for first in range(0, frames, _BLOCK_FRAMES)
    ]
    bits = [np.zeros(0, np.uint32), *(part.bits_T for part in parts)]
    return Fingerprint(
        np.concatenate(bits), np.concatenate([np.zeros(0, bool), *(part.loud_T for part in parts)])
    )


def build_index(fingerprints: Iterable[Fingerprint]) -> Index:
    """An index of the smaller side; clips are known by their number."""
    prints = [Fingerprint(np.zeros(0, np.uint32), np.zeros(0, bool)), *fingerprints]
    bits_G = np.concatenate([part.bits_T for part in prints])
    loud_G = np.concatenate([part.loud_T for part in prints])
    at_N = np.flatnonzero(loud_G).astype(np.int32)
    at_N = at_N[np.argsort(bits_G[at_N], kind="stable")]
    start_D = np.cumsum([len(part.bits_T) for part in prints])
    return Index(bits_G, loud_G, start_D, bits_G[at_N], at_N)


def find_copies(index: Index, other: Fingerprint, min_share: float = MIN_SHARE) -> list[Match]:
    """Clips of the index that share sound with `other`, a match for each alignment, best first.

    An alignment is a match when at least `min_share` of the bits agree around some frame, and at
    least 0.5 + 2 / sqrt(n) where only n frames can be compared. Either may hold the other.
    """
    at_K, frame_K = _proposals(index, other)
    found = [np.zeros((0, 5))]
    for first in range(0, len(at_K), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        found.append(_compare(index, other, at_K[part], frame_K[part], min_share))
    rows = np.concatenate(found)  # clip, shift, first and last frame in the clip, share
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    # The frames of two cuts lie up to half a hop apart, so that a copy shows at two shifts.
    new = (np.diff(rows[:, 0]) != 0) | (np.diff(rows[:, 1]) > 2)
    groups = np.split(rows, np.flatnonzero(new) + 1) if len(rows) else []
    return sorted((_match(group) for group in groups), key=lambda match: -match.score)


def _block(wave_S: np.ndarray) -> Fingerprint:
    frame_TW = np.lib.stride_tricks.sliding_window_view(wave_S, _WINDOW)[::HOP]
    hann_W, filters_FM = _filters()
    power_TF = np.square(np.abs(np.fft.rfft(frame_TW * hann_W, axis=1)))
    energy_TM = _smooth(power_TF @ filters_FM)
    slope_TM = energy_TM[:, :-1] - energy_TM[:, 1:]
    grown_TM = slope_TM[_SMOOTH:] > slope_TM[:-_SMOOTH]
    level_T = energy_TM.sum(axis=1)
    level_T = level_T[_SMOOTH:] + level_T[:-_SMOOTH]
    rounding = 2 * np.square(hann_W).sum() * filters_FM.sum()  # noise of one step of int16
    loud_T = level_T > max(_QUIET * level_T.max(), rounding)
    return Fingerprint(np.packbits(grown_TM, axis=1).view(">u4")[:, 0].astype(np.uint32), loud_T)


def _smooth(energy_TM: np.ndarray) -> np.ndarray:
    weight_K = np.hanning(_SMOOTH + 2)[1:-1].astype(np.float32)
    frames = len(energy_TM) - _SMOOTH + 1
    parts = [weight * energy_TM[k : k + frames] for k, weight in enumerate(weight_K)]
    return np.sum(parts, axis=0) / weight_K.sum()


@cache
def _filters() -> tuple[np.ndarray, np.ndarray]:
    """The Hann window, and triangles [F, 33] whose centres are evenly spaced in log frequency."""
    hertz_F1 = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)[:, None]
    edge = np.geomspace(*_BAND_HZ, _BITS + 3)
    up_FM = (hertz_F1 - edge[:-2]) / (edge[1:-1] - edge[:-2])
    down_FM = (edge[2:] - hertz_F1) / (edge[2:] - edge[1:-1])
    filters_FM = np.maximum(0, np.minimum(up_FM, down_FM))
    return np.hanning(_WINDOW).astype(np.float32), filters_FM.astype(np.float32)


def _proposals(index: Index, other: Fingerprint) -> tuple[np.ndarray, np.ndarray]:
    """Frames of the index and of `other` with the same word, one of each 3 s of an alignment."""
    frame_T = np.flatnonzero(other.loud_T)
    word_T = other.bits_T[frame_T]
    first_T = np.searchsorted(index.word_N, word_T, "left")
    count_T = np.searchsorted(index.word_N, word_T, "right") - first_T
    count_T[count_T > _COMMON] = 0
    frame_K = np.repeat(frame_T, count_T)
    within_K = np.arange(len(frame_K)) - np.repeat(np.cumsum(count_T) - count_T, count_T)
    at_K = index.at_N[np.repeat(first_T, count_T) + within_K].astype(np.int64)
    cell_K = (at_K - frame_K + len(other.bits_T)) << 32 | at_K // _COMPARED
    one_K = np.unique(cell_K, return_index=True)[1]
    return at_K[one_K], frame_K[one_K]


def _compare(
    index: Index, other: Fingerprint, at_K: np.ndarray, frame_K: np.ndarray, min_share: float
) -> np.ndarray:
    """The proposals that hold: rows of clip, shift, first frame, frame after the last, share."""
    clip_K = np.searchsorted(index.start_D, at_K, "right") - 1
    shift_K = at_K - frame_K
    low_K = np.maximum(index.start_D[clip_K], shift_K)
    high_K = np.minimum(index.start_D[clip_K + 1], shift_K + len(other.bits_T))
    first_K = np.clip(at_K - _COMPARED // 2, low_K, np.maximum(low_K, high_K - _COMPARED))
    last_K = np.minimum(first_K + _COMPARED, high_K)
    there_KT = first_K[:, None] + np.arange(_COMPARED)
    inside_KT = there_KT < last_K[:, None]
    there_KT = np.minimum(there_KT, last_K[:, None] - 1)
    here_KT = there_KT - shift_K[:, None]
    counts_KT = inside_KT & index.loud_G[there_KT] & other.loud_T[here_KT]
    wrong_KT = np.bitwise_count(index.bits_G[there_KT] ^ other.bits_T[here_KT])
    frames_K = counts_KT.sum(axis=1)
    wrong_K = np.sum(wrong_KT, axis=1, where=counts_KT, dtype=np.int64)
    share_K = 1 - wrong_K / np.maximum(1, _BITS * frames_K)
    least_K = np.maximum(min_share, 0.5 + _SPREAD / np.sqrt(np.maximum(1, frames_K)))
    holds_K = (frames_K >= _MIN_FRAMES) & (share_K >= least_K)
    start_K = index.start_D[clip_K]
    rows = [clip_K, shift_K - start_K, first_K - start_K, last_K - start_K, share_K]
    return np.stack(rows, axis=1)[holds_K]


def _match(rows: np.ndarray) -> Match:
    """One match of the rows of one alignment."""
    clip, shift, _, _, share = rows[np.argmax(rows[:, 4])]
    start, end = rows[:, 2].min() * HOP, (rows[:, 3].max() - 1) * HOP + SPAN
    sample_4 = np.array([start, end, start - shift * HOP, end - shift * HOP])
    start_s, end_s, other_start_s, other_end_s = (sample_4 / SAMPLE_RATE).round(2).tolist()
    score = round(float(share), 4)
    return Match(int(clip), start_s, end_s, other_start_s, other_end_s, score)

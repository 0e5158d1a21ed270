"""One clip's sound to int16 samples: from a file, from bytes, or from a piece of a recording."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE, read_audio
from hebasr_jax.data.clips import BadClip
from hebasr_jax.errors import UserError

# Manifests round durations, and decoders differ by up to two MP3 frames (0.14 s at 16 kHz).
ROUNDING_S = 0.2
LONGEST_S = 4 * 3600.0  # of a clip: 2 GB while it is decoded
_TELLS_LENGTH = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG"})
_UNKNOWN_FRAMES = 1 << 36  # a FLAC header that leaves the length open
_BLOCK_VALUES = 1 << 18
_MARGIN_S = 0.1  # of sound around a piece, so that the resampler sees what surrounds it


@contextlib.contextmanager
def as_file(data: bytes | memoryview) -> Iterator[Path]:
    """A path at which decoders find `data`, in memory where the system has memfd.

    Decoders called with a path run beside other threads; a Python file object would hold the GIL.
    """
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("clip"), "wb", buffering=0) as file:
            file.write(data)  # to memory: never in part
            yield Path(f"/proc/self/fd/{file.fileno()}")
    else:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            yield Path(file.name)


def read_sound(path: Path, duration_s: float, where: str) -> np.ndarray:
    """A whole file as int16 [S] at 16 kHz, with what lasts up to `ROUNDING_S` beyond duration_s.

    Decoding stops there, so a false header costs nothing. Raises
    `BadClip`, naming `where`, for whatever `audio.read_audio` refuses, and for sound that is more
    than `ROUNDING_S` longer or shorter than `duration_s`.
    """
    return _to_int16(_decode(path, duration_s + ROUNDING_S, where), duration_s, where)


def read_piece(path: Path, start_s: float, end_s: float, where: str) -> np.ndarray:
    """The piece from start_s to end_s of a recording as int16 [S] at 16 kHz, without the rest.

    Equal to that part of the whole recording, but for the level of one that passes full scale: the
    piece is scaled by its own peak, since the recording's is known only once all is decoded. Only
    for formats that libsndfile reads; raises `BadClip` for others, for damage, and when the
    recording ends before the piece.
    """
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(os.fsencode(path)) as sound:
            rate = sound.samplerate
            before_s = max(0, math.floor(start_s - _MARGIN_S))  # whole: a sample at either rate
            sound.seek(min(before_s * rate, sound.frames))
            wave = _read_frames(sound, math.ceil((end_s + _MARGIN_S - before_s) * rate))
    except soundfile.LibsndfileError as error:
        raise BadClip("piece of a recording cannot be read", f"{where}: {error}") from error
    if not np.isfinite(wave).all():
        raise BadClip("has samples that are NaN or infinite", where)
    if rate != SAMPLE_RATE and len(wave):
        wave = soxr.resample(wave, rate, SAMPLE_RATE, quality="VHQ")
    first = round((start_s - before_s) * SAMPLE_RATE)
    piece = wave[first : first + round((end_s - start_s) * SAMPLE_RATE)]
    peak = np.abs(piece).max(initial=1.0)  # as of files: of what is resampled, which may overshoot
    return _to_int16(piece / peak, end_s - start_s, where)


def sound_duration_s(path: Path, where: str) -> float:
    """Seconds of sound in a file: from its header where that can be trusted, else by decoding."""
    import soundfile

    with contextlib.suppress(soundfile.LibsndfileError, OSError):
        info = soundfile.info(os.fsencode(path))
        if info.format in _TELLS_LENGTH and 0 < info.frames < _UNKNOWN_FRAMES:
            return info.frames / info.samplerate
    return len(_decode(path, LONGEST_S, where)) / SAMPLE_RATE


def _decode(path: Path, limit_s: float, where: str) -> np.ndarray:
    try:
        return read_audio(path, max_seconds=limit_s)
    except UserError as error:
        what, *rest = str(error).split("\n")
        reason = what.removeprefix(f"{path}: ")
        if reason.startswith("is longer than the limit"):
            raise BadClip(
                "lasts longer than its row says", f"{where}: over {limit_s:g} s"
            ) from None
        raise BadClip(reason, " ".join([where, *rest])) from error


def _read_frames(sound: "soundfile.SoundFile", frames: int) -> np.ndarray:  # noqa: F821
    """Mono float32 of at most so many frames; memory grows with what is there, not what is said."""
    sound.seekable = lambda: False  # as in audio.py: soundfile would seek after each block
    blocks = [np.zeros(0, np.float32)]
    while frames > 0:
        block = sound.read(
            min(frames, max(1, _BLOCK_VALUES // sound.channels)), "float32", always_2d=True
        )
        if not len(block):
            break
        frames -= len(block)
        blocks.append(block.mean(axis=1))
    return np.concatenate(blocks)


def _to_int16(wave: np.ndarray, duration_s: float, where: str) -> np.ndarray:
    """Float samples to int16, if all are there. 16-bit sound at 16 kHz comes back unchanged."""
    if len(wave) < round(duration_s * SAMPLE_RATE) - ROUNDING_S * SAMPLE_RATE:
        told = f"{len(wave) / SAMPLE_RATE:.2f} of {duration_s:.2f} s are there"
        raise BadClip("is shorter than its row says", f"{where}: {told}")
    if not len(wave):
        raise BadClip("holds no sound (zero samples)", where)
    return np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)

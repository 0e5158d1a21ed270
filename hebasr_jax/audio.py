"""Any audio file -> float32 mono at 16 kHz. Limits hold on what is decoded, never on headers."""

import functools
import glob
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hebasr_jax.errors import UserError

SAMPLE_RATE = 16_000
# fmt: off
AUDIO_SUFFIXES = frozenset({
    ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".webm", ".mka", ".mkv",
    ".aac", ".3gp", ".wma", ".aif", ".aiff", ".au", ".caf", ".w64",
})
# fmt: on

Block = tuple[int, np.ndarray]  # sampling rate in Hz, mono float32 [samples]

_BLOCK_VALUES = 1 << 18  # values decoded at a time, over all channels: 1 MiB
_RATES_HZ = range(1_000, 768_001)
# libsndfile shortens a WAV, AIFF, AU, W64 or RF64 to what is there, and only its log tells.
_SHORTENED = re.compile(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)")
# Writers that cannot seek back leave 0x7FFFF000, 0x80000000 or 0xFFFFFFFF as the size.
_PLACEHOLDER_BYTES = 0x7FFF0000
_SLACK_BYTES = 64  # some writers count the header itself among the data
_OGG_PAGE_BYTES = 65_307
# What a frame or page of sound begins with, by libsndfile's format name.
_FRAME_MARKS = {
    "MP3": rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",
    "OGG": b"OggS",
    "FLAC": rb"\xff[\xf8\xf9]",
}
# Closed lists: a file must not make ffmpeg open playlists, other files or the network.
_AV_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,mp3,ogg,flac,wav,asf",
}


class _LeaveToAv(Exception):
    """libsndfile cannot read the file, or not all of it."""


def read_audio(path: Path, *, max_seconds: float) -> np.ndarray:
    """Decode a file to mono float32 [samples] at 16 kHz within [-1, 1].

    Channels are averaged; only a peak above 1 changes the level (the sound is divided by it).
    Raises UserError for what is not readable sound, is cut or damaged, has samples that are not
    finite, or lasts longer than `max_seconds`: then decoding stops, with bounded memory.
    """
    return np.concatenate(list(stream_audio(path, max_seconds=max_seconds, kept_s=max_seconds)))


def stream_audio(
    path: Path, *, max_seconds: float = math.inf, kept_s: float = 120.0
) -> Iterator[np.ndarray]:
    """What `read_audio` returns and raises, sample for sample, in blocks of some seconds.

    The level follows the peak of the whole file, and a fault at its end is found before anything
    is yielded: a file longer than `kept_s`, the most that is held in memory, is decoded twice.
    """
    try:
        _check_file(path)
        try:
            decode = functools.partial(_blocks_16k, path, _sndfile_blocks, max_seconds)
            kept, peak = _survey(path, decode(), kept_s)
        except _LeaveToAv as fault:
            by_av = functools.partial(_av_blocks, reason=str(fault))
            decode = functools.partial(_blocks_16k, path, by_av, max_seconds)
            kept, peak = _survey(path, decode(), kept_s)
        for block in kept or decode():
            yield block / peak if peak > 1 else block
    except OSError as error:
        raise UserError(f"{path}: cannot be read", error.strerror or "") from error


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files named by paths, folders (searched for audio suffixes) and globs, without repeats.

    An existing path is never taken as a glob. Raises UserError for a pattern that gives no file.
    """
    files: dict[str, Path] = {}
    for pattern in patterns:
        given = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [file for name in given for file in _audio_files(Path(name))]
        if not found:
            raise UserError(
                f"{pattern}: no such file" if not given else f"{pattern}: has no audio file in it",
                f"Folders are searched for {' '.join(sorted(AUDIO_SUFFIXES))}." if given else "",
                "Check the path; quote a glob so that it arrives whole.",
            )
        for file in found:
            files.setdefault(os.path.abspath(file), file)
    return list(files.values())


def _audio_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in AUDIO_SUFFIXES
        and not file.name.startswith(".")
        and file.is_file()
    )


def _check_file(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file", "", "Check the path.")
    if not path.is_file():
        raise UserError(f"{path}: is a folder or a device, not a file", "", "Give an audio file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty (zero bytes)", "", "Record or download it again.")


def _survey(
    path: Path, blocks: Iterator[np.ndarray], kept_s: float
) -> tuple[list[np.ndarray], np.float32]:
    """Decodes a file to its end: its blocks, or none if they last over `kept_s`, and its peak."""
    kept: list[np.ndarray] = []
    samples, peak = 0, np.float32(0)
    for block in blocks:
        samples += len(block)
        peak = np.maximum(peak, max(block.max(initial=0), -block.min(initial=0)))  # NaN stays
        if samples <= kept_s * SAMPLE_RATE + 1:  # resampling may add a sample
            kept.append(block)
        else:
            kept.clear()
    if not np.isfinite(peak):
        raise UserError(f"{path}: has samples that are NaN or infinite", "", "Export it again.")
    return kept, peak


def _blocks_16k(
    path: Path, decode: Callable[[Path], Iterator[Block]], max_seconds: float
) -> Iterator[np.ndarray]:
    """Resamples blocks to 16 kHz; stops at the first one over the limit."""
    import soxr

    decoded = 0
    stream = None
    with closing(decode(path)) as blocks:  # type: ignore[type-var]
        for rate, block in blocks:
            decoded += len(block)
            if rate not in _RATES_HZ:
                raise UserError(f"{path}: claims {rate} samples per second", "The file is damaged.")
            if decoded > max_seconds * rate:
                raise UserError(
                    f"{path}: is longer than the limit of {max_seconds:g} s",
                    "Nothing is cut silently, so no part of it was taken.",
                    "Split it.",
                )
            if rate != SAMPLE_RATE:
                stream = stream or soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "VHQ")
                block = stream.resample_chunk(block)
            yield block
    if not decoded:
        raise UserError(f"{path}: holds no sound (zero samples)", "", "Record or export it again.")
    if stream:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _sndfile_blocks(path: Path) -> Iterator[Block]:
    import soundfile

    with path.open("rb", buffering=0) as raw:
        try:
            sound = soundfile.SoundFile(raw.fileno(), closefd=False)
        except (soundfile.SoundFileError, ValueError) as error:
            raise _LeaveToAv("libsndfile does not know its format or finds it damaged.") from error
        with sound:
            # soundfile seeks after every read of a seekable file, which breaks MP3 at each block.
            sound.seekable = lambda: False
            buffer = np.empty((max(1, _BLOCK_VALUES // sound.channels), sound.channels), np.float32)
            decoded = 0
            try:
                # Asked for more than the header tells, libsndfile reads on and drops the rest.
                while left := min(len(buffer), sound.frames - decoded):
                    block = sound.read(out=buffer[:left])
                    if not len(block):
                        break
                    decoded += len(block)
                    yield sound.samplerate, block.mean(axis=1)
            except soundfile.LibsndfileError as error:
                raise _cut(path, error.error_string.removeprefix("Error : ").rstrip(".")) from error
            _check_complete(path, raw, sound, decoded)


def _check_complete(path: Path, raw: BinaryIO, sound: Any, decoded: int) -> None:
    """Refuse a file cut short where its format can tell; leave to av what is read only in part."""
    kind = sound.format
    unread = raw.read(1 << 20)
    if kind == "FLAC" and decoded < sound.frames < 1 << 36:  # larger: its writer did not know
        raise _cut(path, f"{decoded} of {sound.frames} promised samples are there")
    for promised, present in _SHORTENED.findall(sound.extra_info):
        if int(present) + _SLACK_BYTES < int(promised) < _PLACEHOLDER_BYTES:
            raise _cut(path, f"{present} of {promised} promised bytes are there")
    if kind in ("WAV", "WAVEX") and path.stat().st_size >= 1 << 32:
        raise _cut(path, "a WAV header cannot tell a length over 4 GiB")
    if kind == "OGG" and _last_ogg_page_is_cut(raw):
        raise _cut(path, "the last Ogg page is incomplete")
    # The length in an MP3 head may be an estimate; in chained Ogg it is that of the first link.
    if kind in _FRAME_MARKS and re.search(_FRAME_MARKS[kind], unread):
        raise _LeaveToAv("Its header describes only a part of the sound; libsndfile reads no more.")


def _cut(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: is cut or damaged", f"Decoding stopped: {why}.", "Copy or export the file again."
    )


def _last_ogg_page_is_cut(raw: BinaryIO) -> bool:
    end = raw.seek(0, os.SEEK_END)
    raw.seek(max(0, end - _OGG_PAGE_BYTES))
    tail = raw.read()
    page = tail[tail.rfind(b"OggS") :]
    lacing = page[27 : 27 + page[26]] if len(page) > 26 else b""
    return len(page) < 27 or len(page) < 27 + page[26] + sum(lacing)


def _av_blocks(path: Path, reason: str) -> Iterator[Block]:
    """Decode by ffmpeg what libsndfile leaves; `reason` is told when PyAV is not installed."""
    try:
        import av
    except ImportError as error:
        do = "Convert it to wav or flac; or, for m4a, mp4, webm: pip install 'hebasr-jax[av]'"
        raise UserError(f"{path}: cannot be read", reason, do) from error
    try:
        with av.open(f"file:{path}", options=_AV_OPTIONS) as container:
            if not container.streams.audio:
                raise UserError(f"{path}: has no sound track", "", "Give a file with sound.")
            decoded_s = 0.0
            to_float = av.AudioResampler(format="fltp")  # rate and channels stay as they are
            for frame in container.decode(container.streams.audio[0]):
                for part in to_float.resample(frame):
                    decoded_s += part.samples / part.sample_rate
                    yield part.sample_rate, part.to_ndarray().mean(axis=0)
            exact = "mp4" in container.format.name or "matroska" in container.format.name
            promised_s = (container.duration or 0) / av.time_base
            # Half a second: encoder delay and padding. With video it is the video's duration.
            if exact and not container.streams.video and decoded_s < promised_s - 0.5:
                raise _cut(path, f"{decoded_s:.1f} of {promised_s:.1f} promised seconds are there")
    except (av.FFmpegError, ValueError) as error:
        why = f"{reason} ffmpeg: {getattr(error, 'strerror', None) or error}."
        raise UserError(
            f"{path}: cannot be read as sound", why, "Convert it to wav or flac."
        ) from error

"""Shards: ArrayRecord files of decoded clips, a manifest beside each, a seal when it is whole.

A folder of shards holds `set.json`, and for each shard K of N
  K-of-N.arrayrecord  records: length of a JSON header (4 bytes, little endian), header, audio
  K-of-N.jsonl        one manifest row for each record, `audio` being `K-of-N.arrayrecord#ROW`
  K-of-N.json         the seal: sizes and sha256 of both, clips left out; written last
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import BadClip, Clip
from hebasr_jax.data.decode import as_file
from hebasr_jax.errors import UserError

Format = Literal["pcm", "flac"]
SET_FILE = "set.json"
REMOVED_FILE = "removed.jsonl"  # rows left out on purpose, each with its reason
ORIGIN_FILE = "origin.json"  # where the clips are from, such as a set of the hub, and the licence
SUFFIX = ".arrayrecord"
WRITER_OPTIONS = "group_size:1,uncompressed"  # each record by itself; sound does not compress
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_VERSION = 1
_OPEN_FILES = 256  # below the usual limit of 1,024 for a process


@dataclass(frozen=True)
class ShardSet:
    """What `set.json` holds: which clips the shards are made of, and how."""

    name: str
    fingerprint: str
    """of the source"""
    clips: int
    format: Format
    shards: int
    version: int = _VERSION


def stem(shard: int, shards: int) -> str:
    """File name, without its ending, of a shard (from 0)."""
    return f"{shard:05d}-of-{shards:05d}"


def pack(clip: Clip, wave: np.ndarray, kind: Format) -> bytes:
    """A clip and its int16 [S] samples at 16 kHz as one record."""
    header = json.dumps(manifest_row(clip) | {"format": kind, "samples": len(wave)}).encode()
    return len(header).to_bytes(4, "little") + header + _encode(wave, kind)


def unpack(record: bytes) -> np.ndarray:
    """The int16 [S] samples of a record. Raises ValueError for what `pack` did not write."""
    start = 4 + int.from_bytes(record[:4], "little")
    header = json.loads(record[4:start])
    wave = _decode(memoryview(record)[start:], header["format"])
    if len(wave) != header["samples"]:
        raise ValueError(f"{len(wave)} of {header['samples']} samples are there")
    return wave


def shard_reader() -> Callable[[Path, int, str], np.ndarray]:
    """A function from a shard, a record and a name for messages to samples; thread-safe."""
    from array_record.python.array_record_module import ArrayRecordReader

    opened = functools.lru_cache(_OPEN_FILES)(ArrayRecordReader)

    def read(file: Path, row: int, where: str) -> np.ndarray:
        try:
            return unpack(opened(os.fsencode(file), _READER_OPTIONS).read([row])[0])
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise BadClip("shard cannot be read", f"{where}: {error}") from error

    return read


def read_set(folder: Path) -> ShardSet:
    """`set.json` of a folder. Raises UserError when this version cannot read it."""
    file = folder / SET_FILE
    try:
        values = json.loads(file.read_bytes())
        if values.get("version") != _VERSION or set(values) != {f.name for f in fields(ShardSet)}:
            raise ValueError(f"version is {values.get('version')}, not {_VERSION}")
    except (OSError, ValueError, AttributeError) as error:
        do = "Prepare the set again, into a new folder."
        raise UserError(f"{file}: is not readable", str(error), do) from error
    return ShardSet(**values)


def read_origin(folder: Path) -> dict[str, Any]:
    """What `prepare` put down beside shards of where they are from; {} where it did not."""
    try:
        told = json.loads((folder / ORIGIN_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def is_sealed(folder: Path, name: str, *, thorough: bool) -> bool:
    """Whether a shard is whole: its files have the sealed sizes and, if thorough, sha256."""
    try:
        seal = json.loads((folder / f"{name}.json").read_bytes())
        return all(
            (folder / file).stat().st_size == sealed["bytes"]
            and (not thorough or file_digest(folder / file) == sealed["sha256"])
            for file, sealed in seal["files"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def is_whole(folder: Path) -> bool:
    """Whether all shards are there, each with the sealed sha256."""
    if not (folder / SET_FILE).is_file():
        return False
    shards = read_set(folder).shards
    names = [stem(shard, shards) for shard in range(shards)]
    return all(  # sizes first: what is not there is seen before anything is hashed
        is_sealed(folder, name, thorough=thorough) for thorough in (False, True) for name in names
    )


def seals(folder: Path) -> list[dict[str, Any]]:
    """What each shard of a whole set was sealed with."""
    shards = read_set(folder).shards
    return [json.loads((folder / f"{stem(n, shards)}.json").read_bytes()) for n in range(shards)]


def left_out(folder: Path) -> frozenset[str]:
    """Ids of the clips that a prepared set was made without, on purpose or as bad."""
    if not (folder / SET_FILE).is_file():
        return frozenset()
    files = [folder / REMOVED_FILE, *folder.glob("quarantine*.jsonl")]
    lines = [line for file in files if file.is_file() for line in file.read_bytes().splitlines()]
    return frozenset(str(json.loads(line).get("id")) for line in lines if line.strip())


def shard_rows(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Manifest lines of all shards with the place of each. Raises UserError when shards lack."""
    shards = read_set(folder).shards
    names = [stem(shard, shards) for shard in range(shards)]
    lacking = [name for name in names if not is_sealed(folder, name, thorough=False)]
    if lacking:
        raise UserError(
            f"{folder}: {len(lacking)} of {shards} shards are missing or not whole",
            f"They are {', '.join(lacking[:5])}{' ...' if len(lacking) > 5 else ''}.",
            "Run prepare again with the same arguments: it makes only what is missing.",
        )
    for name in names:
        file = folder / f"{name}.jsonl"
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            yield f"{file}:{number}", line


def manifest_row(clip: Clip, audio: str = "") -> dict[str, Any]:
    """The manifest row (design 4.7) of a clip; fields that say nothing are left out."""
    row = {"audio": audio} | asdict(clip)
    row["segments"] = [
        {"start_s": segment.start_s, "end_s": segment.end_s, "text": segment.text}
        for segment in clip.segments
    ]
    # A quality of 0 says much.
    kept = {"text"} | ({"quality"} if clip.quality is not None else set())
    return {name: value for name, value in row.items() if value or name in kept}


def write_synced(file: Path, content: bytes) -> None:
    """Writes a file so that a reader, also after a power cut, sees all of it or nothing."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        publish(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, file: Path) -> None:
    """Gives a finished file its name, once its content is on the disk."""
    for path in (partial, partial.parent):
        if path == partial.parent:
            partial.replace(file)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _encode(wave: np.ndarray, kind: Format) -> bytes:
    import soundfile

    if kind == "pcm":
        return wave.astype("<i2").tobytes()
    with as_file(b"") as file:
        soundfile.write(file, wave, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
        return file.read_bytes()


def _decode(sound: memoryview, kind: str) -> np.ndarray:
    import soundfile

    if kind == "pcm":
        return np.frombuffer(sound, "<i2").astype(np.int16)
    if kind != "flac":
        raise ValueError(f"format {kind!r} is not known")
    with as_file(sound) as file:
        try:
            return soundfile.read(file, dtype="int16")[0]
        except soundfile.LibsndfileError as error:
            raise ValueError(str(error)) from error

"""One shard made from its clips: the unit of work that threads, processes and machines share."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hebasr_jax.data.clips import BadClip, Clip
from hebasr_jax.data.shards import (
    SUFFIX,
    WRITER_OPTIONS,
    Format,
    file_digest,
    manifest_row,
    pack,
    publish,
    write_synced,
)
from hebasr_jax.errors import UserError

AGAIN = "Then run the same command again: finished shards are kept."
BadRow = tuple[str, str, str]  # id, reason, detail


@dataclass(frozen=True, eq=False)
class ShardWork:
    """All that a shard is made of; it can be sent to another process where `read` can.

    name: of its files, without their endings. read: from an index into `clips` to samples.
    most_bad: bad clips from which on the shard is given up.
    """

    folder: Path
    name: str
    format: Format
    clips: tuple[Clip, ...]
    read: Callable[[int], np.ndarray]
    most_bad: float


def make_shard(work: ShardWork, stopped: Callable[[], bool] = lambda: False) -> list[BadRow]:
    """Writes a shard, its manifest, and last its seal; returns the clips that were left out.

    A shard that is stopped, or has too many bad clips, is not written. The same work gives the
    same bytes. Raises UserError for a disk that is full or refuses.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    folder = work.folder
    audio, manifest = folder / f"{work.name}{SUFFIX}", folder / f"{work.name}.jsonl"
    rows: list[bytes] = []
    bad: list[BadRow] = []
    remove_partials(folder, work.name)
    partial = folder / f".{work.name}.{os.getpid()}.partial"
    try:
        with writing(folder):
            writer = ArrayRecordWriter(os.fsencode(partial), WRITER_OPTIONS)
        try:
            for index, clip in enumerate(work.clips):
                if stopped():
                    return bad
                try:
                    record = pack(clip, work.read(index), work.format)
                except BadClip as fault:
                    bad.append((clip.id, fault.reason, fault.detail))
                    if len(bad) > work.most_bad:
                        return bad
                    continue
                row = manifest_row(clip, f"{audio.name}#{len(rows)}")
                rows.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                with writing(folder):
                    writer.write(record)
        finally:
            with writing(folder):
                writer.close()
        with writing(folder):
            if ArrayRecordReader(os.fsencode(partial)).num_records() != len(rows):
                raise OSError(f"{partial} does not hold the {len(rows)} records written")
            publish(partial, audio)
            write_synced(manifest, b"".join(rows))
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)}
                for file in (audio, manifest)
            }
            seal = {"records": len(rows), "files": files, "bad": bad}
            write_synced(folder / f"{work.name}.json", json.dumps(seal, indent=1).encode())
    finally:
        partial.unlink(missing_ok=True)
    return bad


def remove_partials(folder: Path, name: str) -> None:
    """Removes what a killed process left half-written of a file, or of files with this stem."""
    for partial in folder.glob(f".{name}.*.partial"):
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path, again: str = AGAIN) -> Iterator[None]:
    """Tells faults of the disk as the user's to mend; ArrayRecord raises RuntimeError for them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error).split(";")[0]
        do = f"Free space or mend the disk. {again}"
        raise UserError(f"{folder}: cannot be written", why, do) from error

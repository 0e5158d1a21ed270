"""Sets to shards (`shards.py`): audio decoded once, quick to read at random, spread over jobs."""

import contextlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np

from hebasr_jax.data.clips import BadClip, Clip, ClipSet
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.data.shards import (
    SET_FILE,
    SUFFIX,
    WRITER_OPTIONS,
    Format,
    ShardSet,
    file_digest,
    is_sealed,
    manifest_row,
    pack,
    publish,
    read_set,
    stem,
    write_synced,
)
from hebasr_jax.errors import UserError

_BYTES_PER_S = 32_000  # int16 at 16 kHz
_AGAIN = "Then run the same command again: finished shards are kept."
Progress = Callable[[float], contextlib.AbstractContextManager[Callable[[float], None]]]
BadRow = tuple[str, str, str]  # id, reason, detail
Made = TypeVar("Made")


def plan_set(clip_set: ClipSet, kind: Format, shard_mb: float) -> ShardSet:
    """How a set is cut into shards; depends on nothing but the arguments."""
    size = sum(clip.duration_s for clip in clip_set.clips) * _BYTES_PER_S
    shards = max(1, min(len(clip_set.clips), round(size / (shard_mb * 1e6))))
    return ShardSet(clip_set.name, clip_set.fingerprint, len(clip_set.clips), kind, shards)


def shard_clips(clip_set: ClipSet, shards: int) -> list[range]:
    """The clips of each shard: neighbours, about the same seconds of audio in each."""
    ends_s = np.cumsum([clip.duration_s for clip in clip_set.clips])
    cuts = np.searchsorted(ends_s, ends_s[-1] * np.arange(1, shards) / shards, "right")
    edges = [0, *(int(cut) for cut in cuts), len(clip_set.clips)]
    return [range(*edges[shard : shard + 2]) for shard in range(shards)]


def prepare_set(
    clip_set: ClipSet,
    folder: Path,
    plan: ShardSet,
    *,
    part: int = 1,
    parts: int = 1,
    threads: int = 8,
    max_bad_share: float = 0.01,
    progress: Progress = lambda total_s: contextlib.nullcontext(lambda audio_s: None),
) -> list[str]:
    """Makes those shards of a part that are not whole yet; returns names of shards still lacking.

    Bad clips are left out and put down in `quarantine.jsonl` of the folder. Raises UserError for
    a folder made of another version of the source, too many bad clips, and a full disk; nothing
    half-written is left under a shard's name.
    """
    clips = shard_clips(clip_set, plan.shards)
    mine = range(part - 1, plan.shards, parts)
    which = "" if parts == 1 else f"-{part}-of-{parts}"
    total = sum(len(clips[shard]) for shard in mine) + len(clip_set.bad)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder, plan)
    made = [stem(shard, plan.shards) for shard in range(plan.shards)]
    todo = [shard for shard in mine if not is_sealed(folder, made[shard], thorough=True)]
    quarantine_file = folder / f"quarantine{which}.jsonl"
    quarantine_file.unlink(missing_ok=True)  # what was mended since must not count
    quarantine = Quarantine(quarantine_file, max_bad_share, total)
    quarantine.add_rows([clip_set])
    for shard in sorted(set(mine) - set(todo)):
        for bad in json.loads((folder / f"{made[shard]}.json").read_bytes())["bad"]:
            quarantine.add(clip_set.name, *bad)
    lengths_s = [clip_set.clips[index].duration_s for shard in todo for index in clips[shard]]
    todo_s = sum(lengths_s, start=0.0)
    _check_space(folder, todo_s * _BYTES_PER_S)
    with ThreadPoolExecutor(threads) as pool, progress(todo_s) as advance:

        def make(index: int) -> bytes | BadClip:
            try:
                return pack(clip_set.clips[index], clip_set.read(index), plan.format)
            except BadClip as fault:
                return fault

        def good(indices: range, bad: list[BadRow]) -> Iterator[tuple[Clip, bytes]]:
            for index, record in _in_order(pool, make, indices, 2 * threads):
                clip = clip_set.clips[index]
                advance(clip.duration_s)
                if isinstance(record, BadClip):
                    bad.append((clip.id, record.reason, record.detail))
                    quarantine.add(clip_set.name, *bad[-1])
                else:
                    yield clip, record

        for shard in todo:
            for partial in folder.glob(f".{made[shard]}.*.partial"):
                partial.unlink(missing_ok=True)
            bad_rows: list[BadRow] = []
            _write_shard(folder, made[shard], good(clips[shard], bad_rows), bad_rows)
    return [name for name in made if not is_sealed(folder, name, thorough=False)]


def _settle(folder: Path, plan: ShardSet) -> None:
    """Writes `set.json`; or refuses a folder with shards that were made of something else."""
    if not any(folder.glob(f"*{SUFFIX}")):
        write_synced(folder / SET_FILE, json.dumps(asdict(plan), indent=1).encode())
        return
    then, now = asdict(read_set(folder)), asdict(plan)
    changed = [f"{name} {then[name]} is now {now[name]}" for name in now if then[name] != now[name]]
    if changed:
        raise UserError(
            f"{folder}: its shards were begun with another source or other settings",
            "; ".join(changed),
            "Use the same source, --format and --shard-mb, or give a new --out.",
        )


def _check_space(folder: Path, need: float) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{folder}: may need {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "",
            f"Free space or give another --out. {_AGAIN}",
        )


def _in_order(
    pool: ThreadPoolExecutor, make: Callable[[int], Made], indices: range, ahead: int
) -> Iterator[tuple[int, Made]]:
    """Each index and what `make` gives for it, made in threads, so many ahead of their use."""
    waiting: deque[tuple[int, Future[Made]]] = deque()
    try:
        for index in indices:
            waiting.append((index, pool.submit(make, index)))
            while len(waiting) == ahead or (waiting and index == indices[-1]):
                first, future = waiting.popleft()
                yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _write_shard(
    folder: Path, name: str, records: Iterable[tuple[Clip, bytes]], bad: list[BadRow]
) -> None:
    """Writes a shard, its manifest, and last its seal; `bad` fills as records are taken."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    audio, manifest = folder / f"{name}{SUFFIX}", folder / f"{name}.jsonl"
    partial = folder / f".{name}.{os.getpid()}.partial"
    rows: list[bytes] = []
    try:
        with _writing(folder):
            writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        try:
            for clip, record in records:
                row = manifest_row(clip, f"{audio.name}#{len(rows)}")
                rows.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                with _writing(folder):
                    writer.write(record)
        finally:
            with _writing(folder):
                writer.close()
        with _writing(folder):
            if ArrayRecordReader(str(partial)).num_records() != len(rows):
                raise OSError(f"{partial} does not hold the {len(rows)} records written")
            publish(partial, audio)
            write_synced(manifest, b"".join(rows))
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)}
                for file in (audio, manifest)
            }
            seal = {"records": len(rows), "files": files, "bad": bad}
            write_synced(folder / f"{name}.json", json.dumps(seal, indent=1).encode())
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Tells faults of the disk as the user's to mend; ArrayRecord raises RuntimeError for them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error).split(";")[0]
        do = f"Free space or mend the disk. {_AGAIN}"
        raise UserError(f"{folder}: cannot be written", why, do) from error

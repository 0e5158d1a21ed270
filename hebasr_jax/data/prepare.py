"""Sets to shards (`shards.py`): audio decoded once, quick to read at random, spread over jobs."""

import contextlib
import heapq
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.data.clips import Clip, ClipSet
from hebasr_jax.data.hub_files import HeldFiles
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.data.shard_work import AGAIN, BadRow, ShardWork, writing
from hebasr_jax.data.shards import (
    ORIGIN_FILE,
    SET_FILE,
    SUFFIX,
    Format,
    ShardSet,
    is_sealed,
    read_origin,
    read_set,
    stem,
    write_synced,
)
from hebasr_jax.data.sounds import Sounds
from hebasr_jax.data.workers import Crew, Workers, here
from hebasr_jax.errors import UserError

_BYTES_PER_S = 32_000  # int16 at 16 kHz
Progress = Callable[[float], contextlib.AbstractContextManager[Callable[[float], None]]]


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
    workers: Workers | None = None,
    held: HeldFiles | None = None,
    origin: Mapping[str, Any] | None = None,
    max_bad_share: float = 0.01,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda total_s: contextlib.nullcontext(lambda audio_s: None),
) -> list[str]:
    """Makes those shards of a part that are not whole yet; returns names of shards still lacking.

    Bad clips are left out and put down in `quarantine.jsonl` of the folder. The same bytes come
    of any workers and parts, and after any stop. Raises UserError for a folder made of another
    version of the source, too many bad clips, and a full disk; nothing half-written is left under
    a shard's name.

    Args:
      workers: where shards are made (`workers.py`); None, and for a set that was made in memory:
        in this process, one at a time.
      held: where the set's files are fetched to, for as long as a shard needs them.
      origin: what is put down beside the shards of where they are from; None: nothing is changed.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder, plan, origin)
    clips = shard_clips(clip_set, plan.shards)
    mine = range(plan.shards * (part - 1) // parts, plan.shards * part // parts)
    made = [stem(shard, plan.shards) for shard in range(plan.shards)]
    todo_s = {
        shard: sum(clip_set.clips[index].duration_s for index in clips[shard])
        for shard in mine
        if not is_sealed(folder, made[shard], thorough=True)
    }
    total = len(clip_set.clips) + len(clip_set.bad)  # whatever the part: the verdict is the job's
    quarantine = _anew(folder, part, parts, clip_set, max_bad_share, total)

    def work(shard: int) -> ShardWork:
        some, read = _some(clip_set, clips[shard])
        return ShardWork(folder, made[shard], plan.format, some, read, max_bad_share * total)

    can_be_sent = todo_s and isinstance(clip_set.read, Sounds)
    with workers if workers and can_be_sent else here() as crew, contextlib.ExitStack() as stack:
        fetched = _most_fetched(held, map(work, todo_s), crew.count + 1, say)
        total_s = sum(todo_s.values(), start=0.0)
        _check_space(folder, total_s * _BYTES_PER_S + fetched)
        advance = stack.enter_context(progress(total_s))
        results = stack.enter_context(_made(crew, held, work, todo_s))
        # In order, so that the quarantine is the same after any stop; then what others found.
        for shard in sorted(range(plan.shards), key=lambda shard: shard not in mine):
            done = shard not in todo_s
            bad = _sealed_bad(folder, made[shard]) if done else results[shard].result()
            advance(todo_s.get(shard, 0.0))
            for row in bad:
                quarantine.add(clip_set.name, *row, elsewhere=shard not in mine)
    return [name for name in made if not is_sealed(folder, name, thorough=False)]


def _sealed_bad(folder: Path, name: str) -> list[BadRow]:
    """Clips that were left out of a shard; none of one that is not there."""
    try:
        rows = json.loads((folder / f"{name}.json").read_bytes())["bad"]
        return [(where, why, told) for where, why, told in rows]
    except (OSError, ValueError, KeyError):
        return []


def _anew(
    folder: Path, part: int, parts: int, clip_set: ClipSet, max_bad_share: float, total: int
) -> Quarantine:
    """A quarantine without what was there: what was mended since must not count.

    Lists of other cuttings into parts are removed; those of the other parts stay.
    """
    name = "quarantine" if parts == 1 else f"quarantine-{part}-of-{parts}"
    file = folder / f"{name}.jsonl"
    for old in folder.glob("quarantine*.jsonl"):
        if old == file or not old.stem.endswith(f"-of-{parts}"):
            old.unlink(missing_ok=True)
    quarantine = Quarantine(file, max_bad_share, total)
    quarantine.add_rows([clip_set])
    return quarantine


@contextlib.contextmanager
def _made(
    crew: Crew, held: HeldFiles | None, work: Callable[[int], ShardWork], shards: Iterable[int]
) -> Iterator[dict[int, Future[list[BadRow]]]]:
    """The bad clips of each shard, once it is made. When it is left early, the others are stopped.

    A thread for each shard in the making, and one that fetches the files of the next.
    """

    def make(shard: int) -> list[BadRow]:
        given = work(shard)
        if held is None or not isinstance(given.read, Sounds):
            return crew.make(given)
        with held(_files(given)) as moved:
            return crew.make(replace(given, read=given.read.moved(moved)))

    threads = ThreadPoolExecutor(crew.count + (held is not None))
    try:
        yield {shard: threads.submit(make, shard) for shard in shards}
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        crew.stop()
        raise
    finally:
        threads.shutdown()


def _most_fetched(
    held: HeldFiles | None, works: Iterable[ShardWork], at_once: int, say: Callable[[str], None]
) -> int:
    """Bytes of fetched files that lie on disk at most, with so many shards in the making."""
    if held is None:
        return 0
    most = sum(heapq.nlargest(at_once, (held.size(_files(work)) for work in works)))
    say(f"at most {told_bytes(most)} of the hub's files lie here at a time")
    return most


def _files(work: ShardWork) -> list[Path]:
    assert isinstance(work.read, Sounds)  # only what was opened from files is fetched
    return list(dict.fromkeys(place.file for place in work.read.places))


def _some(
    clip_set: ClipSet, indices: range
) -> tuple[tuple[Clip, ...], Callable[[int], np.ndarray]]:
    """These clips, and what reads them; of a set that was opened from files it can be sent."""
    clips = tuple(clip_set.clips[index] for index in indices)
    if isinstance(clip_set.read, Sounds):
        return clips, clip_set.read.part(indices)
    return clips, lambda index: clip_set.read(indices[index])


def _settle(folder: Path, plan: ShardSet, origin: Mapping[str, Any] | None) -> None:
    """Writes `set.json` and `origin.json`, if the folder's shards are not of something else."""
    refuse_others(folder, plan)
    begun = any(folder.glob(f"*{SUFFIX}"))
    if not begun:
        write_synced(folder / SET_FILE, json.dumps(asdict(plan), indent=1).encode())
    if origin and origin != read_origin(folder):
        content = json.dumps(origin, ensure_ascii=False, indent=1).encode()
        write_synced(folder / ORIGIN_FILE, content)
    elif origin is not None and not origin and not begun:
        (folder / ORIGIN_FILE).unlink(missing_ok=True)  # it is of another request


def refuse_others(folder: Path, plan: ShardSet) -> None:
    """Raises UserError for a folder with shards that were made of something else."""
    if not any(folder.glob(f"*{SUFFIX}")):
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
            f"{folder}: may need {told_bytes(need)}, and {told_bytes(free)} are free",
            "",
            f"Free space or give another --out. {AGAIN}",
        )


def told_bytes(count: int | float) -> str:
    """A size on disk for the user: in MB, or in GB from one on."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

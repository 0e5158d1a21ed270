"""Recordings cut into pieces at pauses, once: where each is cut, and what of it is silent."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import BadClip, ClipSet
from hebasr_jax.data.label_log import append, resume
from hebasr_jax.data.prepare import Progress
from hebasr_jax.errors import UserError
from hebasr_jax.identity import code_version, imports_of
from hebasr_jax.silence import cut
from hebasr_jax.sound_level import is_silent

_BLOCK_S = 60  # of a recording that is cut
_THREADS = 4  # recordings decoded, and pieces read, at a time


class Part(NamedTuple):
    """A piece of a clip, which is told by its number; times from the clip's start."""

    id: str
    clip: int
    start_s: float
    end_s: float
    silent: bool


def cut_all(
    clip_set: ClipSet, labels: Path, piece_s: float, progress: Progress
) -> tuple[list[Part], list[tuple[str, str]]]:
    """The pieces of all clips in their order, and the clips that cannot be read, with reasons."""
    from hebasr_jax.longform import Cutting

    cutting = Cutting(piece_s, search_s=piece_s / 3)
    clips = clip_set.clips

    def look(index: int) -> dict[str, Any]:
        try:
            wave_S = clip_set.read(index)
        except BadClip as fault:
            return {"clip": clips[index].id, "fault": fault.reason, "detail": fault.detail}
        found = [*cut(_blocks(wave_S), piece_s=cutting.piece_s, search_s=cutting.search_s)]
        return {
            "clip": clips[index].id,
            "pieces": [
                {
                    "id": clips[index].id + (f"@{start_s:.2f}" if len(found) > 1 else ""),
                    "start_s": start_s,
                    "end_s": (piece.start + len(piece.wave)) / SAMPLE_RATE,
                    "silent": is_silent(piece.wave),
                }
                for piece in found
                for start_s in [piece.start / SAMPLE_RATE]
            ],
        }

    code = code_version(imports_of("silence", "sound_level"))
    made_by = {"set": clip_set.fingerprint, "cutting": asdict(cutting), "code": code}
    rows = resume(labels / "pieces", made_by, range(len(clips) + 1))
    left = range(len(rows), len(clips))
    total_s = sum((clips[i].duration_s for i in left), start=0.0)
    with progress(total_s) as advance, ThreadPoolExecutor(_THREADS) as pool:
        for start in left[:: 4 * _THREADS]:
            some = left[start - left.start :][: 4 * _THREADS]
            made = [*pool.map(look, some)]
            append(labels / "pieces", made)
            rows += made
            advance(sum(clips[i].duration_s for i in some))
    parts = [
        Part(piece["id"], clip, piece["start_s"], piece["end_s"], piece["silent"])
        for clip, row in enumerate(rows)
        for piece in row.get("pieces", ())
    ]
    if repeated := [part for part, count in Counter(p.id for p in parts).items() if count > 1]:
        raise UserError(f"{clip_set.name}: two pieces have the id {repeated[0]}", "", "Rename one.")
    return parts, [(row["clip"], row["fault"]) for row in rows if "fault" in row]


def _blocks(wave_S: np.ndarray) -> Iterator[np.ndarray]:
    block = _BLOCK_S * SAMPLE_RATE
    for start in range(0, len(wave_S), block):
        yield wave_S[start : start + block].astype(np.float32) / 32768


def piece_reader(clip_set: ClipSet) -> Callable[[Part], np.ndarray]:
    """Reads pieces; recordings last read are held, since their next pieces come next."""
    whole = lru_cache(_THREADS)(clip_set.read)

    def read(part: Part) -> np.ndarray:
        first, last = (round(at_s * SAMPLE_RATE) for at_s in (part.start_s, part.end_s))
        return whole(part.clip)[first:last]

    return read


def waves_of(clip_set: ClipSet, calls: Sequence[Sequence[Part]]) -> Iterator[list[np.ndarray]]:
    """The int16 samples of each call's pieces; those of the next are read meanwhile."""
    read = piece_reader(clip_set)
    pool = ThreadPoolExecutor(_THREADS)
    try:
        ahead = [pool.submit(read, part) for part in calls[0]] if calls else []
        for number, call in enumerate(calls):
            now, after = ahead, calls[number + 1 : number + 2]
            ahead = [pool.submit(read, part) for part in itertools.chain(*after)]
            try:
                yield [future.result() for future in now]
            except BadClip as fault:
                why = "It could when pauses were looked for."
                raise UserError(
                    f"{clip_set.name}: {call[0].id} cannot be read: {fault}", why
                ) from None
    finally:
        pool.shutdown(cancel_futures=True)

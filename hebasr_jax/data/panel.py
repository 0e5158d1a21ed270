"""The dev panel: for each test set, held-out clips that resemble it; and what training leaves out.

A panel is a folder with a `panel.json`, and in it
  SCHEMA/dev.jsonl               ids of a training set's held-out clips, for `Source.only`
  SCHEMA/not_for_training.jsonl  ids of all of their recordings or speakers, for `Source.without`
  MEMBER/dev_long.jsonl          a manifest of stitched recordings, and their FLAC files
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import ClipSet
from hebasr_jax.data.shard_work import writing
from hebasr_jax.data.shards import write_synced
from hebasr_jax.data.splits import FIELDS, Split, hold_out, write_long, write_split
from hebasr_jax.errors import UserError

PANEL_FILE = "panel.json"
DEV_LIST, TRAIN_LIST = "dev.jsonl", "not_for_training.jsonl"
BLOCK = "block"
_BLOCK_CLIPS = 100
_VERSION = 2
_MOST_ASKED, _MOST_HELD = 0.1, 0.25  # of a set's hours: what a member asks for, what may go
_OPUS_LEVEL = 0.96  # libsndfile: 6 + 250 * (1 - level) kbit/s for one channel, here 16


@dataclass(frozen=True)
class Member:
    """One dev set of the panel, made of a set of the recipe.

    stands_for: the test set that it resembles, and is used in place of.
    hours: of audio, at most a tenth of the set's; None: the whole of the set's dev part.
    by: what is held out whole: the first of these that most clips name and that is no quarter of
      the set. "block" is a hundred neighbouring rows.
    length_s: clips of one recording are stitched to such lengths. voice_note: and sent as one.
    """

    name: str
    stands_for: str
    schema: str
    hours: float | None
    by: tuple[str, ...] = ()
    length_s: float | None = None
    voice_note: bool = False


_TALK = ("source", "recording", "speaker")
# Hours and lengths are those of the test sets (benchmark_sets.py), about.
MEMBERS = (
    Member("podcasts", "eval-d1", "crowd-transcribe-v5", 2.0, _TALK, 420.0),
    Member("voice-notes", "eval-whatsapp", "crowd-transcribe-v5", 1.2, _TALK, 75.0, True),
    Member("recital", "saspeech", "crowd-recital", 1.0, ("speaker", "recording")),
    Member("knesset", "formal talk (no test set)", "knesset-plenums", 1.0, ("recording",)),
    Member("fleurs", "fleurs", "fleurs", None),
    Member("common-voice", "common voice", "common-voice", None),
    # Its clips name nothing. No recipe trains on it; blocks are for a config that does.
    Member("kan", "kan", "kan", 1.0, (*_TALK, BLOCK)),
)


@dataclass(frozen=True, eq=False)
class Part:
    """What the panel takes of one set.

    clip_set: with made-up recordings where it is split by block. split: None: all of the set.
    """

    clip_set: ClipSet
    by: str
    split: Split | None
    members: tuple[tuple[Member, tuple[int, ...]], ...]


def voice_note(wave_S: np.ndarray) -> np.ndarray:
    """int16 samples at 16 kHz after Opus at 16 kbit/s, as messengers send a voice message.

    As long as they were. The microphone and the room of a telephone are not imitated.
    """
    import soundfile

    file = io.BytesIO()
    level = _OPUS_LEVEL
    soundfile.write(
        file, wave_S, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level
    )
    file.seek(0)
    heard_S = soundfile.read(file, dtype="int16")[0][: len(wave_S)]
    return np.pad(heard_S, (0, len(wave_S) - len(heard_S)))


def choose(
    clip_set: ClipSet,
    schema: str,
    by: Sequence[str] = (),
    barred: Sequence[str] = (),
    seed: int = 0,
) -> Part:
    """The clips of each member that is made of a set of this schema; no group is in two of them.

    Args:
      by: in place of each member's.

    Raises:
      UserError: where no field names groups of which some can be held out.
    """
    members = [member for member in MEMBERS if member.schema == schema]
    if all(member.hours is None for member in members):
        everything = tuple(range(len(clip_set.clips)))
        return Part(clip_set, "", None, tuple((member, everything) for member in members))
    faults = []
    for field in by or members[0].by:
        cut = _blocks(clip_set) if field == BLOCK else clip_set
        found = _held(cut, members, "recording" if field == BLOCK else field, barred, seed)
        if not isinstance(found, str):
            return Part(cut, field, *found)
        faults.append(f"{field}: {found}")
    raise UserError(
        f"{clip_set.name}: nothing can be held out for the dev panel",
        "; ".join(faults),
        f"Name columns.source or columns.recording of the set and prepare it anew, or else "
        f"--by {schema}={BLOCK}: {_BLOCK_CLIPS} neighbouring rows, which may share their speakers.",
    )


def _held(
    clip_set: ClipSet, members: Sequence[Member], field: str, barred: Sequence[str], seed: int
) -> tuple[Split, tuple[tuple[Member, tuple[int, ...]], ...]] | str:
    """All that is held out by a field, and each member's part of it; or why that cannot be."""
    clips = clip_set.clips
    named = sum(bool(getattr(clip, field)) for clip in clips)
    if named < len(clips) / 2:
        return f"{named:,} of {len(clips):,} clips name one"
    total_s = sum(clip.duration_s for clip in clips)
    taken, chosen, groups = set(barred), [], set[int]()
    group_C = np.zeros(0, np.int64)
    for member in members:
        assert member.hours is not None
        hours = min(member.hours, _MOST_ASKED * total_s / 3600)
        try:
            split = hold_out(
                clips, (field,), hours, seed=seed, barred=sorted(taken), or_shortest=True
            )
        except UserError:
            return "too few of them"
        group_C = split.group_C
        groups |= {int(group_C[index]) for index in split.held_out}
        inside = np.isin(group_C, list(groups))
        taken |= {clips[index].id for index in np.flatnonzero(inside)}
        chosen.append((member, _first(clip_set, split.held_out, hours)))
        held_s = sum(clips[index].duration_s for index in np.flatnonzero(inside))
        if held_s > _MOST_HELD * total_s:
            return f"too few of them: {held_s / total_s:.0%} of the set would be held out"
    held_out = sorted(index for _, indices in chosen for index in indices)
    return Split(tuple(held_out), group_C), tuple(chosen)


def _first(clip_set: ClipSet, indices: Sequence[int], hours: float) -> tuple[int, ...]:
    """The first clips of what is held out, where a single group is far longer than is asked for."""
    ends_s = np.cumsum([clip_set.clips[index].duration_s for index in indices])
    return tuple(indices[: int(np.searchsorted(ends_s, 1.25 * 3600 * hours, "right")) or 1])


def _blocks(clip_set: ClipSet) -> ClipSet:
    """The set with each hundred neighbouring rows, fewer in a small set, as one recording."""
    size = max(1, min(_BLOCK_CLIPS, len(clip_set.clips) // 20))
    clips = (
        replace(clip, recording=f"block {number // size:06d}")
        for number, clip in enumerate(clip_set.clips)
    )
    return replace(clip_set, clips=tuple(clips))


def request_of(parts: Mapping[str, Part], barred: Sequence[str]) -> dict[str, Any]:
    """All that decides what is in a panel, as JSON."""
    sets = {}
    for schema, part in parts.items():
        ids = [[part.clip_set.clips[index].id for index in held] for _, held in part.members]
        members = [asdict(member) | {"by": part.by} for member, _ in part.members]
        sets[schema] = {
            "fingerprint": part.clip_set.fingerprint,
            "held_out": _digest(ids),
            "members": members,
        }
    return {"version": _VERSION, "sets": sets, "barred": _digest(sorted(set(barred)))}


def _digest(ids: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def schemas_of(folder: Path) -> set[str]:
    """Schemas of the sets that a panel there is made of, whole or not; empty: there is none."""
    try:
        return set(json.loads((folder / PANEL_FILE).read_bytes())["request"]["sets"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def is_barred(folder: Path) -> bool:
    """Whether a panel there keeps clips from training that overlap a test set."""
    try:
        told = json.loads((folder / PANEL_FILE).read_bytes())["request"]["barred"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(told != _digest([]))


def rows_of(folder: Path, request: Mapping[str, Any] | None = None) -> list[dict[str, Any]] | None:
    """The table of a panel that is whole, and made as requested if that is given; else None."""
    try:
        told = json.loads((folder / PANEL_FILE).read_bytes())
        whole = all((folder / name).stat().st_size == size for name, size in told["files"].items())
        return told["rows"] if whole and request in (None, told["request"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def build(
    folder: Path,
    parts: Mapping[str, Part],
    barred: Sequence[str],
    advance: Callable[[float], None] = lambda audio_s: None,
) -> list[dict[str, Any]]:
    """Writes a panel, all of it or nothing, in place of one that is there; returns its table.

    Raises UserError for a folder with something else in it, and for a full disk.
    """
    with _replacing(folder) as partial:
        rows = []
        for schema, part in parts.items():
            if part.split is not None:
                write_split(partial / schema, part.clip_set, part.split, (part.by,), barred)
            for member, indices in part.members:
                rows.append(_write(partial, part, member, indices, advance))
        order = [member.name for member in MEMBERS]
        rows.sort(key=lambda row: order.index(row["member"]))
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
        told = {"request": request_of(parts, barred), "rows": rows, "files": sizes}
        write_synced(partial / PANEL_FILE, json.dumps(told, ensure_ascii=False, indent=1).encode())
    return rows


def _write(
    folder: Path,
    part: Part,
    member: Member,
    indices: Sequence[int],
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Writes a member's recordings, if it has some of its own; its row of the table."""
    clips = [part.clip_set.clips[index] for index in indices]
    lengths_s = [clip.duration_s for clip in clips]
    if member.length_s is not None:
        channel = voice_note if member.voice_note else np.asarray
        written = write_long(
            folder / member.name,
            part.clip_set,
            indices,
            member.length_s,
            channel=channel,
            advance=advance,
        )
        if not written:
            what = f"{part.clip_set.name}: none of the clips held out for {member.name} can be read"
            raise UserError(what, do="Run `hebasr audit` on the set.")
        lengths_s = [row["duration_s"] for row in written]
    counts = {
        f"{field}s": len({getattr(clip, field) for clip in clips} - {""}) or None
        for field in FIELDS
    }
    return {
        "member": member.name,
        "stands for": member.stands_for,
        "made of": part.clip_set.name,
        "held out by": part.by or "its dev part",
        "clips": len(lengths_s),
        "hours": round(sum(lengths_s) / 3600, 4),
        **counts,
    }


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the name of this one when all went well; what is there is kept
    until then. A kill leaves the old, the new, or, between two renames, neither."""
    if folder.exists() and not (folder / PANEL_FILE).is_file() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: holds other files", "a panel replaces its folder", "Give another --out."
        )
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    with writing(folder.parent):
        for path in (partial, old):
            shutil.rmtree(path, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in partial.rglob("*.flac"):
                with path.open("rb") as content:
                    os.fsync(content.fileno())
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        finally:
            for path in (partial, old):
                shutil.rmtree(path, ignore_errors=True)

"""Dev sets that share nothing with training but the language: whole recordings, speakers, sources.

A split is two lists of ids, which a config names as `Source.only` and `Source.without`.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import BadClip, Clip, ClipSet
from hebasr_jax.data.draws import clip_key
from hebasr_jax.data.shard_work import writing
from hebasr_jax.data.shards import write_synced
from hebasr_jax.errors import UserError

FIELDS = ("recording", "speaker", "source")
_MOST = 1.25  # of the hours that are asked for
_GAP_S = 0.3  # silence between stitched clips
_OTHER_OUT = "Or give another --out."


@dataclass(frozen=True)
class Split:
    """Which clips of a set are held out (ascending indices), and in which group each clip is.

    group_C: clips that share a name of one of the fields have one number, and are on one side;
    -1: no field names anything, so that the clip is in training.
    """

    held_out: tuple[int, ...]
    group_C: np.ndarray


def hold_out(
    clips: Sequence[Clip],
    by: Sequence[str],
    hours: float,
    *,
    seed: int = 0,
    barred: Sequence[str],
    or_shortest: bool = False,
) -> Split:
    """Whole groups, in an order drawn from their names and the seed, until the hours are reached.

    A group that would make it more than 1.25 times the hours is passed over. Where the hours are
    not reached in this way, what was found is held out. More clips in a set move no group across,
    unless it was among the last.

    Args:
      by: fields of `FIELDS`; clips that share one of them, directly or by way of others, are one
        group. Recordings of one name in two sources are one group as well: too wide is safe.
      barred: ids that are on neither side, such as those that overlap a test set.
      or_shortest: where each group is too long, the shortest is held out.

    Raises:
      UserError: where no clip has such a field, or each group is too long.
    """
    group_C = _groups(clips, by)
    if not (group_C >= 0).any():
        raise UserError(
            f"nothing can be held out by {' or '.join(by)}",
            "no clip names one, and clips of one recording on both sides would leak",
            "name the field in columns, or split by another: " + ", ".join(FIELDS),
        )
    members: dict[int, list[int]] = defaultdict(list)
    for index in np.flatnonzero(group_C >= 0).tolist():
        members[int(group_C[index])].append(index)
    out = set(barred)
    lengths_s = {
        group: sum(clips[i].duration_s for i in indices if clips[i].id not in out)
        for group, indices in members.items()
    }
    names = {group: min(_names(clips[i], by)[0] for i in members[group]) for group in members}
    wanted_s, found_s, chosen = 3600 * hours, 0.0, list[int]()
    for group in sorted(members, key=lambda g: clip_key(f"split {seed}", "/".join(names[g]))):
        if found_s >= wanted_s:
            break
        if lengths_s[group] and found_s + lengths_s[group] <= _MOST * wanted_s:
            chosen.append(group)
            found_s += lengths_s[group]
    if not chosen and or_shortest and any(lengths_s.values()):
        chosen = [min(filter(lengths_s.get, lengths_s), key=lambda g: (lengths_s[g], names[g]))]
    if not chosen:
        raise UserError(
            f"nothing was held out: {hours:g} h are too little",
            f"the shortest of {len(members)} groups by {' or '.join(by)} has "
            f"{min(filter(None, lengths_s.values()), default=0) / 3600:.2f} h",
            "ask for more --hours",
        )
    held_out = sorted(i for group in chosen for i in members[group] if clips[i].id not in out)
    return Split(tuple(held_out), group_C)


def overlapping(files: Sequence[Path]) -> list[str]:
    """Ids of training clips that `overlap.json` files found in a test set."""
    ids: list[str] = []
    for file in files:
        try:
            ids += json.loads(file.read_bytes())["train"]["overlapping"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            do = "Give overlap.json, as `hebasr evaluate` writes it beside its results."
            raise UserError(f"{file}: tells no overlap", str(error)[:100], do) from error
    return ids


def write_split(
    folder: Path, clip_set: ClipSet, split: Split, by: Sequence[str], barred: Sequence[str]
) -> dict[str, Any]:
    """Writes `dev.jsonl` (for `Source.only`) and `not_for_training.jsonl` (`Source.without`).

    The second holds the clips of the first, and the others of their groups, and those that are
    barred; so that both files can only have been written of one set. Long recordings of an older
    split in the folder are removed. Returns what to tell.

    Raises UserError where nothing is left to train on, and for a folder that cannot be written to.
    """
    clips, out = clip_set.clips, set(barred)
    groups = {int(split.group_C[i]) for i in split.held_out}
    dev = [{"id": clips[i].id} for i in split.held_out]
    kept_out, train = [], []
    for index, clip in enumerate(clips):
        if clip.id in out:
            kept_out.append({"id": clip.id, "reason": "overlaps a test set"})
        elif int(split.group_C[index]) in groups:
            kept_out.append({"id": clip.id, "reason": f"is held out by {' and '.join(by)}"})
        else:
            train.append(index)
    if not train:
        raise UserError(
            f"{clip_set.name}: nothing is left to train on",
            f"all {len(clips):,} clips are held out or overlap a test set",
            "Ask for fewer --hours.",
        )
    with writing(folder, _OTHER_OUT):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_long(folder)
        for name, rows in (("dev.jsonl", dev), ("not_for_training.jsonl", kept_out)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_synced(folder / name, "".join(lines).encode())
    told: dict[str, Any] = {}
    for side, indices in (("dev", split.held_out), ("train", train)):
        told[side] = {"clips": len(indices), "hours": _hours(clips, indices)}
        for field in FIELDS:
            told[side][field] = len({getattr(clips[i], field) for i in indices} - {""})
    told["barred"] = sum(row["reason"] == "overlaps a test set" for row in kept_out)
    told["unnamed"] = int((split.group_C < 0).sum())
    return told


def stitch(clip_set: ClipSet, indices: Sequence[int], length_s: float) -> Iterator[list[int]]:
    """Neighbouring clips of one recording (or speaker) of one source, about `length_s` together.

    A recording's last piece may be shorter; one of under half that length joins the one before.
    """
    by_name: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index in indices:
        clip = clip_set.clips[index]
        by_name[clip.source, clip.recording or clip.speaker].append(index)
    for _, members in sorted(by_name.items()):
        pieces: list[list[int]] = [[]]
        length = 0.0
        for index in members:
            if length >= length_s:
                pieces.append([])
                length = 0.0
            pieces[-1].append(index)
            length += clip_set.clips[index].duration_s + _GAP_S
        if len(pieces) > 1 and length < length_s / 2:
            last = pieces.pop()
            pieces[-1] += last
        yield from pieces


def write_long(
    folder: Path,
    clip_set: ClipSet,
    indices: Sequence[int],
    length_s: float,
    *,
    channel: Callable[[np.ndarray], np.ndarray] = lambda wave_S: wave_S,
    advance: Callable[[float], None] = lambda audio_s: None,
) -> list[dict[str, Any]]:
    """Long recordings of held-out clips with a third of a second of silence between: a dev set
    like eval-d1, whose rows are some seven minutes long. FLAC files and `dev_long.jsonl`.

    A clip that cannot be read is left out with its text. Returns the manifest's rows.

    Args:
      channel: what int16 [S] samples at 16 kHz go through before they are written.
      advance: is told the seconds of each recording that was written.
    """
    import soundfile

    with writing(folder, _OTHER_OUT):
        (folder / "long").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for piece in stitch(clip_set, indices, length_s):
        waves, texts = [], []
        for index in piece:
            try:
                waves += [clip_set.read(index), np.zeros(round(_GAP_S * SAMPLE_RATE), np.int16)]
            except BadClip:
                continue
            texts.append(clip_set.clips[index].text.strip())
        if not waves:
            continue
        wave, name = channel(np.concatenate(waves[:-1])), f"long/{len(rows):04d}.flac"
        with writing(folder, _OTHER_OUT):
            soundfile.write(folder / name, wave, SAMPLE_RATE, subtype="PCM_16")
        first = clip_set.clips[piece[0]]
        rows.append(
            {
                "id": f"{first.recording or first.speaker or first.source}/{len(rows)}",
                "audio": name,
                "text": " ".join(filter(None, texts)),
                "duration_s": len(wave) / SAMPLE_RATE,
                "recording": first.recording or first.speaker or first.source,
                "source": first.source,
            }
        )
        advance(len(wave) / SAMPLE_RATE)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(folder, _OTHER_OUT):
        write_synced(folder / "dev_long.jsonl", "".join(lines).encode())
    return rows


def _remove_long(folder: Path) -> None:
    """What `write_long` wrote to a folder, the manifest first; files of others stay."""
    (folder / "dev_long.jsonl").unlink(missing_ok=True)
    for file in (folder / "long").glob("*.flac"):
        if file.stem.isdecimal():
            file.unlink()


def _names(clip: Clip, by: Sequence[str]) -> list[tuple[str, str]]:
    """The names that put a clip into a group: (field, value), without empty ones."""
    return [(field, value) for field in by if (value := getattr(clip, field))]


def _groups(clips: Sequence[Clip], by: Sequence[str]) -> np.ndarray:
    """Connected components of clips and names, by union-find; -1 for a clip without a name."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(name: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for clip in clips:
        names = _names(clip, by)
        for name in names:
            parent[root(name)] = root(names[0])
    numbers: dict[tuple[str, str], int] = {}
    return np.array(
        [
            numbers.setdefault(root(names[0]), len(numbers)) if (names := _names(c, by)) else -1
            for c in clips
        ],
        np.int64,
    )


def _hours(clips: Sequence[Clip], indices: Sequence[int]) -> float:
    return round(sum(clips[i].duration_s for i in indices) / 3600, 4)

"""Data sets opened: JSONL manifests, parquet files with audio in them, shards by `prepare`.

All three are rows of a manifest. Those of a parquet file name its own rows as audio
(`FILE.parquet#ROW`, which a manifest may do as well), and shards carry a manifest each.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hebasr_jax.data.adapt import Rows, adapted_rows, normalized
from hebasr_jax.data.adapters import filled, find_adapter, refuse_licence
from hebasr_jax.data.clips import BadClip, Clip, ClipSet, Removed
from hebasr_jax.data.decode import LONGEST_S
from hebasr_jax.data.parquet import AudioColumn, column_names, no_column, parquet_rows
from hebasr_jax.data.quality import top_reasons
from hebasr_jax.data.rows import Place, check_segments, has_field, parse_line, parse_row
from hebasr_jax.data.selection import Selection
from hebasr_jax.data.shards import SET_FILE, left_out, read_origin, shard_rows
from hebasr_jax.data.sounds import Sounds
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source

Given = TypeVar("Given")
Made = TypeVar("Made")
# From files to where they lie whole, while it is entered.
Held = Callable[[Sequence[Path]], contextlib.AbstractContextManager[Mapping[Path, Path]]]

_THREADS = 16  # they wait for disks more than they compute
_AT_ONCE = 256  # rows a thread takes at a time


class _Table(NamedTuple):
    """Rows, the names of their fields, and where their relative audio paths start."""

    rows: Rows
    columns: Columns
    folder: Path
    audio_column: str  # of the parquet files that the rows point to
    lacking: Sequence[str] = ()  # columns of the schema; complete once the rows are read
    repeats: bool = False  # rows may share an id


class _Parsed(NamedTuple):
    """Rows as clips, rows that are none, and rows left out on purpose."""

    rows: list["_Found"]
    bad: list[tuple[str, BadClip]]
    removed: list[tuple[str, str]]


class _Found(NamedTuple):
    """A row that reads as a clip; its audio has not been looked at."""

    where: str
    clip: Clip
    place: Place


def open_sources(sources: Sequence[Source]) -> list[ClipSet]:
    """`open_source` of each; `describe` tells what was kept and lost."""
    return [open_source(source) for source in sources]


def refuse_absent(sources: Sequence[Source]) -> None:
    """Raises a UserError that names every set that is not there, and what to do."""
    if absent := [source for source in sources if not is_there(source)]:
        raise _absent(absent)


def is_there(source: Source) -> bool:
    """Whether anything lies where a set should be."""
    path = Path(source.path).expanduser()
    return path.exists() or bool(glob.glob(str(path), recursive=True))


def open_source(
    source: Source,
    *,
    files: Sequence[Path] = (),
    held: Held | None = None,
    null_is_empty: bool = False,
    unlabelled: bool = False,
) -> ClipSet:
    """Reads what is known of a set's clips; audio is left where it is.

    A row that is no clip, whose file is missing, or whose length cannot be told or is over
    `LONGEST_S` goes to `bad`, as does the second row with an id. `read` gives a piece of
    round(duration_s * 16000) samples at most, and all of a file that is up to `ROUNDING_S` longer.
    The fingerprint takes in all fields of the clips, audio names as written, and sizes of files.
    Raises UserError for a set that cannot be read, has no valid clip, no row of its split, or
    lacks a column that `source.columns` names; a column named "" is none. With a schema, parquet
    files are read as its adapter says; manifests and shards are what `prepare` made of them. What
    the schema, the normaliser, `without`, `only` and `min_quality` leave out is in `removed`.

    Args:
      files: parquet files to read, instead of those that `source.path` names.
      held: where they have sound in them for a while, if `files` are without (`hub_files.py`).
      null_is_empty: a text that is null counts as an empty one; else such a row is bad.
      unlabelled: texts are not wanted; else a schema without text is an error.
    """
    source = _allowed(source, unlabelled)
    if source.split and read_origin(Path(source.path).expanduser()).get("split") == source.split:
        source = replace(source, split=None)  # shards of that split alone
    table = _table(source, files)
    selection = Selection.of(source)
    rows, bad, removed = _parse(source, table, selection, null_is_empty)
    lists = selection.absent(len(bad), left_out(Path(source.path).expanduser()))
    parquet = AudioColumn(table.audio_column)
    sizes = dict(_in_threads(lambda file: (file, _size(file)), {row.place.file for row in rows}))
    kept: dict[str, tuple[_Found, Clip]] = {}
    for row, clip in zip(rows, _completed(rows, sizes, parquet, held), strict=True):
        if isinstance(clip, BadClip):
            bad.append((row.where, clip))
        elif clip.id in kept and table.repeats:
            removed.append((clip.id, "is a clip that was transcribed before"))
        elif clip.id in kept:
            told = f"{clip.id}: first at {kept[clip.id][0].where}"
            bad.append((row.where, BadClip("has the id of another row", told)))
        else:
            kept[clip.id] = row, clip
    if not kept:
        raise _no_clip(source, bad, removed)
    places, clips = zip(*((row.place, clip) for row, clip in kept.values()), strict=True)
    return ClipSet(
        name=source.name,
        clips=clips,
        read=Sounds(list(places), [clip.duration_s for clip in clips], parquet),
        fingerprint=_fingerprint(clips, places, sizes),
        bad=tuple(bad),
        share=source.share,
        files=tuple("" if p.row is not None or p.piece else str(p.file.absolute()) for p in places),
        removed=tuple(removed),
        notes=(*(f"has no column {path}" for path in dict.fromkeys(table.lacking)), *lists),
    )


def _allowed(source: Source, unlabelled: bool) -> Source:
    """The source with what its schema says of it. Raises UserError where it may not be used."""
    refuse_licence(source)
    if unlabelled:
        source = replace(source, columns=replace(source.columns, text="", context="", segments=""))
    elif source.schema and not (source.columns.text and find_adapter(source.schema).columns.text):
        raise UserError(
            f"{source.name}: schema {source.schema} has no text to train on",
            "An empty text would say that nobody speaks.",
            "Give it pseudo-labels first.",
        )
    return filled(source)


def _absent(sources: Sequence[Source]) -> UserError:
    """What to do about sets that are not there: fetch those of the hub, or mend the path."""
    paths = ", ".join(source.path for source in sources)
    hubs = list(dict.fromkeys(source.hub for source in sources if source.hub))
    if not hubs:
        return UserError(f"{paths}: no such file or folder", "", "Check the path of the set.")
    return UserError(
        f"{paths}: no such file or folder",
        f"these are made from the hub's {', '.join(hubs)}, which are gated: accept their terms "
        "on https://huggingface.co/datasets/... and log in with `hf auth login`",
        "then `hebasr prepare --config FILE` fetches sets, and `hebasr panel --config FILE` "
        "makes dev sets of them; or set data.train.0.path to data of your own",
    )


def describe(clip_set: ClipSet) -> str:
    """One line for the user: clips and hours kept, rows lost or left out and why."""
    hours = sum(clip.duration_s for clip in clip_set.clips) / 3600
    lost = top_reasons(fault.reason for _, fault in clip_set.bad)
    told = f"{clip_set.name}: {len(clip_set.clips):,} clips, {hours:,.2f} h"
    told += f"; {len(clip_set.bad):,} rows lost: {lost}" if lost else "; no row lost"
    if clip_set.removed:
        reasons = top_reasons((reason for _, reason in clip_set.removed), most=8)
        told += f"; {len(clip_set.removed):,} left out: {reasons}"
    return "; ".join([told, *clip_set.notes])


def _table(source: Source, files: Sequence[Path]) -> _Table:
    path = Path(source.path).expanduser()
    columns = source.columns
    if files:
        folder = Path(os.path.commonpath([file.parent for file in files]))
        return _of_parquet(source, files, folder)
    if (path / SET_FILE).is_file():
        rows = _parsed(shard_rows(path))
        return _Table(rows, Columns(), path, Columns.audio)
    if path.is_file() and path.suffix != ".parquet":
        return _Table(_parsed(_lines(path)), columns, path.parent, Columns.audio)
    return _of_parquet(source, *_parquet_files(path))


def _of_parquet(source: Source, files: Sequence[Path], folder: Path) -> _Table:
    columns = source.columns
    if not source.schema:
        return _Table(_parquet_table(files, folder, columns), columns, folder, columns.audio)
    adapter, lacking = find_adapter(source.schema), list[str]()
    rows = adapted_rows(source, files, folder, lacking)
    audio = columns.audio if columns.audio != Columns.audio else adapter.columns.audio
    return _Table(rows, Columns(), folder, audio, lacking, adapter.repeats)


def _parquet_files(path: Path) -> tuple[list[Path], Path]:
    """The parquet files that a path, folder or glob names, and the folder they are named from."""
    if path.is_dir():
        files, folder = sorted(path.rglob("*.parquet")), path
    elif path.exists():
        files, folder = [path], path.parent
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        folder = Path(os.path.commonpath([file.parent for file in files] or [path.parent]))
    if not path.exists() and not files:
        raise _absent([Source(path.name, str(path))])
    if not files:
        below = [str(file.parent) for file in sorted(path.glob(f"*/**/{SET_FILE}"))]
        raise UserError(
            f"{path}: has neither parquet files nor {SET_FILE} in it",
            f"Prepared sets below it: {', '.join(below[:5])}." if below else "",
            "Give a manifest, parquet files, or the folder of one prepared set.",
        )
    return files, folder


def _parquet_table(files: Sequence[Path], folder: Path, columns: Columns) -> Rows:
    names = [path.split(".")[0] for path in astuple(columns)]
    for file in files:
        there = column_names(file)
        if columns.text and columns.text.split(".")[0] not in there:
            raise no_column(file, "text", columns.text, there)
        name = file.relative_to(folder).as_posix()
        for number, row in enumerate(parquet_rows(file, columns.audio, [*names, "split"])):
            yield f"{file}#{number}", row | {columns.audio: f"{name}#{number}"}


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with file.open("rb") as content:
            for number, line in enumerate(content, start=1):
                if line.strip():
                    yield f"{file}:{number}", line
    except OSError as error:
        raise UserError(f"{file}: cannot be read", error.strerror or "") from error


def _parsed(lines: Iterable[tuple[str, bytes]]) -> Rows:
    for where, line in lines:
        try:
            yield where, parse_line(line)
        except BadClip as fault:
            yield where, fault


def _parse(source: Source, table: _Table, selection: Selection, null_is_empty: bool) -> _Parsed:
    """Rows of the split that are wanted as clips, and what is none."""
    rows, bad, removed = parsed = _Parsed([], [], [])
    others: set[str] = set()
    named = zip(astuple(table.columns), astuple(Columns()), strict=True)
    unseen = {path for path, usual in named if path not in (usual, "")}
    names: list[str] = []
    for where, row in table.rows:
        try:
            if isinstance(row, BadClip | Removed):
                raise row
            unseen = {path for path in unseen if not has_field(row, path)}
            names = names or list(row)
            if source.split is not None and row.get("split") != source.split:
                others.add(str(row.get("split")))
                selection.met.add(str(row.get(table.columns.id)))
                continue
            clip, place = parse_row(row, table.columns, table.folder, null_is_empty=null_is_empty)
            selection.check(clip)
            clip = normalized(clip) if source.normalizer else clip
            rows.append(_Found(where, clip, place))
        except BadClip as fault:
            bad.append((where, fault))
        except Removed as fault:
            removed.append((fault.clip_id or where, fault.reason))
    if unseen and names:
        raise UserError(
            f"{source.path}: no row has a field {sorted(unseen)[0]!r}",
            f"The fields of its first row are {', '.join(names)}.",
            f"Correct columns of the set {source.name!r}.",
        )
    if others and not rows and not bad and not removed:
        raise UserError(
            f"{source.path}: no row has the split {source.split!r}",
            f"Splits there: {', '.join(sorted(others))[:200]} (None: the row names none).",
            f"Correct split of the set {source.name!r}.",
        )
    return parsed


def _completed(
    rows: Sequence[_Found], sizes: dict[Path, int | None], parquet: AudioColumn, held: Held | None
) -> list[Clip | BadClip]:
    """Each row as a clip with its duration, or why it is none; file by file where they are held."""
    places = [row.place for row in rows]
    sounds = Sounds(places, [row.clip.duration_s for row in rows], parquet)

    def complete(part: Sounds, row: _Found, index: int) -> Clip | BadClip:
        try:
            return _complete(row.clip, row.place.file, sizes[row.place.file], part, index)
        except BadClip as fault:
            return fault

    made: list[Clip | BadClip] = []
    by_file = itertools.groupby(
        range(len(rows)), lambda index: places[index].file if held else Path()
    )
    for file, group in by_file:
        indices = list(group)
        lacking = held and not all(sounds.durations_s[index] for index in indices)
        with held([file]) if held and lacking else contextlib.nullcontext({}) as moved:
            part = sounds.part(indices).moved(moved)
            some = [(part, rows[index], number) for number, index in enumerate(indices)]
            made += _in_threads(lambda given: complete(*given), some)
    return made


def _complete(clip: Clip, file: Path, size: int | None, sounds: Sounds, index: int) -> Clip:
    """The clip with its duration, once its file is known to be there. Raises `BadClip`."""
    if not size:
        raise BadClip("no such file" if size is None else "is empty (zero bytes)", str(file))
    if not clip.duration_s:
        clip = replace(clip, duration_s=sounds.measure(index))
    if clip.duration_s > LONGEST_S:
        raise BadClip(f"lasts over {LONGEST_S / 3600:g} hours", f"{clip.duration_s:.0f} s: cut it")
    check_segments(clip)
    return clip


def _size(file: Path) -> int | None:
    """Bytes of a regular file; None for anything else."""
    try:
        return file.stat().st_size if file.is_file() else None
    except (OSError, ValueError):
        return None


def _in_threads(function: Callable[[Given], Made], given: Iterable[Given]) -> list[Made]:
    items = list(given)
    parts = [items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        made = pool.map(lambda part: [function(item) for item in part], parts)
        return [item for part in made for item in part]


def _fingerprint(
    clips: Sequence[Clip], places: Sequence[Place], sizes: dict[Path, int | None]
) -> str:
    digest = hashlib.sha256()
    for clip, place in zip(clips, places, strict=True):
        digest.update(json.dumps([*_plain(clip), place.name, place.piece]).encode())
    named = {place.file_name: sizes[place.file] for place in places}
    digest.update(json.dumps(sorted(named.items())).encode())
    return digest.hexdigest()


def _plain(clip: Clip) -> list[Any]:
    segments = [(segment.start_s, segment.end_s, segment.text) for segment in clip.segments]
    later = (
        "quality",
        "synthetic",
        "pseudo_label",
    )  # where they say nothing, older sets keep their fingerprint
    plain = [value for name, value in vars(clip).items() if name not in ("segments", *later)]
    quality = [] if clip.quality is None else [clip.quality]
    flags = ["synthetic"] * clip.synthetic + ["pseudo_label"] * clip.pseudo_label
    return [*plain, segments, *quality, *flags]


def _no_clip(
    source: Source, bad: Sequence[tuple[str, BadClip]], removed: Sequence[tuple[str, str]]
) -> UserError:
    if removed:
        reasons = top_reasons([*(reason for _, reason in removed), *(f.reason for _, f in bad)])
        return UserError(
            f"{source.path}: no clip is left of its {len(bad) + len(removed)} rows",
            reasons,
            f"Correct without, only, min_quality or schema of the set {source.name!r}.",
        )
    if not bad:
        return UserError(f"{source.path}: is empty: it has no row", "", "Check how it was made.")
    where, fault = bad[0]
    return UserError(
        f"{source.path}: none of its {len(bad)} rows is a clip",
        f"{top_reasons(fault.reason for _, fault in bad)}; first at {where}: {fault}",
        f"Mend the rows, or name their fields in columns of the set {source.name!r}.",
    )

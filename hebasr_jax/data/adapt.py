"""Parquet rows of a known set (`adapters.py`) as manifest rows: text, segments, context."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hebasr_jax.data.adapters import Adapter, find_adapter
from hebasr_jax.data.clips import BadClip, Clip, Removed
from hebasr_jax.data.normalize import normalize_hebrew
from hebasr_jax.data.parquet import column_paths, parquet_rows
from hebasr_jax.data.rows import value_of
from hebasr_jax.data.whisper import parse_transcript, without_stamps
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source

# FILE:LINE and what stands there
Rows = Iterator[tuple[str, dict[str, Any] | BadClip | Removed]]

_SEEK, _HAS_PREV, _HAS_STAMPS = "metadata.seek", "has_prev", "has_timestamps"
_SPLIT = re.compile(r"(train|validation|dev|test)(?=[-.]|$)")
_OFF = (None, False, 0, "", "0", "false", "False")  # a flag that is not set


def adapted_rows(source: Source, files: Sequence[Path], folder: Path, lacking: list[str]) -> Rows:
    """Rows of parquet files, of the source's split, as its schema's adapter makes them.

    A file whose name or folder tells its split is read only if that is the source's (None: the
    adapter's first, for training); in others the rows' `split` tells. Documented columns that a
    file lacks are added to `lacking`. Errors as in `fit_columns`; UserError for another split.
    """
    adapter = find_adapter(source.schema)
    wanted = source.split or adapter.splits[0]
    told = {file: _told_split(file, folder) for file in files}
    if wanted not in adapter.splits or not any(told[file] in ("", wanted) for file in files):
        raise UserError(
            f"{source.path}: has no part {wanted!r} of {adapter.name} to train on",
            f"Files there are of {', '.join(sorted(set(told.values())))}.",
            f"Set split to one of {', '.join(adapter.splits)}; other parts are for tests.",
        )
    for file in (file for file in files if told[file] in ("", wanted)):
        columns, absent = fit_columns(adapter, source.columns, column_paths(file))
        lacking += absent
        name = file.relative_to(folder).as_posix()
        names = [path for path in vars(columns).values() if path] + extra_columns(adapter)
        for number, row in enumerate(parquet_rows(file, columns.audio, [*names, "split"])):
            where = f"{file}#{number}"
            split = source.split if told[file] else row.get("split")
            if source.split not in (None, split):
                yield where, row  # counted by its split alone
                continue
            try:
                made = adapt_row(adapter, columns, row, f"{name}#{number}")
                yield where, made | {"split": split}
            except (BadClip, Removed) as fault:
                yield where, fault


def _told_split(file: Path, folder: Path) -> str:
    """`validation` of `validation-00000-of-00001.parquet` and of `validation/0000.parquet`."""
    parts = [folder.absolute().name, *file.relative_to(folder).parts]
    found = (_SPLIT.match(part) for part in reversed(parts))
    return next((match[1] for match in found if match), "")


def fit_columns(
    adapter: Adapter, given: Columns, paths: Collection[str]
) -> tuple[Columns, list[str]]:
    """The columns to read from a file with these dotted paths, and documented ones that it lacks.

    `given` goes before the adapter's where it is not the usual name. A text under its usual name
    is taken where the documented one is not there. Raises UserError when there is no text, or
    when a given column is not there.
    """
    usual, names = Columns(), {}
    for name in (f.name for f in fields(Columns)):
        own = getattr(given, name)
        names[name] = own if own != getattr(usual, name) else getattr(adapter.columns, name)
        if own not in (getattr(usual, name), "") and own not in paths:
            raise _no_column(adapter, name, own, paths)
    if names["text"] and names["text"] not in paths:
        if usual.text not in paths:
            raise _no_column(adapter, "text", names["text"], paths)
        names["text"] = usual.text
    documented = {path for path in vars(adapter.columns).values() if path} - set(
        vars(usual).values()
    )
    wanted = [path for path in names.values() if path in documented] + extra_columns(adapter)
    return Columns(**names), [path for path in wanted if path not in paths]


def extra_columns(adapter: Adapter) -> list[str]:
    """Columns that `Columns` has no name for."""
    whisper = [_SEEK, _HAS_PREV, _HAS_STAMPS] if adapter.transcript == "whisper" else []
    return [*whisper, *adapter.flags]


def adapt_row(
    adapter: Adapter, columns: Columns, row: dict[str, Any], audio: str
) -> dict[str, Any]:
    """A row of the set as a row of a manifest with the usual names; `audio` names its sound.

    Raises `Removed` for a row that is left out on purpose, and `BadClip` for one without text.
    A text is never made up: null is no silence.
    """
    named = {name: value_of(row, path) for name, path in vars(columns).items() if path}
    named["audio"] = audio
    if adapter.transcript == "whisper":
        named["id"] = _slice_id(named.get("recording"), value_of(row, _SEEK))
    told = str(named.get("id") or audio)
    for flag in adapter.flags:
        if value_of(row, flag) not in _OFF:
            raise Removed(told, f"is flagged {flag.split('.')[-1]}")
    if not columns.text:  # texts are not wanted, or there are none
        return named | {"text": ""}
    text = named["text"]
    if text is None:
        raise BadClip(f"{columns.text!r} is null")
    if not isinstance(text, str):
        raise BadClip(f"{columns.text!r} is not a string", repr(text)[:100])
    if adapter.transcript == "whisper":
        named = _slice_row(named, row, told)
    if not named["text"].strip():
        # An empty slice begins with a segment that its end cuts; the next slice has its words.
        raise Removed(told, "has an empty text, which does not say that nobody speaks")
    return named


def _slice_row(named: dict[str, Any], row: dict[str, Any], told: str) -> dict[str, Any]:
    """A row with Whisper's stamps in its text: plain text, segments, and what came before.

    Of a segment that the end of the slice cuts the words are missing: the clip ends before it.
    """
    context = named.get("context") if value_of(row, _HAS_PREV) not in _OFF else None
    named = named | {"context": without_stamps(context) if isinstance(context, str) else None}
    if value_of(row, _HAS_STAMPS) is False:
        return named | {"text": without_stamps(named["text"]), "segments": None}
    length_s = named.get("duration_s")
    if not isinstance(length_s, int | float) or not math.isfinite(length_s):
        length_s = 30.0  # as long as a slice may be
    text, segments, open_s = parse_transcript(named["text"], float(length_s))
    named |= {"text": text, "segments": [_plain(segment) for segment in segments]}
    if open_s is None:
        return named
    if not text.strip():
        raise Removed(told, "holds only the beginning of a segment")
    return named | {"start_s": 0.0, "end_s": float(open_s), "duration_s": None}


def _plain(segment: Any) -> dict[str, Any]:
    return {"start_s": segment.start_s, "end_s": segment.end_s, "text": segment.text}


def _slice_id(recording: Any, seek_s: Any) -> str | None:
    """An id that stays when files are cut anew; None: the place in the files is the id."""
    known = isinstance(recording, str) and recording and isinstance(seek_s, int | float)
    return f"{recording}@{seek_s:.2f}" if known else None


def normalized(clip: Clip) -> Clip:
    """The clip with `hebrew-v1` texts; its segments stay where their words are still the text's.

    Raises `Removed` when nothing is left of the text: that does not say that nobody speaks.
    """
    segments = tuple(
        replace(segment, text=text)
        for segment in clip.segments
        if (text := normalize_hebrew(segment.text))
    )
    text = normalize_hebrew(clip.text)
    if clip.text.strip() and not text:
        raise Removed(clip.id, "has no text left after hebrew-v1")
    # Brackets opened in one segment and closed in the next are seen in the whole text only.
    if _words(clip.segments) == clip.text.split() and _words(segments) != text.split():
        segments = ()
    return replace(clip, text=text, context=normalize_hebrew(clip.context), segments=segments)


def _words(segments: Any) -> list[str]:
    return [word for segment in segments for word in segment.text.split()]


def _no_column(adapter: Adapter, name: str, path: str, paths: Collection[str]) -> UserError:
    return UserError(
        f"schema {adapter.name}: there is no column {path!r} for the {name}",
        f"The columns are {', '.join(paths)}.",
        f"Set columns.{name} of the set to one of them.",
    )

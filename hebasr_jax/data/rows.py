"""A manifest row, checked: a clip and where its audio lies, or a `BadClip` that says why not."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hebasr_jax.data.clips import BadClip, Clip
from hebasr_jax.data.decode import ROUNDING_S
from hebasr_jax.run_config import Columns
from hebasr_jax.timestamps import Segment

_ROW_OF_FILE = re.compile(r"(.+\.(?:parquet|arrayrecord))#(\d{1,12})")
_NOTHING = object()
_MOST_CHARACTERS = 250_000  # of a text: that of the longest clip, four hours of speech


@dataclass(frozen=True)
class Place:
    """Where a clip's audio lies: a file, a row of a file of clips, or a piece of either.

    name: as the manifest has it. row: None where the file itself is the audio.
    start_s, end_s: the piece, in seconds; None where all of it is the clip.
    """

    name: str
    file: Path
    row: int | None = None
    start_s: float | None = None
    end_s: float | None = None

    @property
    def file_name(self) -> str:
        return self.name if self.row is None else self.name.rsplit("#", 1)[0]

    @property
    def piece(self) -> tuple[float, float] | None:
        if self.start_s is None or self.end_s is None:
            return None
        return self.start_s, self.end_s


def parse_line(line: bytes) -> dict[str, Any]:
    """A line of JSONL as a dict. Raises `BadClip`."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadClip("is not JSON", str(error)) from error
    if not isinstance(row, dict):
        raise BadClip("is not a JSON object", f"but {type(row).__name__}")
    return row


def parse_row(
    row: dict[str, Any], columns: Columns, folder: Path, *, null_is_empty: bool = False
) -> tuple[Clip, Place]:
    """A row (design.md 4.7) as a clip and its place; raises `BadClip`.

    `columns` names the fields; dots reach into objects (`metadata.duration`). Relative audio paths
    start at `folder` and may not leave it. Without an id, the audio's name (and piece) is the id. A
    text of no name is empty.
    A duration that neither the row nor its piece tells is left 0. Times of segments count from
    the start of the clip.
    """
    place = _place(row, columns, folder)
    text = field(row, columns.text) if columns.text else ""
    if text is None and null_is_empty:
        text = ""
    if text is _NOTHING or text is None:
        raise BadClip(f"has no {columns.text!r}", f"its fields are {', '.join(row)}")
    if not isinstance(text, str):
        raise BadClip(f"{columns.text!r} is not a string", repr(text)[:100])
    clip = Clip(
        id=_string(row, columns.id) or _name(place),
        text=_unicode(text, columns.text),
        duration_s=_duration_s(row, columns, place),
        speaker=_string(row, columns.speaker),
        recording=_string(row, columns.recording),
        source=_string(row, columns.source),
        language=_string(row, columns.language),
        context=_string(row, columns.context),
        segments=_segments(field(row, columns.segments)),
        quality=_number(row, columns.quality),
        synthetic=_flag(row, "synthetic"),
        pseudo_label=_flag(row, "pseudo_label"),
    )
    return clip, place


def check_segments(clip: Clip) -> None:
    """Refuses segments that end after the clip does."""
    if clip.segments and clip.segments[-1].end_s > clip.duration_s + ROUNDING_S:
        told = f"{clip.segments[-1].end_s} s of {clip.duration_s:.2f} s"
        raise BadClip("segments end after the clip", told)


def has_field(row: dict[str, Any], path: str) -> bool:
    """Whether a row has a value, be it null, at a dotted path."""
    return field(row, path) is not _NOTHING


def field(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; `_NOTHING` where there is none."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name, _NOTHING) if isinstance(value, dict) else _NOTHING
    return value


def value_of(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value = field(row, path)
    return None if value is _NOTHING else value


def _place(row: dict[str, Any], columns: Columns, folder: Path) -> Place:
    name = _string(row, columns.audio)
    if not name or "\0" in name:
        raise BadClip(f"has no {columns.audio!r}", f"its fields are {', '.join(row)}")
    match = _ROW_OF_FILE.fullmatch(name)
    file, number = (match[1], int(match[2])) if match else (name, None)
    if not os.path.isabs(file) and os.path.normpath(file).split(os.sep)[0] == os.pardir:
        raise BadClip("audio lies outside the folder of the manifest", f"{name}: make it absolute")
    start_s, end_s = _number(row, "start_s"), _number(row, "end_s")
    if (start_s is None) != (end_s is None):
        raise BadClip("start_s and end_s belong together", f"{start_s}, {end_s}")
    if start_s is not None and end_s is not None and not 0 <= start_s < end_s:
        raise BadClip("start_s and end_s are out of order", f"{start_s}, {end_s}")
    if start_s is not None and file.endswith(".arrayrecord"):
        raise BadClip("a piece of a shard's record cannot be read", name)
    return Place(name, folder / file, number, start_s, end_s)


def _name(place: Place) -> str:
    return f"{place.name}@{place.start_s:g}-{place.end_s:g}" if place.piece else place.name


def _duration_s(row: dict[str, Any], columns: Columns, place: Place) -> float:
    told_s = _number(row, columns.duration_s)
    if told_s is not None and told_s <= 0:
        raise BadClip("duration is not positive", f"{told_s} s")
    if place.piece is None:
        return told_s or 0.0
    piece_s = place.piece[1] - place.piece[0]
    if told_s is not None and abs(told_s - piece_s) > ROUNDING_S:
        raise BadClip("duration is not end_s - start_s", f"{told_s} s, not {piece_s:.3f} s")
    return piece_s


def _number(row: dict[str, Any], path: str) -> float | None:
    value = field(row, path)
    if value is _NOTHING or value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadClip(f"{path!r} is not a number", repr(value)[:100])
    return float(value)


def _flag(row: dict[str, Any], path: str) -> bool:
    value = value_of(row, path)
    if value is not None and not isinstance(value, bool):
        raise BadClip(f"{path!r} is neither true nor false", repr(value)[:100])
    return bool(value)


def _string(row: dict[str, Any], path: str) -> str:
    value = field(row, path)
    if value is _NOTHING or value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadClip(f"{path!r} is not a string", repr(value)[:100])
    return _unicode(value, path)


def _unicode(value: str, path: str) -> str:
    if len(value) > _MOST_CHARACTERS:
        raise BadClip(f"{path!r} has over {_MOST_CHARACTERS:,} characters", f"{len(value):,}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadClip(f"{path!r} has half a surrogate pair", repr(value)[:100]) from error
    return value


def _segments(value: Any) -> tuple[Segment, ...]:
    if value is _NOTHING or value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise BadClip("segments are not a list of objects", repr(value)[:100])
    segments = []
    for row in value:
        start_s, end_s, text = _number(row, "start_s"), _number(row, "end_s"), row.get("text")
        if start_s is None or end_s is None or not isinstance(text, str):
            raise BadClip("a segment lacks start_s, end_s or text", repr(row)[:100])
        segments.append(Segment(start_s, end_s, _unicode(text, "segments")))
    times = [time_s for segment in segments for time_s in (segment.start_s, segment.end_s)]
    if times != sorted(times) or times[:1] < [0.0] * len(times[:1]):
        raise BadClip("segments overlap, are out of order or negative", repr(value)[:100])
    return tuple(segments)

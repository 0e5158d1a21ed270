"""Transcripts with Whisper's time stamps: `<|0.00|>words<|2.40|>`, read, written and cut.

The schema and the rules of cutting are those of `create_dataset.py` in ivrit-ai/asr-training.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from hebasr_jax.data.clips import BadClip
from hebasr_jax.errors import UserError
from hebasr_jax.timestamps import MAX_SECOND, Segment

STEP_S = 0.02  # grid of the stamps
TOLERANCE_S = 0.1  # a stamp may lie this far behind the end of its slice
MERGED_GAP_S = 0.3

_STAMP = re.compile(r"<\|(-?[0-9]+(?:\.[0-9]+)?)\|>")
_TOKEN = re.compile(r"<\|[^<>|]*\|>")


class Slice(NamedTuple):
    """What is said in a slice of a recording; times in seconds from the start of the slice.

    text: the segments' texts with a space between, or the whole text where there are no stamps.
    open_s: where a segment starts that the end of the slice cuts; its words are not in `text`.
    """

    text: str
    segments: tuple[Segment, ...]
    open_s: float | None


class Cut(NamedTuple):
    """A slice and its place: `seek_s` in the recording, `duration_s` of sound.

    previous: text of the slice before it, "" where there is none.
    """

    seek_s: float
    duration_s: float
    slice: Slice
    previous: str


def parse_transcript(transcript: str, duration_s: float) -> Slice:
    """The segments of a slice of `duration_s` seconds.

    A text without stamps is kept as it is, without segments. A segment without words is dropped;
    a last stamp without a partner is `open_s`. A stamp up to 0.1 s behind the end is the end.
    Raises `BadClip` for a stamp that is malformed, negative, beyond the end or before the one it
    follows, and for words that no two stamps enclose.
    """
    texts_and_stamps = _STAMP.split(transcript)
    texts, stamps = texts_and_stamps[::2], texts_and_stamps[1::2]
    for text in texts:
        _refuse_stamp_signs(text)
    if not stamps:
        return Slice(transcript.strip(), (), None)
    times = [_time(stamp, duration_s) for stamp in stamps]
    for before, after in pairwise(times):
        if after < before:
            raise BadClip("time stamps out of order", f"{after} s follows {before} s")
    outside = [*texts[::2], *([texts[-1]] if len(stamps) % 2 else [])]
    if any(text.strip() for text in outside):
        words = next(text for text in outside if text.strip())
        raise BadClip("words outside of time stamps", repr(words.strip()[:60]))
    spans = zip(times[::2], times[1::2], texts[1::2], strict=False)
    segments = tuple(
        Segment(start, end, text.strip()) for start, end, text in spans if text.strip()
    )
    open_s = times[-1] if len(times) % 2 else None
    return Slice(_joined(segments), segments, open_s)


def write_transcript(slice: Slice) -> str:
    """The transcript of a slice: what `parse_transcript` reads, with times on the grid of 0.02 s.

    Raises `BadClip` where a text holds the signs of a stamp, or there are words beside segments.
    """
    _refuse_stamp_signs(slice.text)
    if slice.segments or slice.open_s is not None:
        if slice.text != _joined(slice.segments):
            raise BadClip("words outside of time stamps", "the text is not that of the segments")
    elif slice.text:
        return slice.text
    stamped = [f"{_stamp(s.start_s)}{s.text}{_stamp(s.end_s)}" for s in slice.segments]
    return "".join(stamped) + ("" if slice.open_s is None else _stamp(slice.open_s))


def without_stamps(transcript: str) -> str:
    """The words of a transcript alone, whatever is wrong with its stamps."""
    return " ".join(_TOKEN.sub(" ", transcript).split())


def cut_slices(
    segments: Sequence[Segment],
    *,
    longest_s: float = 30.0,
    duration_s: float | None = None,
    quality: Sequence[float] | None = None,
    min_quality: float = 0.0,
) -> list[Cut]:
    """Slices of up to `longest_s` seconds (at most 120) from the segments of a whole recording.

    Greedy. A segment that the window's end cuts gives only the open stamp, and the next window
    starts where the last whole segment ended. Where it is the only one, the slice is empty and
    the next starts at its start. Gaps below 0.3 s are merged. A segment of no length is skipped;
    so is one longer than a window, which leaves an open stamp in the window before. A segment
    with `quality` below `min_quality` drops its slice, and the next starts at the next good
    segment. Empty, dropped and skipped stretches end the chain of `previous`.

    duration_s: of the recording; by default it ends with the last segment. Raises `BadClip`
    where segments do not follow each other.
    """
    if not 0 < longest_s <= MAX_SECOND:
        raise UserError(f"Slices of {longest_s} s cannot be cut.", "0 to 120 s are possible.")
    scored = [min_quality] * len(segments) if quality is None else quality
    known = zip(segments, scored, strict=True)
    rows = [(s, q >= min_quality) for s, q in known if s.end_s > s.start_s and s.text.strip()]
    _refuse_disorder([s for s, _ in rows])
    recording_s = max([duration_s or 0.0, *(s.end_s for s, _ in rows)])
    cuts: list[Cut] = []
    at, seek_s, previous = 0, 0.0, ""
    while at < len(rows):
        window_s = seek_s + longest_s
        stop = at
        while stop < len(rows) and rows[stop][0].end_s <= window_s + 1e-6:
            stop += 1
        bad = [i for i in range(at, stop) if not rows[i][1]]
        following = rows[stop][0] if stop < len(rows) else None
        if bad:
            # From the next good one on; those between are bad.
            at = next((i for i in range(bad[0], len(rows)) if rows[i][1]), len(rows))
            seek_s, previous = rows[at][0].start_s if at < len(rows) else seek_s, ""
            continue
        if stop == at and following and following.start_s <= seek_s:  # longer than a window
            at += 1
            seek_s, previous = rows[at][0].start_s if at < len(rows) else seek_s, ""
            continue
        cut = _cut([s for s, _ in rows[at:stop]], following, seek_s, longest_s, recording_s)
        cuts.append(cut._replace(previous=previous))
        previous = cut.slice.text
        if following and stop == at:
            seek_s = following.start_s
        elif following:
            seek_s = min(rows[stop - 1][0].end_s, following.start_s)
        at = stop
    return cuts


def _cut(
    whole: Sequence[Segment],
    following: Segment | None,
    seek_s: float,
    longest_s: float,
    recording_s: float,
) -> Cut:
    """The slice at `seek_s` with these whole segments, and the one that may cross its end."""
    length_s = min(longest_s, recording_s - seek_s)
    merged: list[Segment] = []
    for segment in whole:
        text = segment.text.strip()
        if merged and segment.start_s - merged[-1].end_s < MERGED_GAP_S:
            last = merged.pop()
            end_s, text = max(last.end_s, segment.end_s), f"{last.text} {text}"
            merged.append(Segment(last.start_s, end_s, text))
        else:
            merged.append(Segment(segment.start_s, segment.end_s, text))
    placed = tuple(
        Segment(_on_grid(s.start_s - seek_s), _on_grid(s.end_s - seek_s), s.text) for s in merged
    )
    crosses = following is not None and following.start_s < seek_s + length_s
    open_s = _on_grid(following.start_s - seek_s) if following and crosses else None
    if open_s is not None and placed:
        open_s = max(open_s, placed[-1].end_s)
    return Cut(seek_s, length_s, Slice(_joined(placed), placed, open_s), "")


def _time(stamp: str, duration_s: float) -> float:
    time_s = float(stamp)
    if stamp.startswith("-"):
        raise BadClip("negative time stamp", stamp)
    if duration_s < 0 or not time_s <= duration_s + TOLERANCE_S:
        raise BadClip("time stamp beyond the end", f"{stamp[:20]} s of {duration_s} s")
    return min(time_s, duration_s)


def _refuse_stamp_signs(text: str) -> None:
    for sign in ("<|", "|>"):
        if sign in text:
            at = text.index(sign)
            raise BadClip("malformed time stamp", repr(text[max(0, at - 10) : at + 20]))


def _refuse_disorder(segments: Sequence[Segment]) -> None:
    for before, after in zip([Segment(0.0, 0.0, ""), *segments], segments, strict=False):
        if not before.start_s <= after.start_s < after.end_s < float("inf"):
            raise BadClip("segments out of order", f"{after.start_s} s follows {before.start_s} s")


def _on_grid(time_s: float) -> float:
    return round(max(0, round(time_s / STEP_S)) * STEP_S, 2)


def _stamp(time_s: float) -> str:
    return f"<|{_on_grid(time_s):.2f}|>"


def _joined(segments: Sequence[Segment]) -> str:
    return " ".join(segment.text for segment in segments)

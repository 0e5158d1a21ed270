"""Segments to srt, vtt and tsv, with lines as whisper's command breaks them.

Text stays in logical order, without direction marks: players find the direction by themselves.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hebasr_jax.timestamps import Segment

_LONG_PAUSE_S = 3.0  # between two words; whisper's own


@dataclass(frozen=True)
class Lines:
    """How subtitles are broken, as by whisper's `--max_line_width` and `--max_line_count`.

    width: characters in a line, as far as words allow; alone, a subtitle is still a segment.
    count: lines in a subtitle; with a width, text runs on over the ends of segments and a
      subtitle ends when it is full, or at a pause of over 3 s. Without a width it does nothing.
    """

    width: int | None = None
    count: int | None = None


class Cue(NamedTuple):
    """What is shown from one time to another; lines are divided by a newline."""

    start_s: float
    end_s: float
    text: str


def to_srt(segments: Sequence[Segment], lines: Lines) -> str:
    return "".join(
        f"{number}\n{_clock(cue.start_s, ',')} --> {_end(cue, ',')}\n"
        f"{cue.text.replace('-->', '->')}\n\n"
        for number, cue in enumerate(cues(segments, lines), start=1)
    )


def to_vtt(segments: Sequence[Segment], lines: Lines) -> str:
    escape = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    return "WEBVTT\n\n" + "".join(
        f"{_clock(cue.start_s, '.')} --> {_end(cue, '.')}\n{cue.text.translate(escape)}\n\n"
        for cue in cues(segments, lines)
    )


def to_tsv(segments: Sequence[Segment]) -> str:
    """Start and end in milliseconds and the text, a segment a line."""
    return "start\tend\ttext\n" + "".join(
        f"{round(1000 * part.start_s)}\t{round(1000 * part.end_s)}\t{' '.join(part.text.split())}\n"
        for part in segments
    )


def cues(segments: Sequence[Segment], lines: Lines) -> Iterator[Cue]:
    """Subtitles of segments; a word's time is its share of the characters of its segment."""
    width = lines.width or 1 << 30
    count = lines.count if lines.width and lines.count else None
    for run in _runs(segments, across=count is not None):
        shown: list[str] = []
        start_s = end_s = 0.0
        for word in run:
            paused = bool(shown) and count is not None and word.start_s - end_s > _LONG_PAUSE_S
            fits = bool(shown) and len(shown[-1]) + 1 + len(word.text) <= width
            if paused or (shown and not fits and len(shown) == count):
                yield Cue(start_s, end_s, "\n".join(shown))
                shown = []
            if not shown:
                shown, start_s = [word.text], word.start_s
            elif fits:
                shown[-1] += f" {word.text}"
            else:
                shown.append(word.text)
            end_s = word.end_s
        if shown:
            yield Cue(start_s, end_s, "\n".join(shown))


def _runs(segments: Iterable[Segment], *, across: bool) -> Iterator[list[Segment]]:
    """The words that one subtitle may hold: those of a segment, or all."""
    words = [_words(segment) for segment in segments]
    yield from [[word for part in words for word in part]] if across else words


def _words(segment: Segment) -> list[Segment]:
    """The words of a segment; each has the space before it."""
    texts = segment.text.split()
    total = sum(len(text) + 1 for text in texts) - 1
    rate_s = (segment.end_s - segment.start_s) / max(1, total)
    found, at = [], 0
    for text in texts:
        end = at + len(text)
        found.append(Segment(segment.start_s + at * rate_s, segment.start_s + end * rate_s, text))
        at = end + 1
    return found


def _end(cue: Cue, point: str) -> str:
    """A subtitle lasts a millisecond at least: players pass over one that does not."""
    return _clock(max(cue.end_s, cue.start_s + 0.001), point)


def _clock(time_s: float, point: str) -> str:
    """HH:MM:SS and milliseconds after a comma (srt) or a full stop (vtt)."""
    seconds, ms = divmod(round(1000 * time_s), 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"

"""The part of an evaluation's page about one set: slices, a plot, confusions, the worst clips."""

import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hebasr_jax.alignment import alignment, errors_and_words, key_to_signs, shortened
from hebasr_jax.charts import Point, interval_bar, scatter
from hebasr_jax.hypotheses import Hypothesis, read_hypotheses
from hebasr_jax.metrics import AlignedWord, align_words, normalize_ivrit
from hebasr_jax.output_style import to_reference_style
from hebasr_jax.page import dict_table, escaped, folded, numeral, read_rows, table_of
from hebasr_jax.tracking import interval, percent

Numbers = Mapping[str, Any]

_WORST_CLIPS = 20
_TOP_WORDS = 20
_MOST_ROWS = 60
_HIGHEST_DRAWN = 1.5
_MOST_MISSING = 0.01


@dataclass(frozen=True)
class Clip:
    """A row, its hypothesis in the style that is scored, and the alignment that is counted."""

    row: Hypothesis
    styled: str

    @cached_property
    def columns(self) -> list[AlignedWord]:
        return align_words(normalize_ivrit(self.row.reference), normalize_ivrit(self.styled))

    @cached_property
    def errors(self) -> int:
        return errors_and_words(self.columns)[0]

    @cached_property
    def words(self) -> int:
        return errors_and_words(self.columns)[1]

    @property
    def wer(self) -> float | None:
        return self.errors / self.words if self.words else None


def read_clips(out: Path, name: str, numbers: Numbers) -> list[Clip]:
    """The rows of a set's hypotheses.jsonl. Raises `UserError` when it cannot be read."""
    style = to_reference_style if numbers.get("style") else str
    rows = read_hypotheses(out / name / "hypotheses.jsonl")
    return [Clip(row, style(row.hypothesis)) for row in rows]


def withheld(numbers: Numbers) -> str:
    """Why a set has no headline; empty when it has one."""
    missing = numbers.get("missing") or 0
    every = missing + (numbers.get("clips") or 0)
    return f"{missing:,} of {every:,} clips missing" if missing > _MOST_MISSING * every else ""


def set_section(out: Path, name: str, numbers: Numbers, clips: Sequence[Clip]) -> str:
    """A set's breakdown as HTML, out of its numbers and its clips."""
    worst = sorted(clips, key=lambda clip: (-clip.errors, clip.row.id))[:_WORST_CLIPS]
    worst = [clip for clip in worst if clip.errors]
    return "".join(
        [
            _disagreement(numbers, clips),
            _slices(numbers.get("slices") or {}),
            _plot(clips, worst),
            _hallucinations(out, name, numbers.get("hallucinations") or {}, clips),
            "<h3>Most frequent confusions</h3>" + confusions(clips),
            _worst(out, name, worst),
            _missing(read_rows(out / name / "missing.jsonl")),
        ]
    )


def confusions(clips: Iterable[Clip]) -> str:
    """Tables of the words that are most often taken for another, left out, added, or wrong."""
    seen = Counter(column for clip in clips for column in clip.columns)
    found: dict[str, Counter[tuple[str, ...]]] = {
        operation: Counter() for operation in ("equal", "substitute", "delete", "insert")
    }
    said: Counter[str] = Counter()
    for (ours, theirs, operation), count in seen.items():
        pair = (ours, theirs) if operation == "substitute" else (ours or theirs,)
        found[operation][tuple(word or "" for word in pair)] += count
        said[ours or ""] += count
    right = found["equal"]
    wrong = Counter({word: count - right[word,] for word, count in said.items() if word})
    tables = [
        _counted(["reference", "hypothesis", "times"], found["substitute"], "Another word"),
        _counted(["left out", "times"], found["delete"], "Left out"),
        _counted(["added", "times"], found["insert"], "Added"),
        _folded_rows(
            "Words of the reference most often wrong",
            ["word", "wrong", "said", "share"],
            [
                [
                    escaped(shortened(word)),
                    f"{count:,}",
                    f"{said[word]:,}",
                    percent(count / said[word]),
                ]
                for word, count in _most(wrong)
            ],
        ),
    ]
    return f'<div class="tables">{"".join(tables)}</div>' if any(tables) else "<p>No error.</p>"


def _counted(names: Sequence[str], counts: Counter[tuple[str, ...]], title: str) -> str:
    rows = [
        [*(escaped(shortened(word)) for word in words), f"{count:,}"]
        for words, count in _most(counts)
    ]
    return _folded_rows(title, names, rows)


def _most(counts: Counter[Any]) -> list[tuple[Any, int]]:
    """The most frequent, in an order that does not hang on the file's."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(key, count) for key, count in ordered[:_TOP_WORDS] if count]


def _folded_rows(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<div><h4>{title}</h4>{table_of(names, rows)}</div>" if rows else ""


def _disagreement(numbers: Numbers, clips: Sequence[Clip]) -> str:
    """Said when the alignments below are not those that the set's numbers count."""
    names = {"substitutions": "substitute", "deletions": "delete", "insertions": "insert"}
    seen = Counter[str](column.operation for clip in clips for column in clip.columns)
    told = {key: numbers[key] for key in names if key in numbers}
    if all(seen[names[key]] == count for key, count in told.items()):
        return ""
    return (
        f"<p><b>hypotheses.jsonl holds {sum(clip.errors for clip in clips):,} errors and "
        f"results.json tells of {sum(told.values()):,}: they do not belong together. "
        "Evaluate this set again.</b></p>"
    )


def _slices(slices: Mapping[str, Sequence[Numbers]]) -> str:
    parts = []
    for name, rows in slices.items():
        bounds = [row["ci95"][1] for row in rows if interval(row.get("ci95"))]
        shown = [_slice_row(row, max(bounds, default=0.0)) for row in rows[:_MOST_ROWS]]
        more = f"<p>{len(rows) - _MOST_ROWS:,} more.</p>" if len(rows) > _MOST_ROWS else ""
        names = [name, "WER", "95 %", "", "words", "clips"]
        parts.append(f"<div><h4>by {escaped(name)}</h4>{table_of(names, shown)}{more}</div>")
    return f'<h3>Slices</h3><div class="tables tight">{"".join(parts)}</div>' if parts else ""


def _slice_row(row: Numbers, top: float) -> list[str]:
    bounds = row.get("ci95")
    known = interval(bounds)
    bar = interval_bar(row["wer"], bounds, top) if bounds and known and top > 0 else ""
    counts = (numeral(row.get(key)) for key in ("words", "clips"))
    return [escaped(row.get("name")), percent(row.get("wer")), known or "unknown", bar, *counts]


def _plot(clips: Sequence[Clip], worst: Sequence[Clip]) -> str:
    known = [clip for clip in clips if clip.words]
    named = [
        (_dot(clip), f"{clip.row.id}: WER {percent(clip.wer)}, {clip.row.duration_s:,.1f} s")
        for clip in worst
        if clip.words
    ]
    figure = scatter(
        "WER of each clip by its duration",
        [_dot(clip) for clip in known],
        named,
        _trend(known),
        "{:,g} s".format,
        lambda share: f"{100 * share:.3g} %",
    )
    note = (
        f"<p>A dot is a clip, a triangle one of the worst {_WORST_CLIPS} by errors, whose name "
        "shows under the pointer. The line is the rate of all words in each eighth of the clips. "
        f"Clips over {100 * _HIGHEST_DRAWN:g} % are drawn at that height.</p>"
    )
    return figure and f'<div class="charts">{figure}</div>{note}'


def _dot(clip: Clip) -> Point:
    return Point(clip.row.duration_s, min(clip.wer or 0.0, _HIGHEST_DRAWN))


def _trend(clips: Sequence[Clip]) -> list[Point]:
    """Rate over the words of each eighth of the clips, by duration; none for a few clips."""
    ordered = sorted(clips, key=lambda clip: clip.row.duration_s)
    size = len(ordered) / 8
    if size < 5:
        return []
    parts = [ordered[round(i * size) : round((i + 1) * size)] for i in range(8)]
    return [
        Point(
            statistics.median(clip.row.duration_s for clip in part),
            min(sum(c.errors for c in part) / sum(c.words for c in part), _HIGHEST_DRAWN),
        )
        for part in parts
    ]


_KINDS = {
    "loops": "The same words again and again",
    "insertion_bursts": "Many words added at a stretch",
    "text_on_silence": "Text on silence",
}


def _hallucinations(
    out: Path, name: str, kinds: Mapping[str, Numbers], clips: Iterable[Clip]
) -> str:
    by_id = {clip.row.id: clip for clip in clips}
    parts = []
    for kind, found in kinds.items():
        ids = [str(i) for i in found.get("ids") or ()]
        of_silent = f", of {numeral(found['silent'])} silent ones" if "silent" in found else ""
        count = numeral(found.get("count", len(ids)))
        line = f"{_KINDS.get(kind, escaped(kind))}, clips: {count}{of_silent}"
        examples = "".join(_clip(out, name, by_id[i]) for i in ids[:3] if i in by_id)
        if others := ", ".join(ids[3:]):
            examples += f"<p>Also, as far as they are named: {escaped(others)}</p>"
        parts.append(folded(line, examples) if examples else f"<p>{line}</p>")
    return "<h3>Hallucination</h3>" + "".join(parts) if parts else ""


def _worst(out: Path, name: str, worst: Sequence[Clip]) -> str:
    shown = "".join(_clip(out, name, clip) for clip in worst)
    title = f"The worst {len(worst)} clips by number of errors"
    return "<h3>Worst clips</h3>" + folded(title, key_to_signs("") + shown) if worst else ""


def _clip(out: Path, name: str, clip: Clip) -> str:
    row, counts = clip.row, Counter(column.operation for column in clip.columns)
    facts = [
        escaped(row.id),
        f"errors: {clip.errors:,} (≠ {counts['substitute']:,}, − {counts['delete']:,}, "
        f"+ {counts['insert']:,}), words: {clip.words:,}, WER {percent(clip.wer)}",
        f"{row.duration_s:,.1f} s",
        *(
            f"{key} {escaped(value)}"
            for key in ("source", "speaker")
            if (value := getattr(row, key))
        ),
        "" if row.snr_db is None else f"SNR {row.snr_db:.0f} dB",
        f"loops: {row.loops}" if row.loops else "",
        "" if row.finished else "budget met: text may be missing",
        "silent" if row.silent else "",
    ]
    written = (row.reference, row.hypothesis)
    return alignment(
        " · ".join(filter(None, facts)), clip.columns, written, _player(out, name, row)
    )


def _player(out: Path, name: str, row: Hypothesis) -> str:
    """Plays the clip's file where it lies: by a relative path below `out`, else by its full one.

    Sound is never put into the page: gated recordings do not travel with it, and it stays small.
    """
    for folder in (out / name, out, Path()):
        path = Path(os.path.abspath(folder / row.audio))
        if row.audio and os.path.isfile(path):
            break
    else:
        return ""
    root = Path(os.path.abspath(out))
    if path.is_relative_to(root):
        source = "./" + quote(path.relative_to(root).as_posix())
    else:
        source = path.as_uri()
    return f'<audio controls preload="none" src="{source}"></audio>'


def _missing(rows: Sequence[Numbers]) -> str:
    if not rows:
        return ""
    more = f"<p>{len(rows) - _MOST_ROWS:,} more.</p>" if len(rows) > _MOST_ROWS else ""
    return f"<h3>Missing clips: {len(rows):,}</h3>" + dict_table(rows[:_MOST_ROWS]) + more

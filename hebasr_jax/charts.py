"""Small charts as SVG text: they need no library, follow light and dark, and hold no script.

Colours and line styles are classes (`s0`, `s1`, ...), and `CSS` gives them for both modes.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

_WIDTH, _HEIGHT = 640, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 612, 12, 222
_MAX_POINTS = 400
_MARKED_POINTS = 40

_LIGHT = ("#0b6bb5", "#c8500a", "#0a8560", "#a8447f", "#7a6200", "#5a55c0", "#5a6470")
_DARK = ("#6cb8f5", "#ff9a5c", "#4fd0a4", "#ec9cca", "#dcc050", "#aaa6ff", "#b4bec8")
_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 4", "12 3", "1 2")


def _palette(colours: Sequence[str]) -> str:
    return " ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours))


_RULES = (
    "\n".join(
        f".s{i} {{ stroke: var(--s{i}); color: var(--s{i}); stroke-dasharray: {dash}; }}"
        for i, dash in enumerate(_DASHES)
    )
    + """
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; }
.legend svg { width: 28px; height: 10px; vertical-align: middle; margin-inline-end: .35rem; }
.chart { width: 100%; height: auto; display: block; }
.chart text { fill: var(--muted); font-size: 12px; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .bar { fill: var(--s0); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dot, .range { stroke-dasharray: none; }
.dot { fill: currentColor; stroke: none; }
.range { stroke-width: 1.5; opacity: .65; }
.interval { width: 180px; height: 14px; } .interval .grid { stroke: var(--line); }
.interval .span { stroke-width: 6; opacity: .4; } .interval .tick { stroke-width: 2; }
.cloud { fill: none; stroke-width: 5; stroke-linecap: round; stroke-dasharray: none; opacity: .6; }
.named { fill: var(--s1); stroke: var(--paper); }
.chart .bad { stroke: var(--wrong); stroke-width: 2; }
"""
)
CSS = (
    f":root {{ {_palette(_LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_palette(_DARK)} }} }}\n" + _RULES
)


Number = float | int  # JSON writes 1.0 and 1 alike


@dataclass(frozen=True)
class Point:
    """y is NaN where the number was not finite; low and high bound it where that is known."""

    x: Number
    y: Number
    low: Number | None = None
    high: Number | None = None


@dataclass(frozen=True)
class Curve:
    """style: which colour and dashes; the same thing has the same in every chart."""

    name: str
    points: Sequence[Point]
    style: int = 0


@dataclass(frozen=True)
class _Axis:
    """Maps numbers to pixels; `ticks` are numbers."""

    low: Number
    high: Number
    start_px: Number
    end_px: Number
    log: bool
    ticks: tuple[Number, ...]

    def __call__(self, value: Number) -> Number:
        low, high = (math.log(b) if self.log else b for b in (self.low, self.high))
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.start_px + share * (self.end_px - self.start_px), 1)


def line_chart(
    title: str,
    curves: Sequence[Curve],
    write: Callable[[Number], str] = "{:,g}".format,
    *,
    log: bool = False,
) -> str:
    """A figure of curves over steps; empty text when no curve has a point.

    The y axis starts at 0 when no number is negative. log: it is logarithmic when all are positive
    and span more than a factor of 20. Points that are not finite are crosses at the bottom. Long
    curves keep the smallest and the largest of each stretch, so no peak is lost.
    """
    curves = [replace(curve, points=_thinned(curve.points)) for curve in curves if curve.points]
    if not curves:
        return ""
    body = _plot(curves, write, log)
    return _figure(title, body, _legend(curves) if len(curves) > 1 else "")


def line_charts_file(
    charts: Sequence[tuple[str, Sequence[Curve], Callable[[Number], str]]],
) -> str:
    """An SVG file of `line_chart`s one below the other, on white; empty when no curve has a point.

    Each is its title, its curves, and how its numbers are written; titles and names stand in it.
    """
    parts, top = [], 0
    for title, curves, write in charts:
        drawn = [replace(curve, points=_thinned(curve.points)) for curve in curves if curve.points]
        if drawn:
            head = [f'<text x="{_LEFT}" y="18" font-weight="bold">{html.escape(title)}</text>']
            for row, curve in enumerate(drawn):
                y = 38 + 18 * row
                line = f'x1="{_LEFT}" x2="{_LEFT + 28}" y1="{y - 4}" y2="{y - 4}"'
                head.append(f'<line class="{_style(curve)} curve" {line}/>')
                head.append(f'<text x="{_LEFT + 36}" y="{y}">{html.escape(curve.name)}</text>')
            plot = "".join(_plot(drawn, write, log=True))
            below = 30 + 18 * len(drawn)
            parts.append(
                f'<g transform="translate(0 {top})">{"".join(head)}'
                f'<g transform="translate(0 {below})">{plot}</g></g>'
            )
            top += below + _HEIGHT + 10
    if not parts:
        return ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {_WIDTH} {top}">'
        f"<style>:root {{ {_palette(_LIGHT)} --muted: #56616c; --line: #d8dee4; --wrong: #b3261e; "
        f'font-family: sans-serif; }}\n{_RULES}</style><rect width="{_WIDTH}" height="{top}" '
        f'fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def histogram(title: str, edges: Sequence[Number], counts: Sequence[Number], unit: str) -> str:
    """Bars between edges; empty text when nothing is counted."""
    if not counts or len(edges) != len(counts) + 1 or max(counts) <= 0 or edges[-1] <= edges[0]:
        return ""
    x_axis, y_axis = _across(edges), _upwards(counts, log=False)
    body = [*_grid(y_axis, "{:,g}".format)]
    body += _x_labels(x_axis, x_axis.ticks, lambda edge: f"{edge:g} {html.escape(unit)}")
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        left, right, top = x_axis(low), x_axis(high), y_axis(count)
        told = f"{low:g} to {high:g} {html.escape(unit)}: {count:,g}"
        body.append(
            f'<rect class="bar" x="{left + 0.5:g}" y="{top}" width="{max(right - left - 1, 0.5):g}"'
            f' height="{_BOTTOM - top:g}"><title>{told}</title></rect>'
        )
    return _figure(title, body, "")


def scatter(
    title: str,
    points: Sequence[Point],
    named: Sequence[tuple[Point, str]],
    trend: Sequence[Point],
    write_x: Callable[[Number], str],
    write_y: Callable[[Number], str],
) -> str:
    """A figure of dots, of dots with names that show under the pointer, and of a line over them.

    x is logarithmic when all are positive and span more than a factor of 20; y starts at 0.
    Empty text when there is no point.
    """
    everything = [*points, *trend, *(point for point, _ in named)]
    if not everything:
        return ""
    x_axis = _across([point.x for point in everything], log=True)
    y_axis = _upwards([point.y for point in everything], log=False)
    body = [*_grid(y_axis, write_y), *_x_labels(x_axis, x_axis.ticks, write_x)]
    # One path, each pixel once: thousands of clips stay small.
    dots = dict.fromkeys(f"M{x_axis(p.x):.0f} {y_axis(p.y):.0f}h0" for p in points)
    body.append(f'<path class="s0 cloud" d="{"".join(dots)}"/>')
    line = " ".join(f"{x_axis(point.x):g},{y_axis(point.y):g}" for point in trend)
    body.append(f'<polyline class="s3 curve" points="{line}"/>')
    body += [
        f'<path class="named" d="M{x_axis(point.x):g} {y_axis(point.y) - 5:g}l5 9h-10z">'
        f"<title>{html.escape(name)}</title></path>"
        for point, name in named
    ]
    return _figure(title, body, "")


def interval_bar(value: Number, bounds: Sequence[Number], top: Number) -> str:
    """A tick on the bar between the bounds, on a scale from 0 to top."""
    left, right, at = (round(2 + 176 * x / top, 1) for x in (*bounds, value))
    return (
        '<svg class="interval" viewBox="0 0 180 14" aria-hidden="true">'
        '<line class="grid" x1="2" x2="178" y1="7" y2="7"/>'
        f'<line class="s0 span" x1="{left}" x2="{right}" y1="7" y2="7"/>'
        f'<line class="s0 tick" x1="{at}" x2="{at}" y1="1" y2="13"/></svg>'
    )


def _plot(curves: Sequence[Curve], write: Callable[[Number], str], log: bool) -> list[str]:
    """The axes and strokes of curves that have points."""
    points = [point for curve in curves for point in curve.points]
    x_axis = _across([point.x for point in points])
    heights = (y for p in points for y in (p.y, p.low, p.high) if y is not None)
    y_axis = _upwards([y for y in heights if math.isfinite(y)], log)
    steps = [tick for tick in x_axis.ticks if tick % 1 == 0]
    body = [*_grid(y_axis, write), *_x_labels(x_axis, steps, "{:,.0f}".format)]
    for curve in curves:
        body += _drawn(curve, x_axis, y_axis, write)
    return body


def _drawn(curve: Curve, x_axis: _Axis, y_axis: _Axis, write: Callable[[Number], str]) -> list[str]:
    """The strokes of one curve: ranges, unbroken stretches, dots, and crosses for NaN."""
    marks, style = [], _style(curve)
    few = len(curve.points) <= _MARKED_POINTS
    for finite, run in groupby(curve.points, key=lambda point: math.isfinite(point.y)):
        stretch = list(run)
        if not finite:
            marks += [_cross(x_axis(point.x), curve.name, point.x) for point in stretch]
            continue
        pixels = [(x_axis(point.x), y_axis(point.y)) for point in stretch]
        path = " ".join(f"{x:g},{y:g}" for x, y in pixels)
        marks.append(f'<polyline class="{style} curve" points="{path}"/>')
        for point, (x, y) in zip(stretch, pixels, strict=True):
            if point.low is not None and point.high is not None:
                low, high = y_axis(point.low), y_axis(point.high)
                marks.append(
                    f'<line class="{style} range" x1="{x:g}" x2="{x:g}" y1="{low}" y2="{high}"/>'
                )
            if few or len(stretch) == 1:
                told = html.escape(f"{curve.name}, step {point.x:,.0f}: {write(point.y)}")
                marks.append(
                    f'<circle class="{style} dot" cx="{x:g}" cy="{y:g}" r="3"><title>{told}</title>'
                    "</circle>"
                )
    return marks


def _style(curve: Curve) -> str:
    return f"s{curve.style % len(_DASHES)}"


def _cross(x: Number, name: str, step: Number) -> str:
    told = html.escape(f"{name}, step {step:,.0f}: not finite")
    top, bottom = _BOTTOM - 9, _BOTTOM - 1
    return (
        f'<path class="bad" d="M{x - 4:g} {top}L{x + 4:g} {bottom}M{x - 4:g} {bottom}'
        f'L{x + 4:g} {top}"><title>{told}</title></path>'
    )


def _thinned(points: Sequence[Point]) -> list[Point]:
    """About 400 points at most: both ends, the extremes of each stretch, and every NaN."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / _MAX_POINTS)
    kept = {0, len(points) - 1}
    kept |= {i for i, point in enumerate(points) if not math.isfinite(point.y)}
    for start in range(0, len(points), stretch):
        finite = [i for i in range(start, min(start + stretch, len(points))) if i not in kept]
        if finite:
            kept |= {pick(finite, key=lambda i: points[i].y) for pick in (min, max)}
    return [points[i] for i in sorted(kept)]


def _across(values: Sequence[Number], log: bool = False) -> _Axis:
    low, high = min(values), max(values)
    if log and low > 0 and high / low > 20:
        return _Axis(low / 1.15, high * 1.15, _LEFT, _RIGHT, True, _log_ticks(low, high))
    if high <= low:
        low, high = low - 0.5, low + 0.5
    return _Axis(low, high, _LEFT, _RIGHT, False, _ticks(low, high))


def _upwards(values: Sequence[Number], log: bool) -> _Axis:
    low, high = min(values, default=0.0), max(values, default=0.0)
    if log and low > 0 and high / low > 20:
        return _Axis(low / 1.15, high * 1.15, _BOTTOM, _TOP, True, _log_ticks(low, high))
    low = min(low, 0.0)
    high = high + 0.06 * (high - low) if high > low else low + 1.0
    return _Axis(low, high, _BOTTOM, _TOP, False, _ticks(low, high))


def _ticks(low: Number, high: Number) -> tuple[Number, ...]:
    """Three to six round numbers."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{k * step:.6g}") for k in range(first, last + 1))


def _log_ticks(low: Number, high: Number) -> tuple[Number, ...]:
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (float(f"{factor}e{power}") for power in powers for factor in factors)
    return tuple(tick for tick in ticks if low / 1.15 <= tick <= high * 1.15)


def _grid(axis: _Axis, write: Callable[[Number], str]) -> list[str]:
    return [
        f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{axis(tick)}" y2="{axis(tick)}"/>'
        f'<text x="{_LEFT - 6}" y="{axis(tick) + 4:g}" text-anchor="end">{write(tick)}</text>'
        for tick in axis.ticks
    ]


def _x_labels(axis: _Axis, ticks: Sequence[Number], write: Callable[[Number], str]) -> list[str]:
    return [
        f'<text x="{axis(tick)}" y="{_BOTTOM + 18}" text-anchor="middle">{write(tick)}</text>'
        for tick in ticks
    ]


def _figure(title: str, body: Sequence[str], legend: str) -> str:
    name = html.escape(title)
    return (
        f"<figure><figcaption>{name}</figcaption>{legend}"
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">'
        f"{''.join(body)}</svg></figure>"
    )


def _legend(curves: Sequence[Curve]) -> str:
    items = (
        f'<span><svg viewBox="0 0 28 10" aria-hidden="true"><line class="{_style(curve)} curve" '
        f'x1="0" x2="28" y1="5" y2="5"/></svg><bdi>{html.escape(curve.name)}</bdi></span>'
        for curve in curves
    )
    return f'<div class="legend">{"".join(items)}</div>'

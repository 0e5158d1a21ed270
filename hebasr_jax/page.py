"""Pieces of an offline page: escaped text, tables, and one file with its style inside."""

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hebasr_jax.charts import CSS as CHARTS_CSS


def escaped(value: Any) -> str:
    """Escaped, and kept apart in direction from what stands around it."""
    shown = "" if value is None else html.escape(str(value))
    return f"<bdi>{shown}</bdi>" if shown else ""


def numeral(value: Any) -> str:
    """A cell's text: whole numbers with separators, others to four digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escaped(value)
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,.0f}"


def direction_of(text: str) -> str:
    """rtl as soon as one letter is Hebrew or Arabic: its words then run from the right."""
    rtl = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)
    return "rtl" if rtl else "ltr"


def table_of(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def dict_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of all keys of the rows, in the order they come up."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = ([numeral(row.get(name)) for name in names] for row in rows)
    return table_of([str(name).replace("_", " ") for name in names], cells)


def side_by_side(charts: Sequence[str]) -> str:
    """As many charts in a row as the window holds."""
    shown = "".join(charts)
    return f'<div class="charts">{shown}</div>' if shown else "<p>No numbers yet.</p>"


def folded(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def whole_page(title: str, sections: Mapping[str, str]) -> str:
    """The file: sections of HTML under their headings, style inside, nothing loaded or run."""
    body = "".join(
        f"<section>{f'<h2>{html.escape(heading)}</h2>' if heading else ''}{content}</section>"
        for heading, content in sections.items()
    )
    title = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{_CSS}{CHARTS_CSS}</style></head>"
        f"<body><main><h1><bdi>{title}</bdi></h1>{body}</main></body></html>\n"
    )


_CSS = """
:root { color-scheme: light dark; --ink: #1b2229; --muted: #56616c; --line: #d8dee4;
  --paper: #fff; --panel: #f4f6f8; --wrong: #b3261e; --extra: #7a4d00; --gone: #5a3fb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --muted: #9aa7b3; --line: #343d46;
  --paper: #14181c; --panel: #1d2329; --wrong: #ff8a80; --extra: #ffc46b; --gone: #b9a6ff; } }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Noto Sans Hebrew", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.2rem; }
h1 { font-size: 1.6rem; margin: .2rem 0 1rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { max-width: 48rem; color: var(--muted); margin: .4rem 0; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; }
.tile { background: var(--panel); border-radius: 6px; padding: .55rem .9rem; min-width: 8rem; }
.tile div { font-size: .8rem; color: var(--muted); } .tile b { font-size: 1.35rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1.4rem 2rem; }
.charts figure { max-width: 46rem; display: flex; flex-direction: column; }
.charts .chart { margin-top: auto; }
.wide, .charts { margin: .6rem 0 1.2rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: start; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { color: var(--muted); font-weight: 600; }
summary { cursor: pointer; color: var(--muted); }
.sample { background: var(--panel); border-radius: 6px; padding: .5rem .9rem; margin: .5rem 0; }
.id, .sample summary { font-size: .8rem; color: var(--muted); }
.words { display: flex; flex-wrap: wrap; gap: .5rem .35rem; margin: .35rem 0; font-size: 1.05rem; }
.words > span { display: inline-grid; grid-template-rows: auto auto .9rem; padding: 0 .2rem;
  border-radius: 4px; text-align: center; }
.words i { font: 700 .8rem/1 sans-serif; } .words > .equal > span:last-of-type { opacity: .55; }
.words del, .key del { text-decoration: line-through 2px; }
.words ins, .key ins { text-decoration: underline 2px; }
.substitute { color: var(--wrong); } .delete { color: var(--gone); }
.insert { color: var(--extra); }
.words > .substitute, .words > .delete, .words > .insert { background: var(--paper);
  outline: 1px solid currentColor; }
.key { max-width: none; }
.key > span { white-space: nowrap; margin-inline-start: .6rem; font-weight: 600; }
"""

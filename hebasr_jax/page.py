"""Pieces of an offline page: escaped text, tables, and one file with its style inside."""

import html
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hebasr_jax.charts import CSS as CHARTS_CSS
from hebasr_jax.errors import UserError


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


def facts_table(value: Any) -> str:
    """Every leaf of nested mappings and lists beside its path, folded."""
    rows = [[escaped(path), escaped(leaf)] for path, leaf in _leaves(value)]
    return folded(f"{len(rows)} facts", table_of(["fact", "value"], rows))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        pairs = enumerate(value)
    else:
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else value
    for key, item in pairs:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def side_by_side(charts: Sequence[str]) -> str:
    """As many charts in a row as the window holds."""
    shown = "".join(charts)
    return f'<div class="charts">{shown}</div>' if shown else "<p>No numbers yet.</p>"


def folded(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def write_page(
    path: Path,
    title: str,
    sections: Mapping[str, str],
    *,
    media: bool = False,
    from_right: bool = False,
) -> None:
    """Writes sections of HTML under their headings, whole or not at all. Raises `UserError`.

    The style is inside; nothing is run, and nothing loaded but, with `media`, sound of local files.

    Args:
      from_right: the page is laid out from right to left; each text runs as its letters do.
    """
    partial = path.with_name(f".{path.stem}-{os.getpid()}.partial")
    try:
        partial.write_text(_whole_page(title, sections, media, from_right), "utf-8", "replace")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written", error.strerror or str(error)) from None


def _whole_page(title: str, sections: Mapping[str, str], media: bool, from_right: bool) -> str:
    body = "".join(
        f"<section>{f'<h2>{html.escape(heading)}</h2>' if heading else ''}{content}</section>"
        for heading, content in sections.items()
    )
    title = html.escape(title)
    sound = (
        "; media-src 'self' file:" if media else ""
    )  # 'self' where a server hands out the folder
    return (
        f'<!doctype html><html lang="en" dir="{"rtl" if from_right else "ltr"}">'
        '<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'unsafe-inline'{sound}\">"
        f"<title>{title}</title><style>{_CSS}{CHARTS_CSS}</style></head>"
        f"<body><main><h1><bdi>{title}</bdi></h1>{body}</main></body></html>\n"
    )


def read_json(path: Path) -> Any:
    """What a file holds; None when it is not there or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON; none when it is not there. A line cut short is passed over."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        rows.append(row if isinstance(row, dict) else {"reason": str(row)})
    return rows


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
.tile { background: var(--panel); border-radius: 6px; padding: .55rem .9rem;
  min-width: 8rem; max-width: 16rem; }
.tile div { font-size: .8rem; color: var(--muted); } .tile b { font-size: 1.35rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1.4rem 2rem; }
.charts figure { max-width: 46rem; display: flex; flex-direction: column; }
.charts .chart { margin-top: auto; }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } .tables > div { max-width: 100%; }
h4 { font-size: .9rem; margin: .8rem 0 .2rem; } a { color: inherit; }
.wide, .charts { margin: .6rem 0 1.2rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: start; padding-block: .25rem; padding-inline: 0 .7rem;
  border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
.tight td { white-space: nowrap; padding-inline-end: .55rem; }
.tight .long { white-space: normal; min-width: 11rem; }
summary { cursor: pointer; color: var(--muted); }
.sample { background: var(--panel); border-radius: 6px; padding: .5rem .9rem; margin: .5rem 0; }
.id, .sample summary { font-size: .8rem; color: var(--muted); overflow-wrap: anywhere; }
.sample details > div { overflow-wrap: anywhere; white-space: pre-wrap; }
.sample details > div > div + div { border-top: 1px solid var(--line); }
.words .gap { align-self: center; color: var(--muted); font-size: .8rem; }
audio { display: block; width: 22rem; max-width: 100%; height: 2.2rem; margin: .3rem 0; }
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
[dir=rtl] :is(h1, h2, h3, h4, p, th, td, summary, figcaption, .tile > *, .id) {
  direction: ltr; unicode-bidi: plaintext; text-align: right; }
[dir=rtl] svg { direction: ltr; }
.key > span { white-space: nowrap; margin-inline-start: .6rem; font-weight: 600; }
"""

"""report.html of an evaluation: one offline page that runs no script and needs no network.

Everything comes from the files of its folder; what is not there is left out and said. All text is
escaped: a transcript may hold anything.
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hebasr_jax.alignment import shortened
from hebasr_jax.charts import interval_bar
from hebasr_jax.errors import UserError
from hebasr_jax.metrics import align_words
from hebasr_jax.page import (
    dict_table,
    escaped,
    facts_table,
    folded,
    numeral,
    read_json,
    table_of,
    write_page,
)
from hebasr_jax.report_set import Clip, Numbers, confusions, read_clips, set_section, withheld
from hebasr_jax.tracking import interval, percent

_MOST_EXAMPLES = 20


def write_evaluation_report(out: Path) -> Path:
    """Writes report.html into the folder of an evaluation, whole or not at all; returns its path.

    Reads results.json, and where they are there each set's hypotheses.jsonl and missing.jsonl,
    compare.json, overlap.json and control/results.json. The same files give the same page. Clips
    whose sound lies in a file of their own get a player. Raises `UserError` when results.json
    cannot be read or the page cannot be written.
    """
    results = read_json(out / "results.json")
    if not isinstance(results, Mapping):
        raise UserError(
            f"{out / 'results.json'} is missing or damaged",
            "the report is made of it",
            "evaluate into this folder first",
        )
    sets = _mappings(results.get("sets"))
    control = _mapping(read_json(out / "control" / "results.json"))
    clips, broken = _read_all(out, sets)
    sections = {
        "": _headline(results, sets),
        "Beside other systems": _systems(results, sets, control),
        "Paired comparison": _comparison(read_json(out / "compare.json"), sets),
        "Output style and spelling": _style(sets, clips),
    }
    if len(clips) > 1:
        everything = [clip for of_set in clips.values() for clip in of_set]
        sections["Most frequent confusions, all sets"] = confusions(everything)
    for number, (name, numbers) in enumerate(sets.items()):
        found = clips.get(name)
        content = broken[name] if found is None else set_section(out, name, numbers, found)
        sections[f"Set {name}"] = f'<a id="set{number}"></a>{content}'
    sections |= {
        "Sets not evaluated": _reasons(_mapping(results.get("skipped"))),
        "Overlap with training data": _overlap(read_json(out / "overlap.json"), sets),
        "Model, decoding, versions": _facts(results, sets),
    }
    page = out / "report.html"
    title = f"Evaluation: {out.resolve().name}"
    write_page(page, title, sections, media=True, from_right=True)
    return page


def _read_all(
    out: Path, sets: Mapping[str, Numbers]
) -> tuple[dict[str, list[Clip]], dict[str, str]]:
    """The clips of each set, and for a set without them what is said instead."""
    clips: dict[str, list[Clip]] = {}
    broken: dict[str, str] = {}
    for name, numbers in sets.items():
        try:
            clips[name] = read_clips(out, name, numbers)
        except UserError as error:
            broken[name] = f"<p>No breakdown. {escaped(error)}</p>"
    return clips, broken


# --- the headline ----------------------------------------------------------------------------


def _headline(results: Numbers, sets: Mapping[str, Numbers]) -> str:
    if not sets:
        return "<p>No set was evaluated.</p>"
    headed = [numbers for numbers in sets.values() if not withheld(numbers)]
    bounds = [numbers["ci95"][1] for numbers in headed if interval(numbers.get("ci95"))]
    top = max(bounds, default=0.0)
    rows = [
        _headline_row(f"set{number}", name, numbers, top)
        for number, (name, numbers) in enumerate(sets.items())
    ]
    names = ["set", "WER", "95 %", "", "CER", "WIL", "≠", "−", "+", "words", "clips", "missing"]
    names += ["empty", "loops", "unfinished", "hours", "RTFx"]
    note = (
        "<p>WER: errors over all reference words of a set, both sides normalised as by ivrit.ai "
        "(substituted ≠, left out −, added +). The interval is a bootstrap by recording where "
        "those are known, else by speaker, else by clip. Missing: clips that could not be decoded; "
        "over 1 % of them a set has no headline. Empty: nothing was written though something was "
        "said. Unfinished: the budget of tokens was met, and text may be missing. RTFx: seconds of "
        "audio decoded in a second.</p>"
    )
    return f'{_tiles(results, sets)}<div class="tight">{table_of(names, rows)}</div>{note}'


def _tiles(results: Numbers, sets: Mapping[str, Numbers]) -> str:
    macro = _mapping(results.get("macro"))
    totals = {
        key: sum(numbers.get(key) or 0 for numbers in sets.values())
        for key in ("clips", "audio_s", "missing", "loops", "unfinished")
    }
    tiles = [
        ("macro mean WER", percent(macro["wer"]), _whose_mean(macro))
        if macro.get("sets")
        else None,
        ("sets", f"{len(sets):,}", ""),
        ("clips", f"{totals['clips']:,}", f"{totals['missing']:,} more are missing"),
        ("audio", f"{totals['audio_s'] / 3600:,.2f} h", ""),
        ("loops", f"{totals['loops']:,}", "decoded again"),
        ("unfinished", f"{totals['unfinished']:,}", "text may be missing"),
    ]
    shown = (
        f'<div class="tile"><div>{escaped(tile[0])}</div><b>{escaped(tile[1])}</b>'
        f"<div>{escaped(tile[2])}</div></div>"
        for tile in tiles
        if tile
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _whose_mean(macro: Numbers) -> str:
    names = macro.get("sets") or ()
    if macro.get("complete"):
        return "the six sets, each alike"
    if macro.get("trial"):
        return f"a trial on the first clips of {', '.join(names)}"
    return f"only {len(names)} of the six sets: {', '.join(names)}"


def _headline_row(anchor: str, name: str, numbers: Numbers, top: float) -> list[str]:
    why = withheld(numbers)
    bounds = None if why else numbers.get("ci95")
    known = interval(bounds)
    bar = interval_bar(numbers["wer"], bounds, top) if bounds and known and top > 0 else ""
    counts = ["substitutions", "deletions", "insertions", "words", "clips", "missing", "empty"]
    counts += ["loops", "unfinished"]
    trial = (
        f"<div>a trial: first {most:,} clips</div>" if (most := numbers.get("max_clips")) else ""
    )
    return [
        f'<a href="#{anchor}">{escaped(name)}</a>{trial}',
        _wer(numbers),
        "" if why else known or "unknown",
        bar or why,
        *("" if why else _rate(numbers, key) for key in ("cer", "wil")),
        *(numeral(numbers.get(key)) for key in counts),
        f"{numbers['audio_s'] / 3600:,.2f}" if numbers.get("audio_s") is not None else "",
        "" if numbers.get("rtfx") is None else f"{numbers['rtfx']:,.1f}",
    ]


def _wer(numbers: Numbers) -> str:
    return f"<b>{'none' if withheld(numbers) else percent(numbers.get('wer'))}</b>"


def _rate(numbers: Numbers, key: str) -> str:
    return percent(numbers[key]) if key in numbers else ""


# --- beside others ---------------------------------------------------------------------------


def _systems(results: Numbers, sets: Mapping[str, Numbers], control: Numbers) -> str:
    measured = {"this model": sets}
    if control:
        name = _mapping(control.get("model")).get("name", "")
        measured[f"the control, {name}"] = _mappings(control.get("sets"))
    published: dict[tuple[str, str], dict[str, float]] = {}
    for name, figures in _mapping(results.get("published")).items():
        for one in figures:
            whose = str(one.get("system", "")), str(one.get("source", ""))
            published.setdefault(whose, {})[name] = one["wer"]
    columns = list(dict.fromkeys([*sets, *(n for found in published.values() for n in found)]))
    rows = []
    for system, scores in measured.items():
        cells = [_cell(scores[name]) if name in scores else "–" for name in columns]
        rows.append([f"<b>{_long(system)}</b>", *cells, "measured here"])
    for (system, source), found in published.items():
        cells = [percent(found[name]) if name in found else "–" for name in columns]
        rows.append([_long(system), *cells, _long(f"published: {source}")])
    note = "" if control else "<p>No control was run here.</p>"
    note += (
        "<p>Published figures are others' and were not measured again: another engine, version or "
        "way of decoding moves the same weights by up to two points.</p>"
        if published
        else "<p>No published figures.</p>"
    )
    return f'<div class="tight">{table_of(["WER of", *columns, ""], rows)}</div>{note}'


def _cell(numbers: Numbers) -> str:
    bounds = "" if withheld(numbers) else interval(numbers.get("ci95"))
    return f"{_wer(numbers)}<div>{bounds}</div>"


def _long(text: Any) -> str:
    """A cell that may break."""
    return f'<div class="long">{escaped(text)}</div>'


def _comparison(found: Any, sets: Mapping[str, Numbers]) -> str:
    content = _mapping(found)
    pairs = _mappings(content.get("sets"))
    if not pairs:
        return "<p>None was made.</p>"
    first, second = (str(content.get(key, key)) for key in ("first", "second"))
    rows = []
    for name, numbers in pairs.items():
        why, bounds = withheld(sets.get(name, {})), numbers.get("ci95")
        if why:
            numbers, bounds = {}, None
        rows.append(
            [
                escaped(name),
                *(_rate(numbers, f"wer_{which}") for which in ("first", "second")),
                _points(numbers.get("difference")),
                interval(bounds),
                *(numeral(numbers.get(key)) for key in ("p_worse", "mapsswe_z", "mapsswe_p")),
                why or (_verdict(*bounds) if bounds and interval(bounds) else "unknown"),
            ]
        )
    names = ["set", "first", "second", "difference, points", "95 %", "p worse", "MAPSSWE z"]
    names += ["MAPSSWE p", ""]
    note = (
        f"<p>First: {escaped(first)}. Second: {escaped(second)}. WER on the same clips; the "
        "interval is a paired bootstrap's, and p worse the share of its draws in which the first "
        "makes more errors.</p>"
    )
    skipped = _mapping(content.get("skipped"))
    left_out = "<h3>Not compared</h3>" + _reasons(skipped) if skipped else ""
    return f'{note}<div class="tight">{table_of(names, rows)}</div>{left_out}'


def _points(difference: float | None) -> str:
    return "" if difference is None else f"{100 * difference:+.2f}"


def _verdict(low: float, high: float) -> str:
    if low <= 0 <= high:
        return "no difference shown"
    return "the first is better" if high < 0 else "the second is better"


# --- output style ----------------------------------------------------------------------------


def _style(sets: Mapping[str, Numbers], clips: Mapping[str, Sequence[Clip]]) -> str:
    rows = []
    for name, numbers in sets.items():
        why, raw = withheld(numbers), _mapping(numbers.get("raw"))
        changed = sum(clip.styled != clip.row.hypothesis for clip in clips.get(name, ()))
        rows.append(
            [
                escaped(name),
                escaped(numbers.get("style")) or "off",
                _wer(numbers),
                "" if why else _rate(raw, "wer"),
                f"{changed:,}" if name in clips else "",
                "" if why else _rate(numbers, "tolerant_wer"),
                "" if why else interval(numbers.get("tolerant_ci95")),
            ]
        )
    names = ["set", "style", "WER (headline)", "WER of the text as written", "clips changed"]
    names += ["orthography-tolerant WER", "95 %"]
    note = (
        "<p>The output style writes hypotheses as references are written (ASCII gershayim and "
        "geresh, no invisible marks) before they are scored; references are never touched. The "
        "orthography-tolerant WER takes spellings of one word as equal. It is lower by nature, "
        "comparable with nobody's figure, and never the headline.</p>"
    )
    return f'<div class="tight">{table_of(names, rows)}</div>{note}{_style_examples(clips)}'


def _style_examples(clips: Mapping[str, Sequence[Clip]]) -> str:
    changes: Counter[tuple[str, str]] = Counter()
    for clip in (clip for of_set in clips.values() for clip in of_set):
        if clip.styled != clip.row.hypothesis:
            columns = align_words(clip.row.hypothesis, clip.styled)
            changes.update(
                (a or "", b or "") for a, b, operation in columns if operation != "equal"
            )
    most = sorted(changes.items(), key=lambda item: (-item[1], item[0]))[:_MOST_EXAMPLES]
    rows = [
        [*(escaped(_visible(shortened(word))) for word in pair), f"{count:,}"]
        for pair, count in most
    ]
    title = "<h3>What the style changed most often</h3>"
    return title + table_of(["as written", "in the style", "times"], rows) if rows else ""


def _visible(text: str) -> str:
    """Invisible marks by their numbers."""
    return "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) == "Cf" else c for c in text)


# --- the rest --------------------------------------------------------------------------------


def _reasons(reasons: Numbers) -> str:
    rows = [[escaped(name), escaped(reason)] for name, reason in reasons.items()]
    return table_of(["set", "why"], rows) if rows else "<p>None.</p>"


def _overlap(found: Any, sets: Mapping[str, Numbers]) -> str:
    """What `overlap.check_overlap` found in sets: a table of its counts, and examples, folded."""
    content = _mapping(found)
    train, tests = _mapping(content.get("train")), _mappings(content.get("tests"))
    tests = {name: told for name, told in tests.items() if name in sets}
    if not tests:
        return "<p>Not checked.</p>"
    rows, parts = [], []
    for name, told in tests.items():
        counts = {k: v.get("clips") if isinstance(v, Mapping) else v for k, v in told.items()}
        rows.append({"set": name} | {k: v for k, v in counts.items() if k != "name"})
        for kind, value in _mappings(told).items():
            if examples := value.get("examples"):
                title = f"{escaped(name)}, {escaped(kind)}, examples: {len(examples):,}"
                parts.append(folded(title, dict_table(examples)))
    note = (
        f"<p>{len(train.get('overlapping') or ()):,} of {numeral(train.get('clips'))} clips of "
        f"{escaped(train.get('name'))} overlap a set. Overlapping are clips of the same id or "
        "recording, much of the same text, or the same sound; a phrase or a short text that both "
        "have does not count.</p>"
    )
    return note + dict_table(rows) + "".join(parts)


def _facts(results: Numbers, sets: Mapping[str, Numbers]) -> str:
    keys = ["set", "revision", "licence", "draws", "max_clips", "time", "model", "dtype", "device"]
    keys += ["batch", "recognition_s", "compile_s", "normalizer", "style", "key", "versions"]
    of_sets = {
        name: {key: numbers[key] for key in keys if key in numbers}
        for name, numbers in sets.items()
    }
    return facts_table({"model": results.get("model"), "sets": of_sets})


def _mapping(value: Any) -> Numbers:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> dict[str, Numbers]:
    """Of a mapping the entries that are mappings."""
    return {str(k): v for k, v in _mapping(value).items() if isinstance(v, Mapping)}

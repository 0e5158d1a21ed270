"""report.html: what a run folder says, on one page that needs no network and runs no script.

Everything comes from the folder's files as it stands; what is not there yet is left out and said.
All text is escaped: a transcript may hold anything.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hebasr_jax.alignment import alignment, errors_and_words, key_to_signs
from hebasr_jax.charts import Curve, Number, Point, histogram, interval_bar, line_chart
from hebasr_jax.errors import UserError
from hebasr_jax.metrics import align_words, normalize_ivrit
from hebasr_jax.page import (
    dict_table,
    escaped,
    facts_table,
    folded,
    numeral,
    read_json,
    read_rows,
    side_by_side,
    table_of,
    write_page,
)
from hebasr_jax.report_final import final_section
from hebasr_jax.tracking import interval, latest_validations, percent, read_metrics

Line = Mapping[str, Any]


def write_report(run_folder: Path) -> Path:
    """Writes report.html into a run folder, whole or not at all, and returns its path.

    Reads metrics.jsonl (`tracking` says what is in it), config.json {path: {value, origin}},
    env.json, quarantine.jsonl (lines with set, id, reason, detail) and plan.json (tables as lists
    of rows by their names, "duration_histogram" {"edges_s", "counts"}, "left_out" {set: {reason:
    clips}}). Raises `UserError` when there is no such folder or the page cannot be written.
    """
    if not run_folder.is_dir():
        raise UserError(f"There is no run folder {run_folder}.")
    lines = read_metrics(run_folder / "metrics.jsonl")
    train = [line for line in lines if line.get("kind") == "train"]
    skipped = [Point(line["step"], math.nan) for line in lines if line.get("kind") == "skipped"]
    validations = latest_validations(lines)
    quarantine = read_rows(run_folder / "quarantine.jsonl")
    sections = {
        "": _headline(train, validations, len(quarantine)),
        "Learning": _learning(train, skipped, validations),
        "Result": final_section(read_json(run_folder / "final.json")),
        "Dev sets": _dev_sets(validations),
        "Errors": _samples(validations),
        "Speed": _speed(train),
        "Data": _plan(read_json(run_folder / "plan.json")),
        "Bad clips": _quarantine(quarantine),
        "Config": _config(read_json(run_folder / "config.json")),
        "Environment": _environment(read_json(run_folder / "env.json")),
    }
    page = run_folder / "report.html"
    write_page(page, run_folder.resolve().name, sections)
    return page


# --- sections --------------------------------------------------------------------------------


def _headline(train: Sequence[Line], validations: Sequence[Line], bad: int) -> str:
    if not train and not validations:
        return "<p>No step has been logged yet.</p>"
    last = train[-1] if train else validations[-1]
    total = f" of {last['steps']:,}" if "steps" in last else ""
    tiles = [("steps", f"{last['step']:,}{total}", "")]
    for name, rows in _by_set(validations).items():
        step, best = _best(rows)
        bounds = interval(best.get("ci95"))
        tiles.append((f"best WER, {name}", percent(best.get("wer")), f"{bounds} step {step:,}"))
    if train:
        tiles += [
            ("training loss", numeral(_value(last, "loss")), ""),
            ("audio, median", _median(train, "audio_s_per_s", "{:,.4g} s/s".format), ""),
            ("padding of audio, mean", _mean_share(train, "padding_audio"), ""),
            ("waiting for data, mean", _mean_share(train, "data_wait_share"), ""),
            ("skipped steps", numeral(_value(last, "skipped")), "no finite gradient"),
        ]
    tiles.append(("bad clips", f"{bad:,}", ""))
    shown = (
        f'<div class="tile"><div>{escaped(name)}</div><b>{escaped(value)}</b>'
        f"<div>{escaped(note)}</div></div>"
        for name, value, note in tiles
        if value
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _learning(train: Sequence[Line], skipped: Sequence[Point], validations: Sequence[Line]) -> str:
    sets = _by_set(validations)
    told = sorted([*_points(train, "loss"), *skipped], key=lambda point: point.x)
    losses = [Curve("training", told)]
    losses += _curves(sets, "loss")
    groups = dict.fromkeys(group for line in train for group in line.get("rates", {}))
    charts = [
        line_chart("Loss per target token, by step", losses, log=True),
        *(
            line_chart(
                f"{rate.upper()} by step, with 95 % interval",
                _curves(sets, rate, bounds),
                _share,
                log=True,
            )
            for rate, bounds in (("wer", "ci95"), ("cer", "cer_ci95"))
        ),
        line_chart(
            "Learning rate of each group",
            [Curve(name, _points(train, f"rates/{name}"), i) for i, name in enumerate(groups)],
        ),
        line_chart("Gradient norm before clipping", [Curve("norm", _points(train, "grad_norm"))]),
    ]
    return side_by_side(charts)


def _dev_sets(validations: Sequence[Line]) -> str:
    if not validations:
        return "<p>No validation yet.</p>"
    sets = _by_set(validations)
    bounds = [row["ci95"][1] for rows in sets.values() for row in rows if _known(row.get("ci95"))]
    rows = []
    for name, told in sets.items():
        best_step, _ = _best(told)
        chosen = {told[0]["step"]: "first", told[-1]["step"]: "last"}
        chosen[best_step] = " and ".join(filter(None, (chosen.get(best_step), "best")))
        for row in told:
            if row["step"] in chosen:
                rows.append(_dev_row(name, chosen[row["step"]], row, max(bounds, default=1.0)))
    names = ["set", "", "step", "WER", "95 %", "", "CER", "loss", "words"]
    names += ["substituted", "deleted", "inserted", "clips", "empty"]
    note = (
        "<p>Errors over all reference words of a set, both sides normalised as by ivrit.ai. The "
        "interval is a bootstrap by recording where recordings are known. Empty: nothing was "
        "written though something was said.</p>"
    )
    return note + table_of(names, rows)


def _dev_row(name: str, which: str, row: Line, top: float) -> list[str]:
    counts = ("words", "substitutions", "deletions", "insertions", "clips", "empty")
    wer, bounds = row.get("wer"), row.get("ci95")
    bar = ""
    if wer is not None and bounds is not None and _known(bounds) and top > 0:
        bar = interval_bar(wer, bounds, top)
    return [
        escaped(name),
        escaped(which),
        f"{row['step']:,}",
        f"<b>{percent(wer)}</b>",
        interval(bounds) or "unknown",
        bar,
        percent(row.get("cer")),
        numeral(_value(row, "loss")),
        *(numeral(row.get(key)) for key in counts),
    ]


def _samples(validations: Sequence[Line]) -> str:
    """The latest alignments, in the direction of their script."""
    for line in reversed(validations):
        told = {name: numbers.get("samples") for name, numbers in line["sets"].items()}
        if any(told.values()):
            break
    else:
        return "<p>No sample of a transcript yet.</p>"
    parts = [key_to_signs(f"After step {line['step']:,}.")]
    for name, samples in told.items():
        parts.append(f"<h3>{escaped(name)}</h3>" if samples else "")
        parts += [_sample(sample) for sample in samples or ()]
    return "".join(parts)


def _sample(sample: Line) -> str:
    written = (str(sample.get("reference", "")), str(sample.get("hypothesis", "")))
    columns = align_words(*map(normalize_ivrit, written))
    errors, words = errors_and_words(columns)
    told = f"{escaped(sample.get('id', ''))} · errors: {errors}, words: {words}"
    return alignment(told, columns, written)


def _speed(train: Sequence[Line]) -> str:
    def curves(names: Mapping[str, str]) -> list[Curve]:
        return [Curve(name, _points(train, key), i) for i, (key, name) in enumerate(names.items())]

    shares = {
        "padding_audio": "padding, encoder frames",
        "padding_text": "padding, decoder positions",
        "data_wait_share": "waiting for data",
    }
    peaks = [line["memory_bytes"] for line in train if line.get("memory_bytes")]
    peak = f"<p>Peak memory of one device: {max(peaks) / 2**30:,.1f} GiB.</p>" if peaks else ""
    charts = [
        line_chart("Seconds of audio per second", curves({"audio_s_per_s": "audio"})),
        line_chart("Useful TFLOP/s of one device", curves({"tflops": "useful"})),
        line_chart("Shares", curves(shares), _share),
    ]
    return side_by_side(charts) + peak


def _plan(plan: Any) -> str:
    if plan is None:
        return "<p>plan.json is missing or damaged.</p>"
    tables = plan if isinstance(plan, Mapping) else {"rows": plan}
    parts, facts = [], {}
    for name, value in tables.items():
        if name == "duration_histogram":
            shape = value["edges_s"], value["counts"]
            parts.append(side_by_side([histogram("Clips by duration", *shape, "s")]))
        elif name == "left_out":
            parts.append(_left_out(value))
        elif isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            parts.append(f"<h3>{escaped(name)}</h3>" * (name != "rows") + dict_table(value))
        else:
            facts[name] = value
    return (dict_table([facts]) if facts else "") + "".join(parts)


def _left_out(reasons: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        [escaped(name), escaped(reason), f"{count:,}"]
        for name, counts in reasons.items()
        for reason, count in counts.items()
    ]
    return "<h3>left out</h3>" + table_of(["set", "reason", "clips"], rows) if rows else ""


def _quarantine(rows: Sequence[Line]) -> str:
    if not rows:
        return "<p>None.</p>"
    faults = [(str(row.get("set", "")), str(row.get("reason", "unknown"))) for row in rows]
    first = dict(zip(reversed(faults), reversed(rows), strict=True))
    table = []
    for fault, count in Counter(faults).most_common(50):
        example = (str(first[fault][key]) for key in ("id", "detail") if first[fault].get(key))
        cells = (*fault, f"{count:,}", ": ".join(example))
        table.append([escaped(cell) for cell in cells])
    return table_of(["set", "reason", "clips", "example"], table)


def _config(config: Any) -> str:
    if not isinstance(config, Mapping):
        return "<p>config.json is missing or damaged.</p>"
    rows = []
    for path, entry in config.items():
        value, origin = entry.get("value"), str(entry.get("origin", ""))
        mark = "{}" if origin == "default" else "<b>{}</b>"
        rows.append([escaped(path), mark.format(escaped(json.dumps(value))), escaped(origin)])
    return folded(f"{len(rows)} values", table_of(["field", "value", "from"], rows))


def _environment(env: Any) -> str:
    if not isinstance(env, Mapping):
        return "<p>env.json is missing or damaged.</p>"
    return facts_table(env)


# --- numbers out of lines --------------------------------------------------------------------


def _by_set(validations: Sequence[Line]) -> dict[str, list[dict[str, Any]]]:
    """Of each dev set its numbers, one entry for each validation, with the line's step."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for line in validations:
        for name, numbers in line["sets"].items():
            found = line.get("nonfinite", {})
            below = {k.removeprefix(f"sets/{name}/"): v for k, v in found.items()}
            sets.setdefault(name, []).append({**numbers, "step": line["step"], "nonfinite": below})
    return sets


def _best(rows: Sequence[Line]) -> tuple[int, Line]:
    """The first validation with the lowest WER."""
    best = min(rows, key=lambda row: math.inf if row.get("wer") is None else row["wer"])
    return best["step"], best


def _value(line: Line, path: str) -> float | None:
    """The number at a path such as `rates/decoder`: NaN where it was not finite, None if absent."""
    if path in line.get("nonfinite", {}):
        return math.nan
    value: Any = line
    for part in path.split("/", 1):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if value is None else float(value)


def _share(share: Number) -> str:
    return f"{100 * share:.3g} %"


def _points(lines: Sequence[Line], path: str, bounds: str = "") -> list[Point]:
    points = []
    for line in lines:
        low, high = line[bounds] if bounds and _known(line.get(bounds)) else (None, None)
        if (value := _value(line, path)) is not None:
            points.append(Point(line["step"], value, low, high))
    return points


def _curves(sets: Mapping[str, Sequence[Line]], key: str, bounds: str = "") -> list[Curve]:
    """One curve for each dev set; style 0 is the training's."""
    return [Curve(n, _points(rows, key, bounds), i) for i, (n, rows) in enumerate(sets.items(), 1)]


def _known(bounds: Sequence[Number | None] | None) -> bool:
    return bounds is not None and None not in bounds


def _median(lines: Sequence[Line], key: str, write: Callable[[float], str]) -> str:
    values = [line[key] for line in lines if line.get(key) is not None]
    return write(statistics.median(values)) if values else ""


def _mean_share(lines: Sequence[Line], key: str) -> str:
    values = [line[key] for line in lines if line.get(key) is not None]
    return percent(statistics.fmean(values)) if values else ""

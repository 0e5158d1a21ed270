"""The model card of an exported model, filled from the files of its run and nothing else."""

import html
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hebasr_jax.card_text import (
    HEBASR,
    LIMITS,
    NOT_FOR,
    ORIGINAL,
    SCORING,
    TRANSFORMERS,
    clean,
    known,
    last_part,
    number,
    shown,
    table_of,
)
from hebasr_jax.charts import Curve, Point, line_charts_file
from hebasr_jax.errors import UserError
from hebasr_jax.hub import is_hub_id
from hebasr_jax.tracking import interval, latest_validations, percent, read_metrics

Facts = Mapping[str, Any]
CURVE = "training_curve.svg"
_SAMPLES = 3  # of each set
_OF_THE_MACHINE = re.compile(r"name|runs_dir|compute\.cache_dir|data\.threads")
_RELEASED = re.compile(r"Qwen/Qwen3-ASR-[\w.]+")  # Apache-2.0
_LAYOUTS = {"transformers": TRANSFORMERS, "original": ORIGINAL}
_SCORES = ("words", "substitutions", "deletions", "insertions", "clips", "empty", "left_out")


def write_card(folder: Path, run: Path, facts: Facts) -> None:
    """Writes README.md and training_curve.svg into an exported model folder, whole or not at all.

    What is not known is left out or said to be unknown. Paths are cut to their last part, and no
    host, user or environment variable is told.

    Args:
      run: the run folder: config.json, env.json, plan.json, metrics.jsonl, quarantine.jsonl.
      facts: JSON of the final phase, each part optional: step, chosen, members {name: weight},
        candidates [{name, loss, wer}], scores {"dev" and "test": {set: scores}}, layout,
        base_model, base_revision, licence (of the weights), repo (hub id that the card will be
        at), data {set: {path, hub, revision, licence, hours, clips, synthetic,
        labels}}. Scores: as `validate`'s.

    Raises:
      UserError: there is no such folder, or it cannot be written to.
    """
    lines = read_metrics(run / "metrics.jsonl")
    config, env, plan = (_read_json(run / f"{name}.json") for name in ("config", "env", "plan"))
    name = str(facts.get("repo") or "").split("/")[-1] or run.resolve().name
    curve = line_charts_file(_charts(lines))
    sections = {
        f"# {shown(name)}": _introduction(facts),
        "## Results": _results(facts),
        "## How it was scored": SCORING,
        "## How to use": _usage(facts),
        "## What it must not be used for": NOT_FOR,
        "## Limits": _limits(facts, config),
        "## Data": _data(facts, plan, _count_lines(run / "quarantine.jsonl")),
        "## Training": _training(facts, config, lines, bool(curve)),
        "## Environment": _environment(env),
        "## Samples": _samples(facts),
    }
    text = _front_matter(name, facts) + "".join(
        f"\n{heading}\n\n{content.strip()}\n" for heading, content in sections.items() if content
    )
    _write(folder / "README.md", text)
    if curve:
        _write(folder / CURVE, curve)


# --- front matter ----------------------------------------------------------------------------


def _front_matter(name: str, facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    results = list(_eval_results(facts))
    base = _base_id(facts)
    released = "apache-2.0" if _RELEASED.fullmatch(base or "") else "unknown"
    data = ModelCardData(
        language="he",
        license=clean(facts.get("licence") or released),
        base_model=base,
        library_name="transformers" if facts.get("layout") == "transformers" else None,
        pipeline_tag="automatic-speech-recognition",
        tags=["automatic-speech-recognition", "hebrew", "qwen3-asr", "hebasr-jax"],
        datasets=sorted({hub for row in _sets(facts).values() if (hub := _dataset_id(row))})
        or None,
        metrics=["wer", "cer"],
        model_name=clean(name) if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _eval_results(facts: Facts) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for part, split in (("test", "test"), ("dev", "validation")):
        for name, scores in _part(facts, part).items():
            hub = _dataset_id(_sets(facts).get(name, {}))
            for metric in ("wer", "cer"):
                if known(rate := scores.get(metric)):
                    yield EvalResult(
                        task_type="automatic-speech-recognition",
                        dataset_type=hub or clean(name),
                        dataset_name=clean(name),
                        dataset_config=clean(name) if hub else None,
                        dataset_split=split,
                        metric_type=metric,
                        metric_name=f"{metric.upper()}, per cent, normalize_ivrit",
                        metric_value=round(100 * rate, 2),
                    )


def _base_id(facts: Facts) -> str | None:
    """The hub id that training began with; a path of two parts looks like one."""
    base = str(facts.get("base_model") or "")
    local = not facts.get("base_revision") and Path(base).exists()
    return base if is_hub_id(base) and not local else None


def _dataset_id(row: Facts) -> str | None:
    hub = str(row.get("hub") or "")
    return hub if is_hub_id(hub) else None


# --- sections --------------------------------------------------------------------------------


def _introduction(facts: Facts) -> str:
    base = facts.get("base_model")
    known = _base_id(facts)
    began = f"[{known}](https://huggingface.co/{known})" if known else _place(base)
    revision = f" at revision {shown(facts['base_revision'])}" if facts.get("base_revision") else ""
    rows = [
        ("language", "Hebrew"),
        ("training began with", (began + revision) if base else "unknown"),
        ("weights", shown(facts.get("chosen") or "unknown")),
        ("trained steps", number(facts.get("step"))),
        ("layout", shown(facts.get("layout") or "unknown")),
    ]
    head = "A speech recogniser for Hebrew: Qwen3-ASR, fine-tuned with hebasr_jax."
    return f"{head}\n\n{table_of(('', ''), rows)}"


def _results(facts: Facts) -> str:
    tables = []
    for part in ("test", "dev"):
        if scores := _part(facts, part):
            names = ["set", "WER", "95 %", "CER", "95 %", "loss"]
            names += [key.replace("_", " ") for key in _SCORES]
            rows = [
                (
                    shown(name),
                    f"**{_rate(row.get('wer'))}**",
                    interval(row.get("ci95")) or "unknown",
                    _rate(row.get("cer")),
                    interval(row.get("cer_ci95")) or "unknown",
                    number(row.get("loss")),
                    *(number(row.get(key)) for key in _SCORES),
                )
                for name, row in scores.items()
            ]
            title = "Test sets" if part == "test" else "Dev sets, which training looked at"
            tables.append(f"{title}:\n\n{table_of(names, rows)}")
    return "\n".join(tables) or "**Warning:** this model was not scored, or its scores are unknown."


def _usage(facts: Facts) -> str:
    model = str(facts.get("repo") or "FOLDER")
    texts = [_LAYOUTS.get(str(facts.get("layout")), ""), HEBASR]
    return "\n".join(text.format(model=model) for text in texts if text)


def _limits(facts: Facts, config: Facts) -> str:
    share, longest = (_value(config, path) for path in ("text.stamp_share", "data.max_clip_s"))
    stamps = "Time stamps: whether they were trained is unknown."
    if share is not None:
        stamps = (
            f"Time stamps were trained on a share of {number(share)} of the clips that have them; "
            "their accuracy was not scored."
            if share and facts.get("stamped_clips") != 0
            else "No time stamps: they were not trained."
        )
    length = "The longest clip in training is unknown"
    if longest is not None:
        length = f"Training had clips of at most {number(longest)} s"
    length += "; longer recordings have to be cut, and were scored only where a set above has them."
    return LIMITS.format(stamps=stamps, length=length)


def _data(facts: Facts, plan: Facts, bad: int) -> str:
    planned = _planned(plan)
    sets, rows, warnings = _sets(facts), [], []
    for name in dict.fromkeys([*sets, *planned]):
        row, draws = sets.get(name, {}), planned.get(name, {})
        clips = row.get("clips") if row.get("clips") is not None else draws.get("clips")
        cells = [_place(row.get("path"), _dataset_id(row))]
        cells += [shown(row.get(key) or "unknown") for key in ("revision", "licence")]
        cells += [number(value) for value in (row.get("hours"), clips)]
        rows.append((shown(name), *cells, draws.get("uses") or "unknown"))
        if row.get("synthetic"):
            made = f"{number(row['synthetic'])} of the {number(clips)} clips of {shown(name)}"
            warnings.append(f"- **Warning:** {made} are synthetic speech, which no person spoke.")
        if row.get("labels"):
            warnings.append(f"- **Warning:** texts of {shown(name)} are by {shown(row['labels'])}.")
        missing = [key for key in ("licence", "revision") if not row.get(key)]
        if missing:
            kinds = " and ".join(missing)
            warnings.append(f"- **Warning:** the {kinds} of {shown(name)} is not known.")
    if not rows:
        warnings.append("- **Warning:** what data it was trained on is not known.")
    names = ("set", "from", "revision", "licence", "hours", "clips", "uses in an epoch")
    parts = [table_of(names, rows) if rows else "", "\n".join(warnings)]
    if bad or plan:
        parts.append(f"Clips that were not used because they are bad: {bad:,}.")
    return "\n\n".join(part for part in parts if part)


def _planned(plan: Facts) -> dict[str, dict[str, Any]]:
    """Of each set its clips, and how often a clip is used in an epoch, stage by stage."""
    found: dict[str, dict[str, Any]] = {}
    for table, rows in plan.items():
        if not table.startswith("sets") or not isinstance(rows, Sequence):
            continue
        stage = table.removeprefix("sets of stage ") if " of stage " in table else ""
        for row in (row for row in rows if isinstance(row, Mapping)):
            known = found.setdefault(str(row.get("name")), {"uses": ""})
            uses = number(row.get("effective_epochs")) + (f" ({shown(stage)})" if stage else "")
            known["uses"] = ", ".join(filter(None, (known["uses"], uses)))
            known["clips"] = row.get("clips")
    return found


def _training(facts: Facts, config: Facts, lines: Sequence[Facts], curve: bool) -> str:
    parts = [f"![Loss and WER by step]({CURVE})"] if curve else []
    candidates = facts.get("candidates") or ()
    if candidates:
        ranking = [
            (shown(row.get("name")), number(row.get("loss")), _rate(row.get("wer")))
            for row in candidates
        ]
        table = table_of(("weights", "dev loss", "dev WER"), ranking)
        parts.append(f"Chosen: {shown(facts.get('chosen') or 'unknown')}, among\n\n{table}")
    if members := facts.get("members"):
        rows = [(shown(name), number(weight)) for name, weight in members.items()]
        parts.append(table_of(("member", "weight"), rows))
    if train := [line for line in lines if line.get("kind") == "train"]:
        skipped = train[-1].get("skipped")
        parts.append(
            f"Last logged step: {number(train[-1]['step'])}, training loss "
            f"{number(train[-1].get('loss'))}, steps skipped for want of a finite gradient: "
            f"{number(skipped)}."
        )
    base = _base_id(facts)
    settings = [
        (shown(path), _setting(entry.get("value"), base), _origin(entry.get("origin")))
        for path, entry in config.items()
        if isinstance(entry, Mapping) and entry.get("origin") != "default"
        if not _OF_THE_MACHINE.fullmatch(path)
    ]
    told = "Settings that are not the default:\n\n"
    parts.append(
        told + table_of(("setting", "value", "from"), settings)
        if settings
        else "Settings: all are the default." * bool(config) or "Settings: unknown."
    )
    return "\n\n".join(parts)


def _environment(env: Facts) -> str:
    starts = env.get("starts") or ()
    if not starts:
        return "Unknown."
    last = starts[-1]
    rows = [(key, shown(last[key])) for key in ("commit", "devices", "processes", "backend",
            "driver", "python") if last.get(key) is not None]  # fmt: skip
    packages = (last.get("packages") or {}).items()
    rows += [(shown(name), shown(version)) for name, version in packages if version]
    return f"Of the last start.\n\n{table_of(('', ''), rows)}"


def _samples(facts: Facts) -> str:
    blocks = []
    for part in ("test", "dev"):
        for name, scores in _part(facts, part).items():
            rows = [
                f'<div dir="auto">{html.escape(clean(sample.get("id", "")))}</div>\n'
                f'<div dir="rtl">{html.escape(clean(sample.get("reference", "")))}</div>\n'
                f'<div dir="rtl">{html.escape(clean(sample.get("hypothesis", "")))}</div><hr>'
                for sample in (scores.get("samples") or ())[:_SAMPLES]
            ]
            if rows:
                blocks.append(f"{part}, {shown(name)}:\n\n" + "\n".join(rows))
    head = "Of each clip its id, the reference, and what the model wrote, as they are.\n\n"
    return head + "\n\n".join(blocks) if blocks else ""


# --- numbers out of lines --------------------------------------------------------------------


def _charts(lines: Sequence[Facts]) -> list[tuple[str, list[Curve], Any]]:
    """Loss of training and of each dev set, and the WER of each dev set, by step."""
    train = [line for line in lines if line.get("kind") == "train"]
    sets: dict[str, list[Facts]] = {}
    for line in latest_validations(lines):
        for name, scores in (line.get("sets") or {}).items():
            sets.setdefault(name, []).append({**scores, "step": line["step"]})
    named = list(enumerate(sets.items(), 1))
    losses = [Curve("training", _points(train, "loss"))]
    losses += [Curve(clean(name), _points(rows, "loss"), i) for i, (name, rows) in named]
    wers = [Curve(clean(name), _points(rows, "wer", "ci95"), i) for i, (name, rows) in named]
    return [
        ("Loss per target token, by step", losses, "{:,g}".format),
        ("WER of the dev sets by step, with 95 % interval", wers, lambda x: f"{100 * x:.3g} %"),
    ]


def _points(rows: Sequence[Facts], key: str, bounds: str = "") -> list[Point]:
    """A number that the log has as null was not finite."""
    points = []
    for row in rows:
        if key in row:
            low, high = row.get(bounds) or (None, None)
            whole = known(low) and known(high)
            value = row[key] if known(row[key]) else math.nan
            points.append(Point(row["step"], value, *((low, high) if whole else (None, None))))
    return points


def _part(facts: Facts, part: str) -> dict[str, Facts]:
    scores = (facts.get("scores") or {}).get(part) or {}
    return {str(name): row or {} for name, row in scores.items()}


def _sets(facts: Facts) -> dict[str, Facts]:
    return {str(name): row or {} for name, row in (facts.get("data") or {}).items()}


def _rate(share: Any) -> str:
    return percent(share) if known(share) else "unknown"


def _value(config: Facts, path: str) -> Any:
    return (config.get(path) or {}).get("value")


def _place(path: Any, hub: str | None = None) -> str:
    """A hub id as it is; of any other path or address the last part alone."""
    if hub:
        return f"[{hub}](https://huggingface.co/datasets/{hub})"
    return shown(last_part(str(path))) if path else "unknown"


def _setting(value: Any, base: str | None) -> str:
    if not isinstance(value, str):
        return shown(json.dumps(value, ensure_ascii=False))
    return shown(value if value == base else last_part(value))


def _origin(origin: Any) -> str:
    return shown(last_part(str(origin or "unknown")))


# --- files -----------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing when it is not there or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}-{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written", error.strerror or str(error)) from None

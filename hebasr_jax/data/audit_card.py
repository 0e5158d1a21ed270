"""An audit written down: removed.jsonl, audit.json and card.html, the same bytes each time."""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.charts import histogram
from hebasr_jax.data.audit import Audit
from hebasr_jax.data.normalize import HEBREW_V1
from hebasr_jax.data.shards import REMOVED_FILE, SET_FILE, read_origin
from hebasr_jax.errors import UserError
from hebasr_jax.metrics import NORMALIZER
from hebasr_jax.page import direction_of, escaped, facts_table, side_by_side, table_of, write_page
from hebasr_jax.run_config import Source
from hebasr_jax.run_folder import write_json, write_text

_BINS = 30
_WORST = 30
_NO_FACTS = ("histograms", HEBREW_V1)
_LONGEST_SHOWN = 300  # characters of a text in the table
_COMMIT = re.compile(r"snapshots/([0-9a-f]{40})(?:/|$)")  # where the hub's cache keeps a revision
_BY_RATE = "judged by characters a second alone, which cannot see a wrong text of the right length"


def write_audit(audit: Audit, source: Source, out: Path, change: dict[str, Any]) -> None:
    """Writes the three files to `out`, each whole or not at all. Raises UserError.

    Args:
      change: what `normalize.effect` gives for the texts as they came.
    """
    refuse_set(out)
    result = summary(audit, source) | {HEBREW_V1: change}
    rows = removed(audit)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(out / REMOVED_FILE, "".join(lines))
    write_json(out / "audit.json", result)
    write_page(out / "card.html", f"Data card: {source.name}", _sections(audit, result))


def refuse_set(out: Path) -> None:
    """Raises UserError for a prepared set's own folder, whose list would be replaced."""
    if (out / SET_FILE).exists():
        what = f"{out}: is a prepared set, which has a {REMOVED_FILE} of its own"
        raise UserError(what, do="Give another --out.")


def removed(audit: Audit) -> list[dict[str, str]]:
    """All that is to be left out, with reason and detail: rows that are no clip by `row`, where
    they stand, then clips by `id`."""
    rows = [
        {"row": where, "reason": fault.reason, "detail": fault.detail}
        for where, fault in audit.clip_set.bad
    ]
    for clip, finding in zip(audit.clip_set.clips, audit.findings_N, strict=True):
        if finding:
            rows.append({"id": clip.id, "reason": finding.reason, "detail": finding.detail})
    return rows


def summary(audit: Audit, source: Source) -> dict[str, Any]:
    """What audit.json holds: facts, limits, verdict, hours, clips by reason, histograms."""
    clips, measures = audit.clip_set.clips, audit.measures_N
    kept = [m.duration_s for m, f in zip(measures, audit.findings_N, strict=True) if not f]
    lost: dict[str, list[float]] = {}
    for _, fault in audit.clip_set.bad:
        lost.setdefault(fault.reason, []).append(0.0)
    for clip, m, finding in zip(clips, measures, audit.findings_N, strict=True):
        if finding:  # of a clip that cannot be decoded only the stated length is known
            lost.setdefault(finding.reason, []).append(m.duration_s or clip.duration_s)
    origin = read_origin(Path(source.path).expanduser())
    cached = _COMMIT.search(source.path)
    sound = [m for m in measures if not m.fault]
    verdict = audit.verdict
    return {
        "format": 1,
        "set": source.name,
        "hub": source.hub or origin.get("hub"),
        "revision": cached[1] if cached else origin.get("revision"),
        "licence": source.licence or origin.get("licence"),
        "fingerprint": audit.clip_set.fingerprint,
        "normalizer": NORMALIZER,
        "rows": len(clips) + len(audit.clip_set.bad) + len(audit.clip_set.removed),
        "left_out_before": dict(sorted(Counter(r for _, r in audit.clip_set.removed).items())),
        "speakers": len({clip.speaker for clip in clips} - {""}) or None,
        "recordings": len({clip.recording for clip in clips} - {""}) or None,
        "clips_without_text": sum(not clip.text.strip() for clip in clips),
        "text_of_other_speakers": audit.other_speakers,
        "kept": {"clips": len(kept), "hours": _hours(kept)},
        "removed": {
            reason: {"clips": len(lengths), "hours": _hours(lengths)}
            for reason, lengths in sorted(lost.items(), key=lambda item: (-len(item[1]), item[0]))
        },
        "limits": asdict(audit.limits),
        "characters_a_second_bounds": [round(bound, 3) for bound in audit.rate_bounds],
        "alignment": verdict._asdict() | {"note": _by_rate(audit)},
        "histograms": {
            "duration_s": _counted(m.duration_s for m in sound),
            "characters_a_second": _counted(m.rate for m in sound),
            "words_a_second": _counted(m.words_rate for m in sound),
            "quality": _counted(clip.quality for clip in clips),
            "silence_share": _counted((m.silence for m in sound), 1.0),
            "clipping_share": _counted(m.clipping for m in sound),
            "hebrew_share": _counted((m.hebrew for m in sound), 1.0),
            "cer": _counted((m.cer for m in sound), 1.0),
        },
    }


def told(audit: Audit) -> list[str]:
    """The verdict for the terminal; three lines where it is to stop."""
    verdict, name = audit.verdict, audit.clip_set.name
    low, high = verdict.interval
    line = (
        f"{name}: {verdict.decision}: {verdict.low:,} of {verdict.clips:,} sampled texts do not "
        f"fit their sound ({verdict.share:.1%}, 95 % interval {low:.1%} to {high:.1%})"
    )
    how = _by_rate(audit) or "by agreement with the second transcript"
    if verdict.decision != "stop":
        return [f"{line}, {how}"]
    return [line, f"{how}; above 15 % is stop", "look at the worst rows in card.html"]


def told_change(name: str, change: dict[str, Any]) -> list[str]:
    """What the training normaliser does to the set, with three examples."""
    lines = [
        f"{name}: {HEBREW_V1} changes {change['changed']:,} of {change['texts']:,} texts, "
        f"and leaves nothing of {change['emptied']:,}"
    ]
    for row in change["examples"][:3]:
        lines.append(f"  {_cut(row['before'], 80)!r} becomes {_cut(row['after'], 80)!r}")
    return lines


def _by_rate(audit: Audit) -> str:
    """What a verdict by rate alone is worth, and why there is no better one; "" for another."""
    if audit.verdict.by == "agreement":
        return ""
    if not audit.second:
        return _BY_RATE
    texts = [m for m in audit.measures_N if m.rate]
    known = sum(m.cer is not None for m in texts)
    return f"{_BY_RATE} (the second transcript has only {known:,} of {len(texts):,} texts)"


def _hours(lengths_s: Iterable[float]) -> float:
    return round(sum(lengths_s) / 3600, 4)


def _counted(values: Iterable[float | None], high: float | None = None) -> dict[str, Any] | None:
    """Edges and counts; the last bar holds all above the 99.5th percentile unless `high` is set."""
    known = np.array([value for value in values if value is not None], float)
    if not len(known):
        return None
    low = min(0.0, float(known.min()))
    top = high if high is not None else float(np.quantile(known, 0.995))
    top = top if top > low else low + 1.0
    edges = np.linspace(low, top, _BINS + 1)
    counts, _ = np.histogram(np.clip(known, low, top), edges)
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts": counts.tolist(),
        "median": float(f"{np.median(known):.6g}"),
        "largest": float(f"{known.max():.6g}"),
    }


def _sections(audit: Audit, result: dict[str, Any]) -> dict[str, str]:
    facts = {
        key: "not known" if result[key] is None else result[key]
        for key in ("licence", "hub", "revision", "speakers", "recordings", "rows")
    }
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in told(audit))
    plots = {
        "Length of clips": ("duration_s", "s"),
        "Characters a second": ("characters_a_second", ""),
        "Quality score": ("quality", ""),
        "Share of silence": ("silence_share", ""),
        "CER against the second transcript": ("cer", ""),
    }
    charts = [
        histogram(title, found["edges"], found["counts"], unit)
        for title, (key, unit) in plots.items()
        if (found := result["histograms"][key])
    ]
    return {
        "": table_of(
            ["fact", "value"], [[escaped(key), escaped(value)] for key, value in facts.items()]
        ),
        "Do the texts fit the sound?": lines,
        "Kept and removed": _hours_table(result),
        "Distributions": side_by_side(charts),
        f"What {HEBREW_V1} changes": _change_table(audit.clip_set.name, result[HEBREW_V1]),
        "Worst rows": _worst_table(audit),
        "All figures": facts_table({k: v for k, v in result.items() if k not in _NO_FACTS}),
    }


def _hours_table(result: dict[str, Any]) -> str:
    rows = [["kept", result["kept"]], *result["removed"].items()]
    return table_of(
        ["clips that are", "number", "hours"],
        [[escaped(name), f"{row['clips']:,}", f"{row['hours']:,.2f}"] for name, row in rows],
    )


def _change_table(name: str, change: dict[str, Any]) -> str:
    rows = [[escaped(r["id"]), _shown(r["before"]), _shown(r["after"])] for r in change["examples"]]
    line = f"<p>{html.escape(told_change(name, change)[0])}</p>"
    return line + (table_of(["id", "as it came", "for training"], rows) if rows else "")


def _worst_table(audit: Audit) -> str:
    """Clips whose text and sound are furthest apart; by CER where it is known, then by rate."""
    rows: list[Sequence[str]] = []
    for i in _worst(audit):
        clip, m, finding = audit.clip_set.clips[i], audit.measures_N[i], audit.findings_N[i]
        rows.append(
            [
                escaped(clip.id),
                escaped(finding.reason if finding else "kept"),
                "" if m.cer is None else f"{m.cer:.2f}",
                "" if m.rate is None else f"{m.rate:.1f}",
                f"{m.duration_s or clip.duration_s:.1f}",
                _shown(clip.text),
                _shown(audit.second.get(clip.id, "")),
            ]
        )
    names = ["id", "verdict", "CER", "characters/s", "s", "text", "second transcript"]
    return table_of(names, rows)


def _worst(audit: Audit) -> list[int]:
    middle = math.log(audit.rate_bounds[0] * audit.rate_bounds[1]) / 2

    def badness(i: int) -> tuple[float, float, int]:
        m = audit.measures_N[i]
        off = abs(math.log(m.rate) - middle) if m.rate else 0.0
        return -(m.cer or 0.0), -off, i

    return sorted(range(len(audit.measures_N)), key=badness)[:_WORST]


def _shown(text: str) -> str:
    cut = escaped(_cut(text, _LONGEST_SHOWN))
    return f'<div dir="{direction_of(text)}" lang="he">{cut}</div>'


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "…"

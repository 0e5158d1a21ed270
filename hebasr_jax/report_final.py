"""The part of report.html about what a run ended with: final.json as tables."""

from collections.abc import Mapping
from typing import Any

from hebasr_jax.page import escaped, numeral, table_of
from hebasr_jax.tracking import interval, percent


def final_section(final: Any) -> str:
    """The weights that were compared and chosen, and the scores of the chosen on each test set."""
    if not isinstance(final, Mapping):
        return "<p>The run has not ended, or it was not asked to choose, score or export.</p>"
    chosen = str(final.get("chosen", ""))
    rows = [
        [
            f"<b>{escaped(row['name'])}</b>" if row["name"] == chosen else escaped(row["name"]),
            percent(row.get("wer")),
            numeral(row.get("loss")),
        ]
        for row in final.get("candidates", ())
    ]
    names = ["weights", "WER, mean of the dev sets", "loss"]
    parts = [
        "<p>Chosen on the whole dev sets, so that their figures are too good.</p>",
        table_of(names, rows),
    ]
    tests = (final.get("scores") or {}).get("test") or {}
    if tests:
        parts += ["<h3>test sets, with the chosen weights</h3>", _scores(tests)]
    if exports := final.get("exports"):
        folders = ", ".join(f"export/{layout}" for layout in exports)
        parts.append(f"<p>Exported to {escaped(folders)}.</p>")
    if upload := final.get("upload"):
        parts.append(f"<p>Uploaded: {escaped(upload.get('commit', ''))}</p>")
    return "".join(parts)


def _scores(sets: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            escaped(name),
            f"<b>{percent(row.get('wer'))}</b>",
            interval(row.get("ci95")) or "unknown",
            percent(row.get("cer")),
            *(numeral(row.get(key)) for key in ("words", "clips", "empty")),
        ]
        for name, row in sets.items()
    ]
    return table_of(["set", "WER", "95 %", "CER", "words", "clips", "empty"], rows)

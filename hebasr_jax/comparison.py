"""Two evaluated folders, set by set: is one system better, or was it chance?"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hebasr_jax.average import finite, in_percent
from hebasr_jax.errors import UserError
from hebasr_jax.hypotheses import Hypothesis, read_hypotheses
from hebasr_jax.output_style import to_reference_style
from hebasr_jax.run_folder import read_json
from hebasr_jax.significance import compare


def compare_folders(
    first: Path, second: Path, *, style: bool, resamples: int, seed: int
) -> dict[str, Any]:
    """Paired tests on the sets that both folders have, as compare.json holds them.

    Negative differences are in favour of the first. A set whose clips or references are not the
    same on both sides, or whose rate is withheld, is not compared, and told under `skipped`.
    Raises `UserError` for a folder without results and where nothing can be compared.
    """
    folders = (first, second)
    results = [read_json(folder / "results.json") for folder in folders]
    for folder, content in zip(folders, results, strict=True):
        if not content.get("sets"):
            raise UserError(f"{folder}: holds no results", do="Evaluate a model with --out first.")
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in [name for name in results[0]["sets"] if name in results[1]["sets"]]:
        ours, theirs = (read_hypotheses(f / name / "hypotheses.jsonl") for f in folders)
        held = [why for side in results if (why := side["sets"][name].get("withheld"))]
        if reason := "; ".join(held) or _unlike(ours, theirs):
            skipped[name] = reason
            continue
        tested = compare(
            [row.reference for row in ours],
            _texts(ours, style),
            _texts(theirs, style),
            [row.group for row in ours],
            resamples=resamples,
            seed=seed,
        )
        found[name] = {"clips": len(ours), **finite(tested)}
    if not found:
        why = "; ".join(f"{n}: {why}" for n, why in skipped.items()) or "They share no set."
        raise UserError(f"{first} and {second}: nothing can be compared", why)
    names = [f"{c['model'].get('name')} in {f}" for c, f in zip(results, folders, strict=True)]
    sides = dict(zip(("first", "second"), names, strict=True))
    return {"format": 1, **sides, "style": style, "sets": found, "skipped": skipped}


def _unlike(ours: list[Hypothesis], theirs: list[Hypothesis]) -> str:
    """Why two lists of rows are not of the same clips; empty if they are, in the same order."""
    if [row.id for row in ours] != [row.id for row in theirs]:
        only = {row.id for row in ours} ^ {row.id for row in theirs}
        return f"not the same clips ({len(only)} on one side only)"
    differ = sum(a.reference != b.reference for a, b in zip(ours, theirs, strict=True))
    return f"{differ} references are not the same" if differ else ""


def _texts(rows: list[Hypothesis], style: bool) -> list[str]:
    return [to_reference_style(row.hypothesis) if style else row.hypothesis for row in rows]


def show(content: Mapping[str, Any]) -> None:
    """Prints the table to stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for name in ("set", "clips", "first", "second", "difference", "p worse", "MAPSSWE p"):
        table.add_column(name, justify="left" if name == "set" else "right", no_wrap=True)
    for name, row in content["sets"].items():
        table.add_row(
            name,
            f"{row['clips']:,}",
            in_percent(row["wer_first"]),
            in_percent(row["wer_second"]),
            in_percent(row["difference"], row["ci95"]),
            *("?" if row[p] is None else f"{row[p]:.3f}" for p in ("p_worse", "mapsswe_p")),
        )
    console = Console(width=None if terminal else 10_000, markup=False, highlight=False)
    for side in ("first", "second"):
        console.print(f"{side}: {content[side]}")
    console.print("WER, its difference (first - second) with a paired 95 % interval, and p values")
    console.print(table)
    for name, why in content["skipped"].items():
        console.print(f"{name}: not compared: {why}")

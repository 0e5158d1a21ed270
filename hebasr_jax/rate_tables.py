"""Learning rates as rows and lines to show: what was asked for, and what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from hebasr_jax.optim import RateRow
from hebasr_jax.stages import Part

Row = dict[str, Any]
Measured = Mapping[str, float]


def rate_rows(rates: Sequence[RateRow], measured: Measured) -> list[Row]:
    """The groups of `optim.rate_table`; `measured` is `stages.checked_rates`."""
    return [
        {
            "group": row.group,
            "tensors": row.tensors,
            "parameters": row.parameters,
            "trained": row.trained_parameters,
            "peak rate": f"{row.peak_rate:.3g}" if row.trained_parameters else "frozen",
        }
        | ({"measured": f"{measured.get(row.group, 0):.3g}"} if measured else {})
        for row in rates
    ]


def layer_rows(rates: Sequence[RateRow]) -> list[Row]:
    """Peak rate of each layer of each stack; neighbours of one rate share a row."""
    rows: list[Row] = []
    for group in rates:
        for layer, rate in enumerate(group.layer_rates):
            told = f"{rate:.3g}" if rate else "frozen"
            last = rows[-1] if rows and layer else {}
            if last.get("peak rate") == told:
                last["layers"] = f"{last['layers'].split('-')[0]}-{layer}"
            else:
                rows.append({"stack": group.group, "layers": str(layer), "peak rate": told})
    return rows


def stage_lines(part: Part, rates: Sequence[RateRow], measured: Measured) -> list[str]:
    """What a run says when it enters a stage: its steps and sets, and a line for each group."""
    sets = ", ".join(info.name for info in part.feed.table.sets)
    lines = [f"stage {part.stage.name}: steps {part.first + 1:,} to {part.last:,}, on {sets}"]
    for row in rates:
        layers = [r for r in layer_rows([row]) if len(row.layer_rates) > 1]
        split_up = len({r["peak rate"] for r in layers}) > 1
        where = ", ".join(f"{_layers(r)} {r['peak rate']}" for r in layers) * split_up
        rate = f"{row.peak_rate:.3g}" if row.trained_parameters else "frozen"
        found = f", measured {measured[row.group]:.3g}" if row.group in measured else ""
        count = f"{row.trained_parameters:,} of {row.parameters:,} parameters"
        lines.append(f"  {row.group}: {where or rate}{found}; {count}")
    if part.optim.warmup_steps >= part.last - part.first:
        lines.append(
            f"warning: the warm-up of {part.optim.warmup_steps} updates is not over when this "
            "stage ends: nothing new in it gets its full rate; see optim.warmup_steps"
        )
    return lines


def _layers(row: Row) -> str:
    return f"layers {row['layers']}" if "-" in row["layers"] else f"layer {row['layers']}"

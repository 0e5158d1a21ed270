"""What `--dry-run` shows: the config with its origins, rates, plan, memory and expected time.

Tables are lists of rows, each a dict from column to value; `show` prints them, fitted to a
terminal and in full elsewhere.
"""

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from hebasr_jax.config_file import DEFAULT, LoadedConfig, flatten
from hebasr_jax.data.plan import plan_table
from hebasr_jax.errors import UserError
from hebasr_jax.model.asr import abstract_params
from hebasr_jax.optim import RateRow, rate_table
from hebasr_jax.run_setup import Setup, compile_steps, set_up, state_shapes, step_for
from hebasr_jax.step_memory import Memory, Shape, compiled_bytes, memory_estimate

Row = dict[str, Any]

_GIB = 2**30


def dry_run(loaded: LoadedConfig) -> None:
    """Prints all that a run would do and need, and trains nothing.

    The data is opened and planned as a run would; what it finds goes to a temporary folder. Where
    a GPU is at hand every bucket is compiled, and the estimate's error is shown.
    """
    config = loaded.config
    with tempfile.TemporaryDirectory(prefix="hebasr-dry-run-") as folder:
        setup = set_up(config, Path(folder) / "model", Path(folder) / "quarantine.jsonl")
        show("Config (* is not the default)", config_rows(loaded))
        rates = rate_table(abstract_params(setup.model), config.optim)
        show("Learning rates", rate_rows(rates))
        show("Learning rates by layer", layer_rows(rates))
        plan = plan_table(setup.feed.table, setup.feed.plan(0), config.data)
        show("Plan of the first epoch, by bucket; the last row sums up", plan["buckets"])
        show("Plan of the first epoch, by set", plan["sets"])
        left_out = [
            {"set": name, "reason": reason, "clips left out": count}
            for name, reasons in setup.feed.left_out.items()
            for reason, count in reasons.items()
        ]
        if left_out:
            show("Clips that the limits of `data` exclude", left_out)
        show("Memory of a step on each device, GiB", _memory(setup, rates))
    whole = plan["buckets"][-1]
    audio_s = 3600 * whole["hours"] * setup.steps / whole["steps"]
    speed = expected_time(Path(config.runs_dir), audio_s)
    print(f"{setup.steps} steps, {audio_s / 3600:,.1f} hours of audio; time: {speed}")


def _memory(setup: Setup, rates: Sequence[RateRow]) -> list[Row]:
    """Each bucket's estimate; on a GPU also the compiler's figure."""
    estimates: dict[Shape, Memory] = {}
    compiled: dict[Shape, int] = {}

    def shape_of(bucket: Any) -> Shape:
        rows = bucket.rows // setup.mesh.size // step_for(setup, bucket).micro_batches
        return Shape(rows, bucket.audio_s, bucket.text_tokens)

    for bucket in setup.feed.buckets:
        shape = shape_of(bucket)
        estimates[shape] = memory_estimate(
            setup.model,
            setup.config,
            rates,
            shape,
            devices=setup.mesh.size,
            kernel=setup.compute.kernel,
            accumulated=step_for(setup, bucket).micro_batches > 1,
        )
    if jax.default_backend() == "gpu":
        programs = compile_steps(setup, state_shapes(setup), lambda bucket, program: None)
        for bucket, program in programs.items():
            compiled[shape_of(bucket)] = compiled_bytes(program.memory_analysis())
    return memory_rows(estimates, compiled or None)


def config_rows(loaded: LoadedConfig) -> list[Row]:
    """Every value with its origin; what somebody set comes first, marked."""
    values, origins = flatten(loaded.config), loaded.origins
    return [
        {
            "set": "" if origins[at] == DEFAULT else "*",
            "field": at,
            "value": json.dumps(values[at], ensure_ascii=False),
            "from": origins[at],
        }
        for at in sorted(values, key=lambda at: origins[at] == DEFAULT)
    ]


def rate_rows(rates: Sequence[RateRow]) -> list[Row]:
    """The groups of `optim.rate_table`."""
    return [
        {
            "group": row.group,
            "tensors": row.tensors,
            "parameters": row.parameters,
            "trained": row.trained_parameters,
            "peak rate": f"{row.peak_rate:.3g}" if row.trained_parameters else "frozen",
        }
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


def memory_rows(
    estimates: Mapping[Shape, Memory], compiled: Mapping[Shape, int] | None = None
) -> list[Row]:
    """GiB for each bucket by part; "kept" waits for the backward pass, from stem to last norm.

    Args:
      compiled: the compiler's figure for each bucket's step, by `compiled_bytes`.
    """
    rows = []
    for shape, memory in estimates.items():
        row: Row = {"bucket": f"{shape.rows} x {shape.audio_s} s + {shape.text_tokens} tokens"}
        parts = {
            "state": memory.weights + memory.moments,
            "copy": memory.copy,
            "gradients": memory.gradients,
            "kept": memory.stem + memory.encoder + memory.decoder + memory.ends,
            "layer": memory.layer,
            "logits": memory.logits,
            "GiB": memory.total,
        }
        row |= {part: f"{size / _GIB:.2f}" for part, size in parts.items()}
        if compiled is not None:
            row["compiler"] = f"{compiled[shape] / _GIB:.2f}"
            row["error"] = f"{100 * (memory.total / compiled[shape] - 1):+.0f} %"
        rows.append(row)
    return rows


def expected_time(runs_dir: Path, audio_s: float) -> str:
    """Hours for so many seconds of audio at the speed in `runs_dir`/bench.json, or "unknown".

    The file is a JSON object with `audio_s_per_s`.
    """
    path = runs_dir / "bench.json"
    if not path.exists():
        return f"unknown (no {path})"
    try:
        speed = float(json.loads(path.read_text(encoding="utf-8"))["audio_s_per_s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read", f"{type(error).__name__}: {error}", "measure again"
        ) from None
    if not 0 < speed < float("inf"):
        raise UserError(f"{path} is no measurement", f"audio_s_per_s is {speed}", "measure again")
    hours = audio_s / speed / 3600
    return f"{hours:.1f} hours at {speed:.0f} audio-s/s ({path})"


def show(title: str, rows: Sequence[Row]) -> None:
    """Prints a table to stdout: fitted to a terminal, elsewhere in full and without frames."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    for name in columns:
        numeric = all(_is_number(row.get(name, "")) for row in rows)
        justify: Literal["right", "left"] = "right" if numeric else "left"
        table.add_column(name, justify=justify, no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(_told(row.get(name, "")) for name in columns))
    # A line that is cut at 80 columns is of no use in a file.
    width = None if sys.stdout.isatty() else sys.maxsize
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    console.print(title)
    console.print(table)


def _is_number(value: Any) -> bool:
    return value in ("frozen", None) or re.fullmatch(r"[-+\d.,e% ]*", str(value)) is not None


def _told(value: Any) -> str:
    """A value as a cell; None is an empty one."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)

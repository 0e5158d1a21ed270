"""What `--dry-run` shows: the config with its origins, rates, plan, memory and expected time.

Tables are lists of rows, each a dict from column to value; `show` prints them, fitted to a
terminal and in full elsewhere.
"""

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax

from hebasr_jax.config_file import DEFAULT, LoadedConfig, flatten
from hebasr_jax.data.plan import plan_table
from hebasr_jax.data.sources import is_there
from hebasr_jax.errors import UserError
from hebasr_jax.model.asr import abstract_params
from hebasr_jax.optim import check_groups, rate_table
from hebasr_jax.rate_tables import layer_rows, rate_rows
from hebasr_jax.run_config import Config, Source
from hebasr_jax.run_setup import Setup, compile_steps, set_up, step_for
from hebasr_jax.sharding import CUT
from hebasr_jax.stages import Part, checked_rates
from hebasr_jax.step_memory import Memory, Shape, compiled_bytes, memory_estimate
from hebasr_jax.transcribe import open_model

Row = dict[str, Any]

_GIB = 2**30


def dry_run(loaded: LoadedConfig) -> None:
    """Prints all that a run would do and need, and trains nothing.

    The data is opened and planned as a run would; what it finds goes to a temporary folder. Sets
    that are not here are named, and the rest is planned. Where a GPU is at hand every bucket is
    compiled, and the estimate's error is shown.
    """
    show("Config (* is not the default)", config_rows(loaded))
    config, absent = what_is_here(loaded.config)
    if absent:
        show("Sets that are not here; what follows is without them", absent)
    if not config.data.train:
        _show_rates_alone(loaded.config)
        return
    with tempfile.TemporaryDirectory(prefix="hebasr-dry-run-") as folder:
        setup = set_up(config, Path(folder) / "model", Path(folder) / "quarantine.jsonl")
        hours = [_show_stage(setup, part) for part in setup.parts]
        for line in setup.remarks:
            print(line)
        left_out = [
            {"set": name, "reason": reason, "clips left out": count}
            for name, reasons in setup.left_out.items()
            for reason, count in reasons.items()
        ]
        if left_out:
            show("Clips that the limits of `data` exclude", left_out)
        show("Memory of a step on each device, GiB", _memory(setup))
    speed = expected_time(Path(config.runs_dir), 3600 * sum(hours))
    print(f"{setup.steps} steps, {sum(hours):,.1f} hours of audio; time: {speed}")


def what_is_here(config: Config) -> tuple[Config, list[Row]]:
    """The config without the sets that are not on this machine, and a row for each of those.

    A stage all of whose sets are missing is left out.
    """
    data = config.data
    kept: dict[str, Any] = {}
    absent: list[Row] = []
    for part in ("train", "dev", "test"):
        sources: tuple[Source, ...] = getattr(data, part)
        kept[part] = tuple(source for source in sources if is_there(source))
        absent += [
            {"set": s.name, "for": part, "path": s.path, "from the hub": s.hub or ""}
            for s in sources
            if s not in kept[part]
        ]
    here = {source.name for source in kept["train"]}
    stages = []
    for stage in config.stages:
        mix = tuple(part for part in stage.mix if part.set in here)
        if mix or not stage.mix:
            stages.append(replace(stage, mix=mix))
        else:
            absent.append({"set": "all of the stage", "for": f"stage {stage.name}"})
    if not stages:
        kept["train"] = ()
    here_config = replace(config, data=replace(data, **kept), stages=tuple(stages))
    return here_config, absent


def _show_rates_alone(config: Config) -> None:
    """Rates of each stage, where there is a model but no data to plan with."""
    try:
        model = open_model(config.model.path, revision=config.model.revision)[1]
    except UserError as error:
        print(f"No model here either, so no rates: {error}")
        return
    shapes = abstract_params(model)
    for stage in config.stages:
        check_groups(shapes, stage)
        rates = rate_table(shapes, stage)
        show(f"Learning rates, stage {stage.name}", rate_rows(rates, {}))
        show(f"Learning rates by layer, stage {stage.name}", layer_rows(rates))
    print("No set of data.train is here: no plan, no memory, no time, no rates measured.")


def _show_stage(setup: Setup, part: Part) -> float:
    """Prints a stage's rates, measured too, and the plan of its first epoch; its hours of audio."""
    of = f", stage {part.stage.name}" if len(setup.parts) > 1 else ""
    rates = rate_table(setup.shapes, part.stage)
    measured = checked_rates(part, setup.shapes)
    show(f"Learning rates{of}", rate_rows(rates, measured))
    show(f"Learning rates by layer{of}", layer_rows(rates))
    plan = plan_table(part.feed.table, part.feed.plan(0), setup.config.data)
    show(f"Plan of the first epoch, by bucket; the last row sums up{of}", plan["buckets"])
    show(f"Plan of the first epoch, by set{of}", plan["sets"])
    show(f"Shares of all rows of the mix{of}", part.feed.targets.table())
    for line in part.feed.targets.warnings():
        print(f"warning{of}: {line}")
    whole = plan["buckets"][-1]
    return whole["hours"] * (part.last - part.first) / whole["steps"]


def _memory(setup: Setup) -> list[Row]:
    """Each bucket's estimate, stage by stage; on a GPU also the compiler's figure."""
    compiled: dict[Any, int] = {}
    if jax.default_backend() == "gpu":
        programs = compile_steps(setup, setup.parts, lambda part, bucket, program: None)
        compiled = {key: compiled_bytes(p.memory_analysis()) for key, p in programs.items()}
    rows = []
    for part in setup.parts:
        rates = rate_table(setup.shapes, part.stage)
        for bucket in part.feed.buckets:
            step = step_for(setup, part, bucket)
            on_device = bucket.rows // setup.mesh.size // step.micro_batches
            shape = Shape(on_device, bucket.audio_s, bucket.text_tokens)
            memory = memory_estimate(
                setup.model,
                setup.config,
                part.stage,
                rates,
                shape,
                devices=setup.mesh.shape[CUT],
                kernel=setup.compute.kernel,
                accumulated=step.micro_batches > 1,
            )
            stage = {"stage": part.stage.name} if len(setup.parts) > 1 else {}
            rows.append(stage | memory_row(shape, memory, compiled.get((part.stage.name, bucket))))
    return rows


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


def memory_row(shape: Shape, memory: Memory, compiled: int | None = None) -> Row:
    """GiB of a bucket by part; "kept" waits for the backward pass, from stem to last norm.

    Args:
      compiled: the compiler's figure for the bucket's step, by `compiled_bytes`.
    """
    row: Row = {"bucket": f"{shape.rows} x {shape.audio_s} s + {shape.text_tokens} tokens"}
    parts = {
        "state": memory.weights + memory.moments,
        "copy": memory.copy,
        "gradients": memory.sums + memory.gradients,
        "kept": memory.stem + memory.encoder + memory.decoder + memory.ends,
        "layer": memory.layer,
        "logits": memory.logits,
        "GiB": memory.total,
    }
    row |= {part: f"{size / _GIB:.2f}" for part, size in parts.items()}
    if compiled is not None:
        row["compiler"] = f"{compiled / _GIB:.2f}"
        row["error"] = f"{100 * (memory.total / compiled - 1):+.0f} %"
    return row


def expected_time(runs_dir: Path, audio_s: float) -> str:
    """Hours for so many seconds of audio at the speed in `runs_dir`/bench.json, or "unknown".

    The file is a JSON object with `audio_s_per_s`.
    """
    path = runs_dir / "bench.json"
    if not path.exists():
        return f"unknown (no {path})"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told.get("what", "train") != "train":
            raise ValueError(f"it is of {told['what']}, not of train")
        speed = float(told["audio_s_per_s"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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

"""A start of a run: what changed since the last one, and what is written down of this one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.config_file import LoadedConfig, at_defaults, dump
from hebasr_jax.data.plan import plan_table
from hebasr_jax.distributed import from_all_hosts
from hebasr_jax.errors import UserError
from hebasr_jax.finish import trained_on
from hebasr_jax.run_changes import changes_since, differences
from hebasr_jax.run_folder import prepare_layout, record_start, write_json
from hebasr_jax.run_setup import Setup
from hebasr_jax.running import Say
from hebasr_jax.tracking import MetricsLog, put_aside

_OF_A_MACHINE = ("data.threads", "data.prefetch_batches", "compute.cache_dir")


@dataclass(frozen=True, eq=False)
class Start:
    """What a start goes by. `facts`: what must be as it was, besides the config."""

    loaded: LoadedConfig
    folder: Path
    setup: Setup
    facts: Mapping[str, Any]
    say: Say


def lay_out_anew(folder: Path, loaded: LoadedConfig, *, accept_changes: bool) -> bool:
    """Tells, as `prepare_layout` does, whether files of the run are made anew.

    Where they are not, another config is refused here: else the old tokenizer, or the data, would
    be blamed for what a new setting asks of it.
    """
    anew = prepare_layout(folder, accept_changes=accept_changes)
    if not anew:
        changes_since(folder, dump(loaded), None, at_defaults=at_defaults(loaded.config))
    return anew


def settings(loaded: LoadedConfig) -> dict[str, Any]:
    """The values of a config that all processes of a run share; the others are a machine's own."""
    values = {at: entry["value"] for at, entry in dump(loaded).items()}
    return {at: value for at, value in values.items() if at not in _OF_A_MACHINE}


def refuse_unlike(own: Mapping[str, Any]) -> None:
    """Refuses processes of one run that were told different things: all of them call it.

    Each would train on batches of its own, or wait for ever for what another does not do.
    """
    hosts = from_all_hosts(dict(own))
    for number, other in enumerate(hosts):
        if unlike := list(differences(hosts[0], other).values()):
            raise UserError(
                f"processes 0 and {number} of the run are not of one mind",
                "; ".join(unlike[:3]),
                "give all of them the same config, and the same files at its paths",
            )


def check(start: Start, *, accept_changes: bool) -> list[str]:
    """Checks that a resumed run is what it was; says, and returns, what changed since."""
    setup, say = start.setup, start.say
    changes = changes_since(
        start.folder,
        dump(start.loaded),
        start.facts,
        at_defaults=at_defaults(start.loaded.config),
        accept_changes=accept_changes,
    )
    for line in changes:
        say(f"changed since the last start: {line}")
    for line in dict.fromkeys(x for part in setup.parts for x in part.feed.targets.warnings()):
        say(f"warning: {line}")
    for line in setup.remarks:
        say(line)
    for name, reasons in setup.left_out.items():
        for reason, count in reasons.items():
            say(f"{name}: {count} clips left out: {reason}")
    if len(setup.quarantine):
        say(
            f"{len(setup.quarantine)} clips cannot be used; see {start.folder / 'quarantine.jsonl'}"
        )
    return changes


def record(start: Start, changes: Sequence[str], resumed: int | None) -> MetricsLog:
    """Writes down a start that will go on; its metrics.jsonl.

    Args:
      changes: what `check` gave.
      resumed: the step that the run goes on from; None: it begins.
    """
    folder, config = start.folder, dump(start.loaded)
    write_json(folder / "plan.json", plan_tables(start.setup))
    if resumed is None:
        put_aside(folder, start.say)
    record_start(folder, config, start.facts, changes, about={"data": trained_on(start.setup)})
    return MetricsLog(folder / "metrics.jsonl", resumed)


def plan_tables(setup: Setup) -> dict[str, Any]:
    """Each stage's first epoch, and all clips by length, for the report."""
    tables: dict[str, Any] = {}
    for part in setup.parts:
        found = plan_table(part.feed.table, part.feed.plan(0), setup.config.data)
        of = f" of stage {part.stage.name}" if len(setup.parts) > 1 else ""
        tables |= {f"{name}{of}": found[name] for name in ("buckets", "sets")}
        tables[f"rows with{of}"] = part.feed.targets.table()
    samples_C = np.concatenate([part.feed.table.samples_C for part in setup.parts])
    counts, edges = np.histogram(samples_C / SAMPLE_RATE, bins=40)
    histogram = {"edges_s": edges.tolist(), "counts": counts.tolist()}
    return tables | {"left_out": setup.left_out, "duration_histogram": histogram}

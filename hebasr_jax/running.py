"""A run under way: what it consists of, what changes in it, and how its steps are told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hebasr_jax.checkpoint import CheckpointStore
from hebasr_jax.data.pipeline import Item
from hebasr_jax.errors import UserError
from hebasr_jax.run_folder import StopSignal
from hebasr_jax.run_setup import Setup
from hebasr_jax.stages import Part
from hebasr_jax.throughput import Window, Work
from hebasr_jax.tracking import MetricsLog
from hebasr_jax.train_step import StepMetrics, TrainState
from hebasr_jax.validate import DevSet, scored_on

Say = Callable[[str], None]


@dataclass
class Trainee:
    """What changes while a run trains: the state, the place in the data, and what is yet to tell.

    stage: number of the stage that `state` is cut for.
    pending: the last dispatched step, whose metrics are read when the next one runs.
    skipped_row: steps without a finite gradient, in a row.
    """

    state: TrainState
    step: int
    stage: int
    epoch: int
    batch: int
    window: Window
    pending: tuple[StepMetrics, Work, Item] | None = None
    skipped_row: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds besides the state: the stage, its next batch, skipped steps."""
        return {
            "stage": self.stage,
            "data": {"epoch": self.epoch, "batch": self.batch},
            "skipped": self.window.skipped,
            "skipped_row": self.skipped_row,
        }


@dataclass(frozen=True, eq=False)
class Run:
    """The fixtures of a run that is under way.

    log, send: metrics.jsonl, and its copies for trackers; the first host's.
    """

    setup: Setup
    folder: Path
    store: CheckpointStore
    stop: StopSignal
    log: MetricsLog | None
    show: Callable[[Any], None]
    send: Callable[[Any], None]
    say: Say
    programs: dict[Any, Any] = field(default_factory=dict)
    dev_sets: list[DevSet] = field(default_factory=list)

    @property
    def scored_on(self) -> str:
        """What its validations are of."""
        return scored_on(self.dev_sets, self.setup.config, self.setup.tokenizer_sha256)

    def part(self, trainee: Trainee) -> Part:
        """The stage that the run is in."""
        return self.setup.parts[trainee.stage]


def tell_pending(run: Run, trainee: Trainee, *, now: bool = False) -> None:
    """Reads the last step's metrics; writes a line every `log_steps` steps, or `now`."""
    if trainee.pending is None:
        return
    window, step = trainee.window, trainee.step
    (metrics, work, item), trainee.pending = trainee.pending, None
    window.losses.append(float(metrics.loss))
    window.grad_norm = float(metrics.grad_norm)
    window.work.append(work)
    trainee.skipped_row = trainee.skipped_row + 1 if metrics.skipped else 0
    if metrics.skipped:
        window.skipped += 1
        tell_skipped(run, trainee, item)
    if now or step % run.setup.config.train.log_steps == 0:
        rates = {name: float(rate) for name, rate in metrics.rates.items()}
        line = window.line(step, run.setup.steps, run.part(trainee).epoch(step), rates)
        tell(run, line | {"stage": run.part(trainee).stage.name})
    else:
        run.show({"step": step})


def tell(run: Run, line: Mapping[str, Any]) -> None:
    """A line of metrics.jsonl, which the first host writes, its copies, its place on the screen."""
    if run.log is not None:
        run.log.append(line)
        run.send(line)
    if line["kind"] != "skipped":
        run.show(line)


def tell_skipped(run: Run, trainee: Trainee, item: Item) -> None:
    """Writes down the clips of a step that changed nothing; too many in a row end the run."""
    feed = run.part(trainee).feed
    plan = feed.plan(item.epoch)
    rows_of_table = [clip for row in plan.batch(item.batch) for clip in row.clips]
    ids = [feed.sets[feed.table.set_of(n)].clips[feed.table.clip_C[n]].id for n in rows_of_table]
    window = trainee.window
    told = {
        "loss": window.losses[-1],
        "grad_norm": window.grad_norm,
        "epoch": item.epoch,
        "batch": item.batch,
        "clips": ids,
    }
    tell(run, {"kind": "skipped", "step": trainee.step, **told})
    run.say(
        f"step {trainee.step} was skipped: loss {told['loss']}, gradient norm {told['grad_norm']}"
    )
    if trainee.skipped_row >= run.setup.config.train.max_skipped_steps:
        raise UserError(
            f"{trainee.skipped_row} steps in a row had no finite gradient; the run ends",
            f"the last had loss {told['loss']} on {', '.join(ids[:3])} ...; see metrics.jsonl",
            "lower the learning rates, or look at these clips; the last checkpoint is whole",
        )

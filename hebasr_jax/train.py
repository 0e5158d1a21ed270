"""A training run, in the order in which it happens.

config -> run folder, locked -> model files, data, plan -> state, restored or loaded -> programs,
all compiled -> validation at step 0 -> steps, with checkpoints and validations -> report.
Stopped by a signal, it saves and ends with EXIT_RUN_AGAIN; the same command goes on.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hebasr_jax.checkpoint import CheckpointStore
from hebasr_jax.config_file import LoadedConfig, dump
from hebasr_jax.data.clips import Batch
from hebasr_jax.data.pipeline import Item, stream
from hebasr_jax.data.plan import plan_table
from hebasr_jax.distributed import any_host, is_first, local_rows, place_rows
from hebasr_jax.errors import UserError
from hebasr_jax.optim import GROUPS, join, schedule
from hebasr_jax.report import write_report
from hebasr_jax.run_config import Config
from hebasr_jax.run_folder import (
    EXIT_RUN_AGAIN,
    StopSignal,
    open_run,
    record_start,
    was_trained,
    write_json,
)
from hebasr_jax.run_setup import Setup, compile_steps, fixed_facts, load_state, set_up, state_shapes
from hebasr_jax.sharding import bytes_per_device, replicated, rows
from hebasr_jax.throughput import Window, Work, work_of
from hebasr_jax.tracking import MetricsLog, put_aside, read_metrics, training_display
from hebasr_jax.train_step import StepMetrics, TrainState, cast
from hebasr_jax.validate import DevSet, load_dev_sets, validate

Say = Callable[[str], None]
_FOREVER = 1 << 30  # epochs: a run ends by its steps


class Placed(NamedTuple):
    """A batch on the devices, and this host's part of it as it was loaded."""

    device: Batch
    host: Batch


@dataclass
class Trainee:
    """What changes while a run trains: the state, the place in the data, and what is yet to tell.

    pending: the last dispatched step, whose metrics are read when the next one runs.
    skipped_row: steps without a finite gradient, in a row.
    """

    state: TrainState
    step: int
    epoch: int
    batch: int
    window: Window
    pending: tuple[StepMetrics, Work, Item] | None = None
    skipped_row: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds besides the state: the next batch."""
        return {"data": {"epoch": self.epoch, "batch": self.batch}, "skipped": self.window.skipped}


@dataclass(frozen=True, eq=False)
class Run:
    """The fixtures of a run that is under way."""

    setup: Setup
    folder: Path
    store: CheckpointStore
    stop: StopSignal
    log: MetricsLog | None
    show: Callable[[Any], None]
    say: Say
    programs: dict[Any, Any] = field(default_factory=dict)
    dev_sets: list[DevSet] = field(default_factory=list)


def train(loaded: LoadedConfig, say: Say, *, accept_changes: bool = False) -> int:
    """Trains as the config says, or goes on with a run that was stopped.

    Args:
      say: shows a line to the user.
      accept_changes: go on although config, data or tokenizer changed since.

    Returns:
      the exit code: 0, or EXIT_RUN_AGAIN when a signal stopped it.
    """
    config = loaded.config
    folder = Path(config.runs_dir) / config.name
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        if is_first():
            stack.enter_context(open_run(folder))
        use_cache(config)
        fresh = accept_changes or not was_trained(folder)
        setup = set_up(config, folder / "model", folder / "quarantine.jsonl", fresh=fresh)
        if is_first():
            begin(setup, folder, loaded, say, accept_changes)
        store = stack.enter_context(
            CheckpointStore(
                folder, keep_last=config.train.keep_last, keep_best=config.train.keep_best, warn=say
            )
        )
        trainee = start_or_resume(setup, store, say)
        if is_first() and not trainee.step:
            put_aside(folder, say)
        log = MetricsLog(folder / "metrics.jsonl", trainee.step or None) if is_first() else None
        run = Run(setup, folder, store, stop, log, display(stack, setup.steps), say)
        run.programs.update(compile_programs(setup, trainee.state, say))
        if config.validation.every_steps:
            run.dev_sets.extend(
                load_dev_sets(
                    setup.dev_sets, setup.tokenizer, config, setup.feed.quarantine, setup.mesh.size
                )
            )
        code = go_on(run, trainee)
        store.wait()
        if is_first():
            try:
                say(f"report: {write_report(folder)}")
            except UserError as error:  # the run is whole without it
                say(f"no report: {error}")
    return code


def display(stack: contextlib.ExitStack, steps: int) -> Callable[[Any], None]:
    """Shows lines of metrics.jsonl until the stack ends; only the first host does."""
    if is_first():
        return stack.enter_context(training_display(steps))
    return lambda line: None


def use_cache(config: Config) -> None:
    """Keeps compiled programs on disk, so that a resumed run starts in seconds."""
    if config.compute.cache_dir:
        folder = str(Path(config.compute.cache_dir).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def begin(setup: Setup, folder: Path, loaded: LoadedConfig, say: Say, accept_changes: bool) -> None:
    """Checks that a resumed run is what it was, and writes down what this start is."""
    feed, data = setup.feed, setup.config.data
    facts = fixed_facts(setup)
    for line in record_start(folder, dump(loaded), facts, accept_changes=accept_changes):
        say(f"changed since the last start: {line}")
    plan = feed.plan(0)
    write_json(
        folder / "plan.json",
        plan_table(feed.table, plan, data)
        | {"left_out": feed.left_out, "duration_histogram": durations(setup)},
    )
    for name, reasons in feed.left_out.items():
        for reason, count in reasons.items():
            say(f"{name}: {count} clips left out: {reason}")
    if len(feed.quarantine):
        say(f"{len(feed.quarantine)} clips cannot be used; see {folder / 'quarantine.jsonl'}")


def durations(setup: Setup) -> dict[str, list[float]]:
    """Clips by length, for the report."""
    seconds = setup.feed.table.samples_C / 16000
    counts, edges = np.histogram(seconds, bins=40)
    return {"edges_s": edges.tolist(), "counts": counts.tolist()}


def start_or_resume(setup: Setup, store: CheckpointStore, say: Say) -> Trainee:
    """The newest whole checkpoint, or the loaded model; never the latter where there is one."""
    window = Window(jax.process_count(), setup.mesh.size)
    restored = store.restore(state_shapes(setup))
    if restored is None:
        state = load_state(setup)
        say(f"state: {bytes_per_device(state) / 1e9:.2f} GB on each of {setup.mesh.size} devices")
        return Trainee(state, 0, 0, 0, window)
    place = restored.facts["data"]
    window.skipped = restored.facts["skipped"]
    say(f"going on from step {restored.step}")
    return Trainee(restored.state, restored.step, place["epoch"], place["batch"], window)


def compile_programs(setup: Setup, state: TrainState, say: Say) -> dict[Any, Any]:
    """Every bucket's step, before the first one runs; each tells its memory."""
    began = time.perf_counter()

    def told(bucket: Any, program: Any) -> None:
        memory = program.memory_analysis()
        total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        say(
            f"compiled {bucket.rows} x {bucket.audio_s} s, {bucket.text_tokens} text tokens: "
            f"{total / 1e9:.2f} GB, after {time.perf_counter() - began:.1f} s"
        )

    kernel = setup.compute.kernel
    say(f"attention: {kernel} in encoder and decoder, xla in cached decoding")
    return compile_steps(setup, state, told)


def go_on(run: Run, trainee: Trainee) -> int:
    """Steps until the last one or a signal; saves and validates where they are due."""
    setup, config = run.setup, run.setup.config
    place = rows(setup.mesh)
    trainee.window.began_s = time.perf_counter()

    def put(host: Batch) -> Placed:
        return Placed(jax.tree.map(lambda x: place_rows(x, place), host), host)

    batches = stream(
        setup.feed,
        epochs=_FOREVER,
        epoch=trainee.epoch,
        batch=trainee.batch,
        local_rows=local_rows,
        place=put,  # type: ignore[arg-type]  # the stream hands on what it is given
    )
    with batches as items:
        while True:
            ended = trainee.step >= setup.steps
            stopping = any_host(run.stop.requested)
            due = trainee.step % config.train.checkpoint_steps == 0
            if ended or stopping or due or validation_due(run, trainee):
                save(run, trainee)
            if stopping or not validate_if_due(run, trainee):
                run.store.wait()
                return EXIT_RUN_AGAIN
            if ended:
                return 0
            one_step(run, trainee, next_item(run, trainee, items))


def next_item(run: Run, trainee: Trainee, items: Iterator[Item]) -> Item:
    """The next batch; where the data ends the run, what was trained until then is saved."""
    try:
        return next(items)
    except UserError:
        if jax.process_count() == 1:  # with several hosts the others would not join in
            save(run, trainee)
            run.store.wait()
        raise


def one_step(run: Run, trainee: Trainee, item: Item) -> None:
    """Dispatches a step, then reads and tells the metrics of the one before it."""
    setup = run.setup
    bucket = setup.feed.buckets[item.bucket]
    placed: Any = item.data
    trainee.window.waited_s += item.waited_s
    if jax.default_backend() == "cpu":  # it computes while it dispatches: time of this step
        tell_pending(run, trainee)
    state, metrics = run.programs[bucket](trainee.state, placed.device, setup.noise_NS)
    tell_pending(run, trainee)
    work = work_of(placed.host, bucket.audio_s, setup.model)
    trainee.pending = metrics, work, item
    trainee.state, trainee.step = state, trainee.step + 1
    trainee.epoch, trainee.batch = item.epoch, item.batch + 1
    run.stop.worth_saving = True


def tell_pending(run: Run, trainee: Trainee, *, now: bool = False) -> None:
    """Reads the last step's metrics; writes a line every `log_steps` steps, or `now`."""
    if trainee.pending is None:
        return
    setup, window = run.setup, trainee.window
    (metrics, work, item), trainee.pending = trainee.pending, None
    window.losses.append(float(metrics.loss))
    window.grad_norm = float(metrics.grad_norm)
    window.work.append(work)
    trainee.skipped_row = trainee.skipped_row + 1 if metrics.skipped else 0
    if metrics.skipped:
        window.skipped += 1
        tell_skipped(run, trainee, item)
    if now or trainee.step % setup.config.train.log_steps == 0:
        done = trainee.step - 1 - window.skipped  # a skipped step does not move the schedule
        rates = {
            name: getattr(setup.config.optim, name).learning_rate
            * float(schedule(done, setup.steps, setup.config.optim))
            for name in dict.fromkeys(group for _, group in GROUPS)
        }
        line = window.line(trainee.step, setup.steps, trainee.step / setup.epoch_steps, rates)
        tell(run, line)
    else:
        run.show({"step": trainee.step})


def tell(run: Run, line: Mapping[str, Any]) -> None:
    """A line of metrics.jsonl, which the first host writes, and its place on the screen."""
    if run.log is not None:
        run.log.append(line)
    if line["kind"] != "skipped":
        run.show(line)


def tell_skipped(run: Run, trainee: Trainee, item: Item) -> None:
    """Writes down the clips of a step that changed nothing; too many in a row end the run."""
    feed = run.setup.feed
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


def save(run: Run, trainee: Trainee) -> None:
    """A checkpoint of this step, with every step until here told; none before step 1."""
    if trainee.step:
        tell_pending(run, trainee, now=True)
        began = time.perf_counter()
        run.store.save(trainee.step, trainee.state, trainee.facts)
        trainee.window.paused_s += time.perf_counter() - began


def validation_due(run: Run, trainee: Trainee) -> bool:
    """At step 0, every so many steps, and at the end."""
    every, step = run.setup.config.validation.every_steps, trainee.step
    return bool(run.dev_sets) and (step % every == 0 or step >= run.setup.steps)


def validate_if_due(run: Run, trainee: Trainee) -> bool:
    """Validates where it is due and was not done before a resume; False when a signal came."""
    config, setup, step = run.setup.config, run.setup, trainee.step
    if not validation_due(run, trainee) or validated(run, step):
        return True
    tell_pending(run, trainee, now=True)
    began = time.perf_counter()
    scores = validate(
        whole_weights(setup, trainee.state),
        run.dev_sets,
        setup.model,
        setup.tokenizer,
        config,
        compute=setup.compute,
        mesh=setup.mesh,
        stopped=lambda: any_host(run.stop.requested),
    )
    trainee.window.paused_s += time.perf_counter() - began
    if scores is None:
        save(run, trainee)
        return False
    line = {"kind": "validation", "step": step, "sets": scores}
    tell(run, line)
    if step:
        means = (np.mean([s[name] for s in scores.values()]) for name in ("loss", "wer"))
        run.store.record(step, *map(float, means))
    return True


def validated(run: Run, step: int) -> bool:
    """Whether metrics.jsonl has the validation of this step, from before a resume."""
    lines = read_metrics(run.folder / "metrics.jsonl") if is_first() else []
    return any_host(any(x["kind"] == "validation" and x["step"] == step for x in lines))


def whole_weights(setup: Setup, state: TrainState) -> Any:
    """The model's weights in the compute dtype, whole on every device."""
    dtype = setup.compute.dtype
    gather = jax.jit(
        lambda trained, frozen: join(cast(trained, dtype), cast(frozen, dtype)),
        out_shardings=replicated(setup.mesh),
    )
    return gather(state.trained, state.frozen)

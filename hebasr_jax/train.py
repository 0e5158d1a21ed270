"""A training run, in the order in which it happens.

config -> run folder, locked -> model files, data, plan -> state, restored or loaded -> programs,
all compiled -> validation at step 0 -> stage by stage: steps, checkpoints, validations -> what
follows the last step (`finish.py`) -> report.
Stopped by a signal, it saves and ends with EXIT_RUN_AGAIN; the same command goes on.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hebasr_jax.checkpoint import CheckpointStore
from hebasr_jax.config_file import LoadedConfig, dump
from hebasr_jax.data.clips import Batch
from hebasr_jax.data.pipeline import Item, stream
from hebasr_jax.data.plan import Bucket
from hebasr_jax.distributed import any_host, is_first, local_rows, on_first, place_rows
from hebasr_jax.errors import UserError
from hebasr_jax.finish import asked_for, finish, repository
from hebasr_jax.optim import join, rate_table
from hebasr_jax.program_cache import keep_programs
from hebasr_jax.rate_tables import stage_lines
from hebasr_jax.report import write_report
from hebasr_jax.run_changes import leaves
from hebasr_jax.run_folder import (
    EXIT_RUN_AGAIN,
    StopSignal,
    open_run,
)
from hebasr_jax.run_setup import Setup, compile_steps, fixed_facts, load_state, set_up
from hebasr_jax.run_start import Start, check, lay_out_anew, record, refuse_unlike, settings
from hebasr_jax.running import Run, Say, Trainee, tell, tell_pending
from hebasr_jax.sharding import bytes_per_device, replicated, rows
from hebasr_jax.sinks import check_sinks, open_sinks
from hebasr_jax.stages import Part, checked_rates, enter, state_shapes
from hebasr_jax.throughput import Window, work_of
from hebasr_jax.tracking import latest_validations, read_metrics, training_display
from hebasr_jax.train_step import TrainState, cast
from hebasr_jax.upload import has_token
from hebasr_jax.validate import DevSet, load_dev_sets, validate

_FOREVER = 1 << 30  # epochs: a run ends by its steps


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
        check_sinks(config.tracking.sinks)
        if (repo := repository(config)) and not has_token():
            say(f"warning: {repo}: no token; set HF_TOKEN or `hf auth login` before the end")
        refuse_unlike(settings(loaded))
        on_first(lambda: stack.enter_context(open_run(folder)))
        if config.compute.cache_dir:
            keep_programs(config.compute.cache_dir)
        fresh = on_first(lambda: lay_out_anew(folder, loaded, accept_changes=accept_changes))
        setup = set_up(config, folder / "model", folder / "quarantine.jsonl", fresh=bool(fresh))
        start = Start(loaded, folder, setup, fixed_facts(setup), say)
        refuse_unlike(leaves(start.facts))
        changes = on_first(lambda: check(start, accept_changes=accept_changes))
        store = stack.enter_context(
            CheckpointStore(
                folder, keep_last=config.train.keep_last, keep_best=config.train.keep_best, warn=say
            )
        )
        trainee = start_or_resume(setup, store, say)
        resumed = trainee.step or None
        # Only now: a start that cannot go on leaves the last one's record.
        log = on_first(lambda: record(start, changes or [], resumed))
        show, send = display(stack, setup.steps), tracker(stack, loaded, folder, resumed, say)
        run = Run(setup, folder, store, stop, log, show, send, say)
        run.programs.update(compile_programs(setup, trainee, say))
        if config.validation.every_steps:
            run.dev_sets.extend(dev_sets_of(setup, say))
        code = through_stages(run, trainee)
        store.wait()
        del trainee  # its state is on the disk now, and scoring takes memory
        if code == 0 and asked_for(config):
            finish(run)
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


def tracker(
    stack: contextlib.ExitStack, loaded: LoadedConfig, folder: Path, resumed: int | None, say: Say
) -> Callable[[Any], None]:
    """Sends lines of metrics.jsonl to the trackers asked for; only the first host does."""
    config = loaded.config
    if not is_first() or not config.tracking.sinks:
        return lambda line: None
    values = {at: entry["value"] for at, entry in dump(loaded).items()}
    return stack.enter_context(
        open_sinks(config.tracking.sinks, folder, config.name, values, resumed, say)
    )


def dev_sets_of(setup: Setup, say: Say) -> list[DevSet]:
    """The dev sets in memory; says which of their clips no score will know of."""
    dev_sets = load_dev_sets(
        setup.dev_sets, setup.tokenizer, setup.config, setup.quarantine, setup.mesh.size
    )
    for dev in dev_sets:
        for reason, count in dev.left_out.items():
            say(f"{dev.name}: {count} clips are not scored: {reason}")
    return dev_sets


def start_or_resume(setup: Setup, store: CheckpointStore, say: Say) -> Trainee:
    """The newest whole checkpoint, or the loaded model; never the latter where there is one."""
    window = Window(setup.mesh.size)

    def shapes(facts: Mapping[str, Any]) -> TrainState:
        if facts["stage"] >= len(setup.parts):
            raise _other_stages(facts["step"], setup.parts[-1])
        return state_shapes(setup.parts[facts["stage"]], setup.shapes, setup.mesh)

    restored = store.restore(shapes)
    if restored is None:
        state = load_state(setup)
        say(f"state: {bytes_per_device(state) / 1e9:.2f} GB on each of {setup.mesh.size} devices")
        return Trainee(state, 0, 0, 0, 0, window)
    facts, place = restored.facts, restored.facts["data"]
    window.skipped = facts["skipped"]
    say(f"going on from step {restored.step}")
    part = setup.parts[facts["stage"]]
    if not part.first <= restored.step <= part.last:
        raise _other_stages(restored.step, part)
    return Trainee(
        restored.state,
        restored.step,
        facts["stage"],
        place["epoch"],
        place["batch"],
        window,
        skipped_row=facts.get("skipped_row", 0),
    )


def _other_stages(step: int, part: Part) -> UserError:
    """Of a checkpoint that cannot be where the stages, as they are now, would have it."""
    return UserError(
        f"the newest checkpoint is of step {step}, and stage {part.stage.name} has the steps "
        f"{part.first + 1} to {part.last}",
        "the stages, train.steps or the data changed since",
        "undo that, or set another name and start from an export of this run (model.path)",
    )


def compile_programs(setup: Setup, trainee: Trainee, say: Say) -> dict[Any, Any]:
    """The steps of all stages that are left, before the first one runs; each tells its memory."""
    began = time.perf_counter()
    left = [p for p in setup.parts[trainee.stage :] if trainee.step < p.last]

    def told(part: Part, bucket: Bucket, program: Any) -> None:
        memory = program.memory_analysis()
        total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        of = f"{part.stage.name}: " if len(setup.parts) > 1 else ""
        say(
            f"compiled {of}{bucket.rows} x {bucket.audio_s} s, {bucket.text_tokens} text tokens: "
            f"{total / 1e9:.2f} GB, after {time.perf_counter() - began:.1f} s"
        )

    kernel = setup.compute.kernel
    say(f"attention: {kernel} in encoder and decoder")
    return compile_steps(setup, left, told)


def through_stages(run: Run, trainee: Trainee) -> int:
    """All that is left of the run, stage by stage; the exit code."""
    setup = run.setup
    for number in range(trainee.stage, len(setup.parts)):
        part = setup.parts[number]
        if number > trainee.stage:
            trainee.state = enter(trainee.state, part, setup.shapes, setup.mesh)
            trainee.stage, trainee.epoch, trainee.batch = number, 0, 0
        if trainee.step < part.last:
            measured = checked_rates(part, setup.shapes)
            for line in stage_lines(part, rate_table(setup.shapes, part.stage), measured):
                run.say(line)
        if not through_steps(run, trainee, part):
            return EXIT_RUN_AGAIN
    return 0


def through_steps(run: Run, trainee: Trainee, part: Part) -> bool:
    """The steps of a stage, with saves and validations where due; False when a signal came."""
    trainee.window.restart()
    batches = stream(
        part.feed,
        epochs=_FOREVER,
        epoch=trainee.epoch,
        batch=trainee.batch,
        local_rows=local_rows,
    )
    with batches as items:
        while True:
            ended = trainee.step >= part.last
            stopping = any_host(run.stop.requested)
            due = trainee.step % run.setup.config.train.checkpoint_steps == 0
            if ended or stopping or due or validation_due(run, trainee):
                save(run, trainee)
            if stopping or not validate_if_due(run, trainee):
                run.store.wait()
                return False
            if ended:
                return True
            one_step(run, trainee, next_item(run, trainee, items))


def next_item(run: Run, trainee: Trainee, items: Iterator[Item]) -> Item:
    """The next batch; where the data ends the run, what was trained until then is saved."""
    try:
        return next(items)
    except Exception:  # bad data, or a reading thread that died
        if jax.process_count() == 1:  # with several hosts the others would not join in
            save(run, trainee)
            run.store.wait()
        raise


def one_step(run: Run, trainee: Trainee, item: Item) -> None:
    """Starts the batch's copy, waits for the step before, tells its metrics, dispatches this one.

    All in one thread: see `pipeline.stream`. The device waits for the dispatch alone.
    """
    setup, part = run.setup, run.part(trainee)
    bucket = part.feed.buckets[item.bucket]
    host: Batch = item.data
    place = rows(setup.mesh)
    batch = jax.tree.map(lambda x: place_rows(x, place), host)
    trainee.window.waited_s += item.waited_s
    tell_pending(run, trainee)
    program = run.programs[part.stage.name, bucket]
    state, metrics = program(trainee.state, batch, setup.noise_NS)
    work = work_of(host, bucket.audio_s, setup.model)
    trainee.pending = metrics, work, item
    trainee.state, trainee.step = state, trainee.step + 1
    trainee.epoch, trainee.batch = item.epoch, item.batch + 1
    run.stop.worth_saving = True


def save(run: Run, trainee: Trainee) -> None:
    """A checkpoint of this step, with every step until here told; none before step 1."""
    if trainee.step:
        tell_pending(run, trainee, now=True)
        began = time.perf_counter()
        run.store.save(trainee.step, trainee.state, trainee.facts)
        trainee.window.paused_s += time.perf_counter() - began


def validation_due(run: Run, trainee: Trainee) -> bool:
    """At step 0, every so many steps, and at the end of each stage."""
    every, step = run.setup.config.validation.every_steps, trainee.step
    return bool(run.dev_sets) and (step % every == 0 or step >= run.part(trainee).last)


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
    if step:  # before the line: a run that ends between the two scores this step again
        rank(run, step, scores)
    tell(run, {"kind": "validation", "step": step, "sets": scores, "scored_on": run.scored_on})
    return True


def rank(run: Run, step: int, scores: Mapping[str, Any]) -> None:
    """Puts a step's means over the dev sets into best.json; a set of silence has no WER."""

    def mean(name: str) -> float:
        figures = [s[name] for s in scores.values() if s[name] is not None]
        known = [figure for figure in figures if np.isfinite(figure)]
        return float(np.mean(known)) if known else float("nan")

    run.store.record(step, mean("loss"), mean("wer"), run.scored_on)


def validated(run: Run, step: int) -> bool:
    """Whether metrics.jsonl has this step's validation on the same data, from before a resume.

    Its figures are then those in best.json, where others may stand since.
    """
    wanted = ("validation", step, run.scored_on)
    lines = read_metrics(run.folder / "metrics.jsonl") if is_first() else []
    latest = latest_validations(lines)  # not one from before a change that is undone
    found = [x for x in latest if (x["kind"], x["step"], x.get("scored_on")) == wanted]
    if found and step:
        rank(run, step, found[-1]["sets"])
    return any_host(bool(found))


def whole_weights(setup: Setup, state: TrainState) -> Any:
    """The model's weights in the compute dtype, whole on every device."""
    dtype = setup.compute.dtype
    gather = jax.jit(
        lambda trained, frozen: join(cast(trained, dtype), cast(frozen, dtype)),
        out_shardings=replicated(setup.mesh),
    )
    return gather(state.trained, state.frozen)

"""The training step: on the fixed work, and on the mix of lengths through the whole data path."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hebasr_jax.bench import work
from hebasr_jax.bench.figures import (
    DATASHEET_TFLOPS,
    Row,
    product_tflops,
    programs_compiled,
    seconds_of,
    spread,
)
from hebasr_jax.bench.shards import drop_from_cache, mix_config, write_mix
from hebasr_jax.bench.trace import collective_times
from hebasr_jax.checkpoint import CheckpointStore
from hebasr_jax.config import ModelConfig
from hebasr_jax.data.pipeline import stream
from hebasr_jax.distributed import place_whole
from hebasr_jax.model.asr import init_params
from hebasr_jax.optim import make_optimizer, split, split_shapes
from hebasr_jax.run_config import Computation, Config, Optim, Stage
from hebasr_jax.run_folder import StopSignal
from hebasr_jax.run_setup import Setup, compile_steps, set_up, step_compute
from hebasr_jax.running import Run, Trainee, tell_pending
from hebasr_jax.sharding import CUT, local_mesh, make_mesh, rows, shardings
from hebasr_jax.step_memory import compiled_bytes
from hebasr_jax.throughput import Window, Work, peak_bytes, work_of
from hebasr_jax.train import one_step
from hebasr_jax.train_step import Step, TrainState, compile_step, init_state, micro_loss

_WARM_UP, _TRACED, _ORACLE_ROWS = 5, 3, 4
_GIB = 2**30


@dataclass(frozen=True)
class Settings:
    """What a measurement of training is of.

    rows: clips of the fixed work on each device. steps: that are timed. mix_audio_s: seconds of
    padded audio in a step of the mix, on each device.
    """

    model: ModelConfig
    compute: Computation
    rows: int
    steps: int
    mix_audio_s: float
    buckets: int
    join_share: float = 0.0
    optim: Optim = field(default_factory=Optim)


def fixed(settings: Settings) -> Row:
    """The full step on the fixed work, again and again on one batch."""
    compute = settings.compute
    optimizer, mesh = _optimizer(settings), make_mesh(compute.devices, compute.cut_over)
    step = Step(
        settings.model,
        step_compute(Config(compute=compute)),
        work.AUGMENT,
        optimizer,
        mesh,
        audio_s=work.CLIP_S,
        gather=compute.gather,
    )
    state = random_state(settings.model, Stage(), optimizer, mesh)
    host = work.full_batch(settings.model, settings.rows * mesh.size)
    batch = jax.tree.map(lambda x: place_whole(x, rows(mesh)), host)
    start = time.perf_counter()
    program = compile_step(step, state, batch, None)
    compiled_s = time.perf_counter() - start
    losses: list[float] = []

    def once() -> Any:
        nonlocal state
        state, told = program(state, batch, None)
        losses.append(float(told.loss))
        return told

    seconds_of(once, _WARM_UP)
    taken_s = seconds_of(once, settings.steps)
    start = time.perf_counter()
    for _ in range(settings.steps):  # as a run does it: dispatched ahead, told a step later
        state, told = program(state, batch, None)
    jax.block_until_ready(told)
    step_s = (time.perf_counter() - start) / settings.steps
    done = work_of(host, work.CLIP_S, settings.model)

    def few() -> Any:
        nonlocal state
        for _ in range(_TRACED):
            state, told = program(state, batch, None)
        return told

    return {
        "work": f"{settings.rows} x {work.CLIP_S} s on each of {mesh.size}",
        "weights": f"cut over {mesh.shape[CUT]}, gathered once a {compute.gather}",
        "processes": jax.process_count(),
        **_speeds(done, step_s, mesh.size),
        **spread(taken_s),
        **(collective_times(few, _TRACED) if mesh.size > 1 else {}),
        **_padding(done),
        "compiler GiB": compiled_bytes(program.memory_analysis()) / _GIB,
        "peak so far GiB": (peak_bytes() or 0) / _GIB,
        "compiled s": compiled_s,
        "loss from": losses[0],
        "loss to": losses[-1],
    }


def against_plain_attention(settings: Settings) -> Row:
    """The loss of a few rows, by the run's attention and by XLA's: they agree within 1e-2."""
    mesh = local_mesh()
    compute = step_compute(Config(compute=settings.compute))
    batch = work.full_batch(settings.model, _ORACLE_ROWS * mesh.size)
    trained, frozen = split(init_params(settings.model, jax.random.key(0)), Stage())
    total = jnp.asarray(batch.in_loss_BX.sum(), jnp.float32)
    found = {}
    for kernel in dict.fromkeys((compute.kernel, "xla")):
        step = Step(
            settings.model,
            replace(compute, kernel=kernel),
            work.AUGMENT,
            _optimizer(settings),
            mesh,
            audio_s=work.CLIP_S,
        )
        loss = jax.jit(partial(micro_loss, step=step))(trained, frozen, batch, None, total)
        found[kernel] = float(loss)
    apart = abs(found[compute.kernel] - found["xla"])
    if apart > 1e-2:
        raise AssertionError(f"losses by {compute.kernel} and xla attention are {found}")
    return {"attention": compute.kernel, "loss": found[compute.kernel], "apart from xla": apart}


def mix(settings: Settings, folder: Path, say: Callable[[str], None]) -> Row:
    """A run's own steps over the mix of lengths: shards on disk with cold caches, plan, threads.

    Args:
      folder: for the shards and the files of a run; needs 2 GB for 40 steps.
    """
    setup = _open_mix(settings, folder, say)
    part = setup.parts[0]
    start = time.perf_counter()
    programs = compile_steps(
        setup,
        setup.parts,
        lambda part, bucket, program: say(
            f"compiled {bucket.rows} x {bucket.audio_s} s after {time.perf_counter() - start:.0f} s"
        ),
    )
    compiled_s = time.perf_counter() - start
    stage = part.stage
    state = random_state(setup.model, stage, part.optimizer, setup.mesh)
    lines: list[Any] = []
    with CheckpointStore(folder / "run", keep_last=1, keep_best=0, warn=say) as store:
        run = Run(
            setup,
            folder,
            store,
            StopSignal(),
            None,
            lines.append,
            lambda line: None,
            say,
            programs,
        )
        trainee = Trainee(state, 0, 0, 0, 0, Window(setup.mesh.size))
        drop_from_cache(folder / "shards")
        with stream(part.feed, epochs=1 << 20) as batches:
            for _ in range(settings.steps):
                one_step(run, trainee, next(batches))
            warm = programs_compiled()
            for _ in range(settings.steps + 1):
                one_step(run, trainee, next(batches))
            if programs_compiled() > warm:
                raise AssertionError(
                    f"{programs_compiled() - warm} programs compiled while steps ran"
                )
        tell_pending(run, trainee)
    told = [line for line in lines if "audio_s_per_s" in line][-1]
    tflops = told["tflops"]
    return {
        "work": f"the mix, {settings.mix_audio_s:.0f} s a step on each of {setup.mesh.size}",
        "audio-s/s": told["audio_s_per_s"],
        "TFLOP/s": tflops,
        "% of 989": 100 * tflops / DATASHEET_TFLOPS,
        "encoder padding %": 100 * told["padding_audio"],
        "decoder padding %": 100 * told["padding_text"],
        "data wait %": 100 * told["data_wait_share"],
        "peak so far GiB": (peak_bytes() or 0) / _GIB,
        "buckets": len(part.feed.buckets),
        "compiled s": compiled_s,
    }


def matrix_product() -> Row:
    """What a product of matrices reaches here and now."""
    size = 8192 if jax.default_backend() == "gpu" else 1024
    tflops = product_tflops(size)
    return {
        "work": f"{size} x {size} x {size}",
        "TFLOP/s": tflops,
        "% of 989": 100 * tflops / DATASHEET_TFLOPS,
    }


def random_state(model: ModelConfig, stage: Stage, optimizer: Any, mesh: Any) -> TrainState:
    """The state before step 1 with random weights, on the mesh as the sharding table says."""

    def make() -> TrainState:
        return init_state(*split(init_params(model, jax.random.key(0)), stage), optimizer)

    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def _open_mix(settings: Settings, folder: Path, say: Callable[[str], None]) -> Setup:
    devices = settings.compute.devices or jax.device_count()
    step_s = settings.mix_audio_s * devices
    written_s = write_mix(folder / "shards", step_s * (2 * settings.steps + 2))
    say(f"{written_s:,.0f} s of audio in shards")
    (folder / "model").mkdir()
    work.write_model_files(settings.model, folder / "model")
    config = mix_config(
        folder / "model",
        folder / "shards",
        step_s,
        settings.buckets,
        work.AUGMENT,
        settings.compute,
    )
    config = replace(
        config,
        data=replace(config.data, join_share=settings.join_share),
        train=replace(config.train, log_steps=settings.steps),
        optim=settings.optim,
    )
    return set_up(config, folder / "files", folder / "quarantine.jsonl")


def _optimizer(settings: Settings) -> Any:
    stage = Stage()
    shapes = jax.eval_shape(partial(init_params, settings.model), jax.random.key(0))
    return make_optimizer(settings.optim, stage, split_shapes(shapes, stage)[0], 1000)


def _speeds(done: Work, step_s: float, devices: int) -> Row:
    tflops = done.flops / step_s / devices / 1e12
    return {
        "audio-s/s": done.audio_s / step_s,
        "TFLOP/s": tflops,
        "% of 989": 100 * tflops / DATASHEET_TFLOPS,
    }


def _padding(done: Work) -> Row:
    return {
        "encoder padding %": 100 * (1 - done.frames / done.frames_computed),
        "decoder padding %": 100 * (1 - done.positions / done.positions_computed),
    }

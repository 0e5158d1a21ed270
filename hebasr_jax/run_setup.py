"""What a run is made of before its first step: model files, data, plan, mesh, programs, state."""

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hebasr_jax.augment import load_noise
from hebasr_jax.config import ModelConfig, layout_of, read_config
from hebasr_jax.data.clips import ClipSet, synthetic_warnings
from hebasr_jax.data.pipeline import empty_batch, make_feed
from hebasr_jax.data.plan import Bucket, plan_fingerprint
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.data.sources import open_sources, refuse_absent
from hebasr_jax.distributed import on_first, place_whole
from hebasr_jax.errors import UserError
from hebasr_jax.export import new_folder
from hebasr_jax.hub import ModelFolder
from hebasr_jax.model.asr import Params, abstract_params
from hebasr_jax.model.attention import pick_kernel
from hebasr_jax.model.layers import Compute
from hebasr_jax.optim import group_rates, split
from hebasr_jax.overlap import trained_on
from hebasr_jax.paths import flat
from hebasr_jax.run_config import Config
from hebasr_jax.sharding import make_mesh, replicated, shardings
from hebasr_jax.stages import Part, make_parts, state_shapes
from hebasr_jax.text import TextTokenizer
from hebasr_jax.timestamps import add_stamp_tokens
from hebasr_jax.train_step import Step, TrainState, compile_step, init_state
from hebasr_jax.transcribe import open_model
from hebasr_jax.weights import load_params


@dataclass(frozen=True, eq=False)
class Setup:
    """All that stays the same while a run trains.

    source: the model folder that training starts from; tokenizer_sha256 is of its tokenizer.
    files: a folder of the run's own with config and tokenizer files.
    shapes: of the model's parameters. parts: the stages.
    remarks: lines for the user on the data: lists with ids of other sets, dev clips in training.
    """

    config: Config
    source: ModelFolder
    files: Path
    model: ModelConfig
    tokenizer: TextTokenizer
    tokenizer_sha256: str
    compute: Compute
    mesh: Mesh
    shapes: Params
    sets: tuple[ClipSet, ...]
    left_out: dict[str, dict[str, int]]
    dev_sets: tuple[ClipSet, ...]
    quarantine: Quarantine
    parts: tuple[Part, ...]
    noise_NS: Any
    remarks: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.parts[-1].last


def set_up(config: Config, files: Path, quarantine_path: Path, *, fresh: bool = True) -> Setup:
    """Opens the model and the data and plans the run; no weights are read.

    A stage's epochs have the steps of its first one: speeds and joins are drawn anew in each, so
    that others may differ by a few.

    Args:
      files: where the model's config and tokenizer files are copied, with time-stamp tokens if
        the config trains with them.
      fresh: what an earlier try left in these two places is not kept.
    """
    mesh = make_mesh(config.compute.devices, config.compute.cut_over)
    compute = compute_of(config)
    source, model, _, original = open_model(config.model.path, revision=config.model.revision)
    stamps = config.text.stamp_share > 0

    def lay_out() -> None:
        if fresh:
            shutil.rmtree(files, ignore_errors=True)
            quarantine_path.unlink(missing_ok=True)
        if not files.exists():
            copy_model_files(source.path, files, model, stamps)

    on_first(lay_out)
    _, _, _, tokenizer = open_model(str(files))
    if not config.data.train:
        raise UserError("there is nothing to train on", "data.train names no set")
    data = config.data
    refuse_absent([*data.train, *data.dev, *data.test])  # not after days, at the first test
    sets, dev_sets = open_sources(data.train), open_sources(data.dev)
    quarantine = open_quarantine([*sets, *dev_sets], config, quarantine_path)
    shapes = abstract_params(model)
    feed = make_feed(sets, tokenizer, config, quarantine, row_multiple(mesh))
    noise = load_noise(config.augment.noise_path) if config.augment.noise_share else None
    return Setup(
        config=config,
        source=source,
        files=files,
        model=model,
        tokenizer=tokenizer,
        tokenizer_sha256=sha256_of(original),
        compute=compute,
        mesh=mesh,
        shapes=shapes,
        sets=feed.sets,
        left_out=feed.left_out,
        dev_sets=tuple(dev_sets),
        quarantine=quarantine,
        parts=make_parts(config, feed, shapes, row_multiple(mesh)),
        noise_NS=None if noise is None else place_whole(noise, replicated(mesh)),
        remarks=tuple(remarks_on(sets, dev_sets, open_sources(data.test))),
    )


def remarks_on(
    train: Sequence[ClipSet], dev: Sequence[ClipSet], test: Sequence[ClipSet]
) -> list[str]:
    """What the user should know of the data before a run, a line each."""
    notes = (f"{one.name}: {note}" for one in (*train, *dev, *test) for note in one.notes)
    warnings = [*synthetic_warnings(dev), *trained_on(train, [*dev, *test])]
    return [*dict.fromkeys(notes), *(f"warning: {line}" for line in warnings)]


def open_quarantine(sets: Sequence[ClipSet], config: Config, path: Path) -> Quarantine:
    """The run's list of bad clips, with those that were bad when the sets were opened."""
    total = sum(len(s.clips) + len(s.bad) for s in sets)
    quarantine = Quarantine(path, config.data.max_bad_share, total)
    quarantine.add_rows(sets)
    return quarantine


def compute_of(config: Config) -> Compute:
    """How the run computes; a kernel that was asked for and cannot be had is an error."""
    dtype = jnp.dtype(config.compute.dtype)
    try:
        kernel = pick_kernel(config.compute.attention, dtype, jax.default_backend())
    except ValueError as error:
        raise UserError(str(error)) from None
    return Compute(dtype, kernel, config.compute.remat)


def step_compute(config: Config) -> Compute:
    """How a training step computes: as the rest of the run, perhaps with its layers unrolled."""
    return replace(compute_of(config), unroll=config.compute.unroll)


def copy_model_files(source: Path, files: Path, model: ModelConfig, stamps: bool) -> None:
    """A model's config and tokenizer files without its weights, with stamp tokens if asked for."""
    with new_folder(files) as folder:
        for path in sorted(source.iterdir()):
            if path.suffix in (".json", ".txt", ".jinja") and "safetensors" not in path.name:
                shutil.copyfile(path, folder / path.name)
        if stamps:
            add_stamp_tokens(folder, model.decoder.vocab_size)


def sha256_of(tokenizer: TextTokenizer) -> str:
    """Changes with anything that the tokenizer does."""
    return hashlib.sha256(tokenizer.full.to_str().encode()).hexdigest()


def fixed_facts(setup: Setup) -> dict[str, Any]:
    """What a resumed run must find as it was, besides its config."""
    data, augment = setup.config.data, setup.config.augment
    plans = {
        part.stage.name: plan_fingerprint(
            part.feed.table, part.feed.buckets, data, augment, part.feed.config.seed
        )
        for part in setup.parts
    }
    facts = {
        "data": {s.name: s.fingerprint for s in (*setup.sets, *setup.dev_sets)},
        "plan": plans,
        "model": {path: list(leaf.shape) for path, leaf in flat(setup.shapes).items()},
        "tokenizer": setup.tokenizer_sha256,
    }
    if data.batch_audio_s:  # named before the plan, whose hash alone would tell a user nothing
        facts["devices make the rows of a batch a multiple of"] = row_multiple(setup.mesh)
    return facts


def row_multiple(mesh: Mesh) -> int:
    """What the rows of a batch are a multiple of, so that devices and most counts share them."""
    return math.lcm(8, mesh.size)


def load_state(setup: Setup) -> TrainState:
    """The state before step 1, on the mesh: float32 weights from the source folder, no moments."""
    folder, part = setup.source.path, setup.parts[0]
    layout = layout_of(read_config(folder))
    params = load_params(folder, setup.model, layout, dtype=np.float32, place=np.asarray)
    trained, frozen = (place_tree(tree, setup.mesh) for tree in split(params, part.stage))
    places = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(part, setup.shapes, setup.mesh))
    start = jax.jit(
        lambda t, f: init_state(t, f, part.optimizer), out_shardings=places, donate_argnums=(0, 1)
    )
    return start(trained, frozen)


def place_tree(tree: Params, mesh: Mesh) -> Params:
    """A host tree on the mesh, as the sharding table says."""
    return jax.tree.map(place_whole, tree, shardings(tree, mesh))


def step_for(setup: Setup, part: Part, bucket: Bucket) -> Step:
    """The step of a stage's bucket, cut into micro-batches that fit `data.micro_audio_s`."""
    config, devices = setup.config, setup.mesh.size
    if bucket.rows % devices:
        raise UserError(
            f"batches of {bucket.rows} rows cannot be spread over {devices} devices",
            "each device takes the same number of rows",
            "set data.batch_clips (or data.batch_audio_s) to suit them, or compute.devices",
        )
    each = bucket.rows // devices
    fits = [
        n
        for n in range(1, each + 1)
        if not each % n and each // n * bucket.audio_s <= config.data.micro_audio_s
    ]
    return Step(
        model=setup.model,
        compute=step_compute(config),
        augment=config.augment,
        optimizer=part.optimizer,
        rates=partial(group_rates, config=part.optim, stage=part.stage, steps=part.schedule_steps),
        mesh=setup.mesh,
        audio_s=bucket.audio_s,
        micro_batches=fits[0] if fits else each,
        loss_rows=config.compute.loss_rows,
        gather=config.compute.gather,
    )


def compile_steps(
    setup: Setup, parts: Sequence[Part], told: Callable[[Part, Bucket, Any], None]
) -> dict[tuple[str, Bucket], Any]:
    """Every bucket's program in these stages, by stage and bucket.

    In parallel threads; not so on GPUs of several processes, where XLA shares out its trials of
    kernels among the processes.

    Args:
      told: called with each stage, bucket and program when it is ready.
    """

    def one(job: tuple[Part, Bucket]) -> Any:
        part, bucket = job
        host = empty_batch(bucket, setup.config.augment, bucket.rows)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), host)
        state = state_shapes(part, setup.shapes, setup.mesh)
        compiled = compile_step(step_for(setup, part, bucket), state, batch, setup.noise_NS)
        told(part, bucket, compiled)
        return compiled

    jobs = [(part, bucket) for part in parts for bucket in part.feed.buckets]
    on_gpu = 4 if jax.process_count() == 1 else 1
    workers = 8 if jax.default_backend() == "cpu" else on_gpu
    with ThreadPoolExecutor(workers) as pool:
        programs = list(pool.map(one, jobs))
    return {(p.stage.name, b): program for (p, b), program in zip(jobs, programs, strict=True)}

"""What a run is made of before its first step: model files, data, plan, mesh, programs, state."""

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hebasr_jax.augment import load_noise
from hebasr_jax.config import ModelConfig, layout_of, read_config
from hebasr_jax.data.clips import ClipSet
from hebasr_jax.data.pipeline import Feed, empty_batch, make_feed
from hebasr_jax.data.plan import Bucket, plan_fingerprint
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.data.sources import open_sources
from hebasr_jax.distributed import on_first, place_whole
from hebasr_jax.errors import UserError
from hebasr_jax.export import new_folder
from hebasr_jax.model.asr import Params, abstract_params
from hebasr_jax.model.attention import pick_kernel
from hebasr_jax.model.layers import Compute
from hebasr_jax.optim import check_groups, make_optimizer, split, split_shapes
from hebasr_jax.paths import flat
from hebasr_jax.run_config import Config
from hebasr_jax.sharding import make_mesh, replicated, shardings
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
    steps: optimiser steps of the whole run; epoch_steps: of its first epoch.
    """

    config: Config
    source: Path
    files: Path
    model: ModelConfig
    tokenizer: TextTokenizer
    tokenizer_sha256: str
    compute: Compute
    mesh: Mesh
    feed: Feed
    dev_sets: tuple[ClipSet, ...]
    steps: int
    epoch_steps: int
    optimizer: optax.GradientTransformation
    noise_NS: Any


def set_up(config: Config, files: Path, quarantine_path: Path, *, fresh: bool = True) -> Setup:
    """Opens the model and the data and plans the run; no weights are read.

    An epoch's steps are those of the first epoch: speeds and joins are drawn anew in each, so
    that others may differ by a few.

    Args:
      files: where the model's config and tokenizer files are copied, with time-stamp tokens if
        the config trains with them.
      fresh: what an earlier try left in these two places is not kept.
    """
    mesh = make_mesh(config.compute.devices)
    compute = compute_of(config)
    source, model, _, original = open_model(config.model.path, revision=config.model.revision)
    stamps = config.text.stamp_share > 0

    def lay_out() -> None:
        if fresh:
            shutil.rmtree(files, ignore_errors=True)
            quarantine_path.unlink(missing_ok=True)
        if not files.exists():
            copy_model_files(source.path, files, model, stamps)

    on_first(lay_out, "model files")
    _, _, _, tokenizer = open_model(str(files))
    check_groups(abstract_params(model), config.optim)
    if not config.data.train:
        raise UserError("there is nothing to train on", "data.train names no set")
    sets, dev_sets = open_sources(config.data.train), open_sources(config.data.dev)
    quarantine = open_quarantine([*sets, *dev_sets], config, quarantine_path)
    feed = make_feed(sets, tokenizer, config, quarantine, math.lcm(8, mesh.size))
    epoch_steps = len(feed.plan(0))
    steps = config.train.steps or config.train.epochs * epoch_steps
    trained, _ = split_shapes(abstract_params(model), config.optim)
    noise = load_noise(config.augment.noise_path) if config.augment.noise_share else None
    return Setup(
        config=config,
        source=source.path,
        files=files,
        model=model,
        tokenizer=tokenizer,
        tokenizer_sha256=sha256_of(original),
        compute=compute,
        mesh=mesh,
        feed=feed,
        dev_sets=tuple(dev_sets),
        steps=steps,
        epoch_steps=epoch_steps,
        optimizer=make_optimizer(config.optim, trained, steps),
        noise_NS=None if noise is None else place_whole(noise, replicated(mesh)),
    )


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
    feed, config = setup.feed, setup.config
    shapes = flat(abstract_params(setup.model))
    return {
        "data": {s.name: s.fingerprint for s in (*feed.sets, *setup.dev_sets)},
        "plan": plan_fingerprint(
            feed.table, feed.buckets, config.data, config.augment, config.seed
        ),
        "model": {path: list(leaf.shape) for path, leaf in shapes.items()},
        "tokenizer": setup.tokenizer_sha256,
    }


def load_state(setup: Setup) -> TrainState:
    """The state before step 1, on the mesh: float32 weights from the source folder, no moments."""
    layout = layout_of(read_config(setup.source))
    params = load_params(setup.source, setup.model, layout, dtype=np.float32, place=np.asarray)
    trained, frozen = (place_tree(tree, setup.mesh) for tree in split(params, setup.config.optim))
    places = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(setup))
    start = jax.jit(
        lambda t, f: init_state(t, f, setup.optimizer), out_shardings=places, donate_argnums=(0, 1)
    )
    return start(trained, frozen)


def state_shapes(setup: Setup) -> TrainState:
    """Shapes and shardings of the state, to compile for or to restore onto."""
    trained, frozen = split_shapes(abstract_params(setup.model), setup.config.optim)
    shapes = jax.eval_shape(lambda t, f: init_state(t, f, setup.optimizer), trained, frozen)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings(shapes, setup.mesh),
    )


def place_tree(tree: Params, mesh: Mesh) -> Params:
    """A host tree on the mesh, as the sharding table says."""
    return jax.tree.map(place_whole, tree, shardings(tree, mesh))


def step_for(setup: Setup, bucket: Bucket) -> Step:
    """The step of one bucket, cut into micro-batches that fit `compute.micro_audio_s`."""
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
        compute=setup.compute,
        augment=config.augment,
        optimizer=setup.optimizer,
        mesh=setup.mesh,
        audio_s=bucket.audio_s,
        micro_batches=fits[0] if fits else each,
        loss_rows=config.compute.loss_rows,
        gather=config.compute.gather,
    )


def compile_steps(
    setup: Setup, state: TrainState, told: Callable[[Bucket, Any], None]
) -> dict[Bucket, Any]:
    """Every bucket's program, compiled ahead of step 1 in parallel threads.

    Args:
      told: called with each bucket and its program when it is ready.
    """

    def one(bucket: Bucket) -> Any:
        host = empty_batch(bucket, setup.config.augment, bucket.rows)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), host)
        compiled = compile_step(step_for(setup, bucket), state, batch, setup.noise_NS)
        told(bucket, compiled)
        return compiled

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(setup.feed.buckets, pool.map(one, setup.feed.buckets), strict=True))

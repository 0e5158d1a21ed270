"""One optimiser step: a pure function from state and batch to state and metrics.

batch (int16 waves, token ids)
  -> augmented waves -> log-mel -> SpecAugment -> model -> loss    for each micro-batch
  -> gradients, added in float32 -> clip -> optimiser -> new state, unless something is not finite
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.extend.mlir import ir
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.augment import augment_wave, mask_features
from hebasr_jax.config import ModelConfig
from hebasr_jax.data.clips import Batch
from hebasr_jax.features import log_mel
from hebasr_jax.loss import next_token_loss
from hebasr_jax.model.asr import Inputs, Params, bind
from hebasr_jax.model.layers import Compute
from hebasr_jax.paths import flat, is_stacked, nested
from hebasr_jax.run_config import Augment
from hebasr_jax.sharding import ROWS, replicated, rows, shardings

# So steps repeat bit for bit whatever kernels are chosen; and XLA's trials leave out convolutions
# with atomic sums, one of which took 6 s a time: compiled in 16 s, not 50 (docs/performance.md).
_OPTIONS = {"gpu": {"xla_gpu_exclude_nondeterministic_ops": True}}
_BACKWARD = "__cudnn$fmhaSoftmaxBackward"


@struct.dataclass
class TrainState:
    """All that a step changes or needs; saved whole in a checkpoint.

    Fields hold arrays, or their shapes or shardings; hence `Any`.

    step: int32, optimiser steps taken, skipped ones included.
    trained: float32 master weights; of a cut stack its last layers.
    frozen: the other weights, also float32.
    moments: the optimiser's state, of `trained` only.
    """

    step: Any
    trained: Any
    frozen: Any
    moments: Any


@struct.dataclass
class StepMetrics:
    """What a step tells.

    loss: mean over the batch's target tokens, in nats.
    tokens: target tokens.
    grad_norm: global, before clipping.
    skipped: loss or gradient was not finite; weights and moments are as before.
    rates: of each group, as this step applied them.
    """

    loss: Any
    tokens: Any
    grad_norm: Any
    skipped: Any
    rates: Any


@dataclass(frozen=True)
class Step:
    """What is fixed for a compiled step.

    audio_s: the bucket's length after speed perturbation, in seconds.
    micro_batches: parts that the batch's rows are cut into; their gradients are added.
    loss_rows: see `loss.next_token_loss`.
    rates: from the optimiser's state to the rate of each group in this step, to be told.
    gather: weights are gathered whole once a step, or each layer when it runs.
    """

    model: ModelConfig
    compute: Compute
    augment: Augment
    optimizer: optax.GradientTransformation
    mesh: Mesh
    audio_s: int
    micro_batches: int = 1
    loss_rows: int | None = None
    rates: Callable[[Any], dict[str, Array]] = lambda state: {}
    gather: str = "step"


def init_state(trained: Params, frozen: Params, optimizer: optax.GradientTransformation) -> Any:
    """The state before step 1; `trained` must be float32."""
    return TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained))


def train_step(
    state: TrainState, batch: Batch, noise_NS: Array | None, *, step: Step
) -> tuple[TrainState, StepMetrics]:
    """One step. Under jit, donate `state`; see `compile_step`.

    The loss is the mean over all target tokens of the batch, whatever micro-batch or device they
    are on. A step whose loss or gradient is not finite changes nothing but `state.step`.
    """
    total = jnp.maximum(jnp.sum(batch.in_loss_BX), 1)
    placed = shardings(state.trained, step.mesh)
    weights, frozen = (cast(tree, step.compute.dtype) for tree in (state.trained, state.frozen))
    weights, frozen = (_gather(tree, step) for tree in (weights, frozen))

    def add(sums: tuple[Array, Params], micro: Batch) -> tuple[tuple[Array, Params], None]:
        loss, grads = jax.value_and_grad(micro_loss)(
            weights, frozen, micro, noise_NS, total, step=step
        )
        grads = jax.tree.map(lambda total, g: total + g.astype(jnp.float32), sums[1], grads)
        return (sums[0] + loss, jax.lax.with_sharding_constraint(grads, placed)), None

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), state.trained)
    parts = jax.tree.map(partial(_cut, parts=step.micro_batches), batch)
    (loss, grads), _ = jax.lax.scan(add, (jnp.zeros(()), zeros), parts)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, moments = step.optimizer.update(grads, state.moments, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        trained, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (trained, moments),
            (state.trained, state.moments),
        )
    new_state = TrainState(state.step + 1, trained, state.frozen, moments)
    rates = step.rates(state.moments)
    return new_state, StepMetrics(loss, jnp.sum(batch.in_loss_BX), norm, ~finite, rates)


def micro_loss(
    trained: Params,
    frozen: Params,
    batch: Batch,
    noise_NS: Array | None,
    total: Array,
    *,
    step: Step,
) -> Float[Array, ""]:
    """A micro-batch's part of the mean loss over `total` target tokens."""
    # Told to stay on each device's own rows: XLA would gather all rows for the Fourier transform.
    prepare = jax.shard_map(
        partial(
            prepare_inputs,
            augment=step.augment,
            audio_s=step.audio_s,
            mel_bins=step.model.encoder.mel_bins,
        ),
        mesh=step.mesh,
        in_specs=(ROWS, PartitionSpec()),
        out_specs=ROWS,
        check_vma=False,
    )
    inputs = prepare(batch, noise_NS)
    spread = replace(step.compute, mesh=step.mesh, by_layer=step.gather == "layer")
    asr = bind(trained, step.model, spread, frozen)
    loss, _ = next_token_loss(asr, inputs, batch.in_loss_BX, rows=step.loss_rows)
    return loss / total


def prepare_inputs(
    batch: Batch, noise_NS: Array | None, *, augment: Augment, audio_s: int, mel_bins: int
) -> Inputs:
    """Augmented features of a batch, with its text. The default `Augment()` changes nothing."""
    with jax.named_scope("augment_wave"):
        wave_BS, samples_B = augment_wave(
            batch.wave_BS,
            batch.samples_B,
            batch.speed_B,
            batch.seed_B2,
            augment,
            noise_NS,
            out_samples=audio_s * SAMPLE_RATE,
        )
    with jax.named_scope("features"):
        mel_BTM, frames_B = log_mel(wave_BS, samples_B, mel_bins=mel_bins)
    with jax.named_scope("mask_features"):
        mel_BTM = mask_features(mel_BTM, frames_B, batch.seed_B2, augment)
    return Inputs(mel_BTM, frames_B, batch.text_BX, batch.text_lengths_B, batch.audio_at_B)


def cast(params: Params, dtype: Any) -> Params:
    """Weights as they enter products: matrices in the compute dtype, vectors as they are.

    Done while they are still cut over the devices, so that half as many bytes are gathered.
    """
    return nested(
        {
            path: leaf.astype(dtype) if leaf.ndim - is_stacked(path) > 1 else leaf
            for path, leaf in flat(params).items()
        }
    )


def _gather(params: Params, step: Step) -> Params:
    """Weights whole on every device; of stacks only where they are not gathered layer by layer."""
    leaves = flat(params)
    now = {path: w for path, w in leaves.items() if step.gather == "step" or not is_stacked(path)}
    return nested(leaves | jax.lax.with_sharding_constraint(now, replicated(step.mesh)))


def _cut(x_B: Array, parts: int) -> Array:
    """[B, ...] to [parts, B / parts, ...], each part taking rows of every device."""
    return x_B.reshape(x_B.shape[0] // parts, parts, *x_B.shape[1:]).swapaxes(0, 1)


def trace_step(step: Step, state: TrainState, batch: Batch, noise_NS: Any) -> Any:
    """The step of one bucket, traced; the memory of the state is reused for the new state.

    Args:
      state, batch, noise_NS: arrays or shapes.
    """
    whole = replicated(step.mesh)
    placed = jax.tree.map(lambda _: whole, noise_NS)
    over_state = shardings(state, step.mesh)
    over_batch = jax.tree.map(lambda _: rows(step.mesh), batch)
    return jax.jit(
        partial(train_step, step=step),
        in_shardings=(over_state, over_batch, placed),
        out_shardings=(over_state, whole),
        donate_argnums=0,
    ).trace(state, batch, noise_NS)


def compile_step(step: Step, state: TrainState, batch: Batch, noise_NS: Any) -> Any:
    """The step compiled ahead of time for one bucket; call it with (state, batch, noise_NS)."""
    lowered = trace_step(step, state, batch, noise_NS).lower()
    mark_attention(lowered.compiler_ir())
    return lowered.compile(_OPTIONS.get(step.mesh.devices.flat[0].platform))


def mark_attention(module: ir.Module) -> None:
    """Asks for the deterministic kernel in each of cuDNN's backward attentions of a program.

    With `_OPTIONS` XLA asks for it too, but of equal ones only in the first, and then does not
    find the others' (openxla/xla#46500): unrolled layers, a stack that `trained_layers` cuts.
    Of attention outside `shard_map` XLA makes such calls by itself, later, where rows are spread.
    """

    def mark(op: ir.Operation) -> ir.WalkResult:
        is_call = op.name == "stablehlo.custom_call"
        if is_call and ir.StringAttr(op.attributes["call_target_name"]).value == _BACKWARD:
            config = json.loads(ir.StringAttr(op.attributes["backend_config"]).value)
            config["cudnn_fmha_backend_config"]["force_deterministic"] = True
            op.attributes["backend_config"] = ir.StringAttr.get(json.dumps(config))
        return ir.WalkResult.ADVANCE

    with module.context:
        module.operation.walk(mark)

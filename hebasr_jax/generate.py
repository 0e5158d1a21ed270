"""Greedy decoding with a key/value cache: prefill and loop are one program per shape.

The cache of a layer is one array for keys and one for values, [B, L + G, K, H]: the first L slots
hold the right-padded prompt, slot L + g the g-th new token of every row. All rows write at the
same slot, so a step updates the cache in place; what a row may attend to is `_valid_slots`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hebasr_jax.config import ModelConfig
from hebasr_jax.features import log_mel
from hebasr_jax.model.asr import Asr, Inputs, Params, bind
from hebasr_jax.model.attention import attend_cache
from hebasr_jax.model.layers import Compute


@struct.dataclass
class Generated:
    """Decoded rows.

    tokens_BG: new tokens, 0 behind each row's end; the end token itself is not kept.
    lengths_B: tokens of each row.
    finished_B: the row ended by itself. False: its budget ran out, and text may be missing.
    """

    tokens_BG: Int[Array, "B G"]
    lengths_B: Int[Array, " B"]
    finished_B: Bool[Array, " B"]


@struct.dataclass
class _Loop:
    step: Int[Array, ""]
    token_B: Int[Array, " B"]  # chosen, not yet written to tokens_BG
    tokens_BG: Int[Array, "B G"]
    lengths_B: Int[Array, " B"]
    finished_B: Bool[Array, " B"]
    caches: tuple[tuple[Array, Array], ...]  # keys and values of each layer


@struct.dataclass
class Clips:
    """Clips and their prompts, all rows right-padded; see `asr.Inputs` for the text fields."""

    wave_BS: Array
    samples_B: Int[Array, " B"]
    text_BX: Int[Array, "B X"]
    text_lengths_B: Int[Array, " B"]
    audio_at_B: Int[Array, " B"]


@partial(jax.jit, static_argnames=("config", "compute", "end_ids", "max_new_tokens"))
def generate_from_wave(
    params: Params,
    clips: Clips,
    budget_B: Int[Array, " B"],
    *,
    config: ModelConfig,
    compute: Compute,
    end_ids: tuple[int, ...],
    max_new_tokens: int,
) -> Generated:
    """Features, prefill and decoding as one program; arguments as in `generate`."""
    with jax.named_scope("features"):
        mel_BTM, frames_B = log_mel(
            clips.wave_BS, clips.samples_B, mel_bins=config.encoder.mel_bins
        )
    inputs = Inputs(
        mel_BTM, frames_B, clips.text_BX, clips.text_lengths_B, audio_at_B=clips.audio_at_B
    )
    asr = bind(params, config, compute)
    return generate(asr, inputs, budget_B, end_ids=end_ids, max_new_tokens=max_new_tokens)


def generate(
    asr: Asr,
    inputs: Inputs,
    budget_B: Int[Array, " B"],
    *,
    end_ids: tuple[int, ...],
    max_new_tokens: int,
) -> Generated:
    """Greedy continuation of each row's prompt; a row's result never depends on its neighbours.

    Args:
      inputs: `text_BX` holds prompts only.
      budget_B: tokens each row may take, capped at `max_new_tokens`; 0 leaves a row empty.
      end_ids: tokens that end a row.
      max_new_tokens: G, the length of the output and of the cache's second part; at least 1.
    """
    budget_B = jnp.minimum(budget_B, max_new_tokens)
    x_BLD, prompt_B = asr.embed(inputs)
    with jax.named_scope("prefill"):
        x_BLD, kept = asr.decoder(x_BLD, prompt_B, keep_kv=True)
        last_B1D = jnp.take_along_axis(x_BLD, (prompt_B - 1)[:, None, None], axis=1)
        token_B = _best(asr, last_B1D)
    assert kept is not None
    room = ((0, 0), (0, max_new_tokens), (0, 0), (0, 0))
    start = _Loop(
        step=jnp.zeros((), jnp.int32),
        token_B=token_B,
        tokens_BG=jnp.zeros((len(budget_B), max_new_tokens), jnp.int32),
        lengths_B=jnp.zeros_like(budget_B),
        finished_B=jnp.zeros(budget_B.shape, bool),
        caches=tuple((jnp.pad(k, room), jnp.pad(v, room)) for k, v in zip(*kept, strict=True)),
    )
    layers = asr.decoder.unstacked()
    slots = x_BLD.shape[1] + max_new_tokens

    def running(loop: _Loop) -> Array:
        return ~loop.finished_B & (loop.step < budget_B)

    def body(loop: _Loop) -> _Loop:
        ends_B = jnp.isin(loop.token_B, jnp.asarray(end_ids))
        kept_B = running(loop) & ~ends_B
        finished_B = loop.finished_B | (running(loop) & ends_B)
        tokens_BG = loop.tokens_BG.at[:, loop.step].set(jnp.where(kept_B, loop.token_B, 0))
        slot = x_BLD.shape[1] + loop.step
        valid_BS = _valid_slots(slots, prompt_B, x_BLD.shape[1], slot)
        hidden_B1D, caches = _decode_one(
            asr, layers, loop.token_B, prompt_B + loop.step, slot, valid_BS, loop.caches
        )
        return _Loop(
            step=loop.step + 1,
            token_B=_best(asr, hidden_B1D),
            tokens_BG=tokens_BG,
            lengths_B=loop.lengths_B + kept_B,
            finished_B=finished_B,
            caches=caches,
        )

    with jax.named_scope("decode"):
        end = jax.lax.while_loop(lambda loop: jnp.any(running(loop)), body, start)
    return Generated(end.tokens_BG, end.lengths_B, end.finished_B)


def _decode_one(
    asr: Asr,
    layers: list[Any],
    token_B: Array,
    position_B: Array,
    slot: Array,
    valid_BS: Array,
    caches: tuple[tuple[Array, Array], ...],
) -> tuple[Float[Array, "B 1 D"], tuple[tuple[Array, Array], ...]]:
    """One new position of every row through all layers, unrolled: a scanned cache is copied."""
    x_B1D = asr.decoder.embed_text(token_B[:, None])
    angles = asr.decoder.angles(position_B[:, None])
    updated = []
    for layer, (keys, values) in zip(layers, caches, strict=True):

        def mix(q: Array, k: Array, v: Array, keys: Array = keys, values: Array = values) -> Any:
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k, slot, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v, slot, axis=1)
            return attend_cache(q, keys, values, valid_BS), (keys, values)

        x_B1D, cache = layer(x_B1D, angles, mix)
        updated.append(cache)
    return asr.decoder.norm(x_B1D), tuple(updated)


def _valid_slots(slots: int, prompt_B: Array, prompt_slots: int, newest: Array) -> Array:
    """Slots a row may attend to: its own prompt, and every new token up to the newest."""
    slot_S = jnp.arange(slots)
    return (slot_S < prompt_B[:, None]) | ((slot_S >= prompt_slots) & (slot_S <= newest))


def _best(asr: Asr, hidden_B1D: Array) -> Int[Array, " B"]:
    return jnp.argmax(asr.decoder.logits(hidden_B1D[:, 0]), axis=-1).astype(jnp.int32)

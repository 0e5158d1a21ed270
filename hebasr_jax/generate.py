"""Decoding with a key/value cache in slots: rows are filled, decoded together, and filled again.

The cache of a layer is one array for keys and one for values, [R, S, K, H]; a row's places hold
its prompt and then, one behind the other, what it wrote, and a place that is not written is never
read. Positions are rotated before they are stored.

    empty_slots -> fill (features, prefill, first token) -> decode -> fill the rows that ended ...

`generate` is the same without refilling. Every function here runs inside jit, on one device of
several (`decode` may ask the others how many of their rows still run).
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hebasr_jax.config import CHUNK_FRAMES, CHUNK_TOKENS, DecoderConfig
from hebasr_jax.model.asr import Asr, Inputs
from hebasr_jax.model.attention import attend_written

_PLACES = 64  # a cache's length is a multiple of it: what kernels read at a time
# Steps between two questions to the other devices: with one in each step it took 0.28 ms more
# (four H100), and in every step too many the rows that ended are idle.
_STEPS_TOGETHER = 4


@struct.dataclass
class Choice:
    """How a row's tokens are chosen.

    Fields hold arrays of numpy or JAX; hence `Any`.

    temperature_R: float32; 0 takes the best token, above one is drawn from
      softmax(logits / temperature).
    seed_R2: two uint32 words; the n-th draw of a row follows from them and n alone.
    """

    temperature_R: Any
    seed_R2: Any


@struct.dataclass
class Slots:
    """Rows that are decoded together.

    prompt_R: decoder positions of its prompt, audio included.
    token_R: its newest token, not yet fed to the decoder.
    length_R: tokens it has, the newest included; the end token is not kept.
    budget_R: most tokens it may draw, an end token among them; at most G.
    running_R: it goes on. A row that never was filled does not run.
    finished_R: it ended by itself. False once it stands still: its budget ran out.
    tokens_RG, logprobs_RG: what it wrote, and the log-probability of each token under the
      distribution that it was chosen from (temperature 1 where the best is taken); 0 behind.
    caches: keys and values of each layer.
    """

    prompt_R: Int[Array, " R"]
    token_R: Int[Array, " R"]
    length_R: Int[Array, " R"]
    budget_R: Int[Array, " R"]
    running_R: Bool[Array, " R"]
    finished_R: Bool[Array, " R"]
    tokens_RG: Int[Array, "R G"]
    logprobs_RG: Float[Array, "R G"]
    choice: Choice
    caches: tuple[tuple[Array, Array], ...]


def empty_slots(
    config: DecoderConfig, rows: int, prompt: int, budget: int, dtype: DTypeLike
) -> Slots:
    """R = `rows` slots for prompts of up to `prompt` positions and G = `budget` new tokens."""
    places = _PLACES * math.ceil((prompt + budget) / _PLACES)
    shape = (rows, places, config.kv_heads, config.head_dim)
    zeros_R = jnp.zeros(rows, jnp.int32)
    return Slots(
        prompt_R=zeros_R,
        token_R=zeros_R,
        length_R=zeros_R,
        budget_R=zeros_R,
        running_R=zeros_R > 0,
        finished_R=zeros_R > 0,
        tokens_RG=jnp.zeros((rows, budget), jnp.int32),
        logprobs_RG=jnp.zeros((rows, budget), jnp.float32),
        choice=greedy(rows),
        caches=tuple(
            (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)
        ),
    )


def greedy(rows: int) -> Choice:
    """The best token, always."""
    return Choice(jnp.zeros(rows, jnp.float32), jnp.zeros((rows, 2), jnp.uint32))


def fill(
    asr: Asr,
    slots: Slots,
    inputs: Inputs,
    row_M: Int[Array, " M"],
    budget_M: Int[Array, " M"],
    choice: Choice,
    *,
    end_ids: tuple[int, ...],
    sample: bool,
) -> Slots:
    """Puts M prompts into slots, with their first token; the other rows stay as they are.

    Args:
      inputs: prompts only, padded to no more positions than the cache has.
      row_M: slots to fill, all different; one that is R or more fills none.
      budget_M: most tokens of each; 0 leaves a row empty and standing.
      end_ids: tokens that end a row.
      sample: whether `choice` may ask for draws; False leaves them out of the program.
    """
    x_MLD, prompt_M = asr.embed(inputs)
    with jax.named_scope("prefill"):
        x_MLD, kept = asr.decoder(x_MLD, prompt_M, keep_kv=True)
        last_M1D = jnp.take_along_axis(x_MLD, (prompt_M - 1)[:, None, None], axis=1)
        zeros_M = jnp.zeros_like(prompt_M)
        token_M, logprob_M = _choose(asr, last_M1D, choice, zeros_M, sample)
    assert kept is not None
    ends_M = is_end(token_M, end_ids)
    some_M = budget_M > 0
    kept_M = some_M & ~ends_M
    first_G = jnp.arange(slots.tokens_RG.shape[1]) == 0

    def put(old: Array, new: Array) -> Array:
        return old.at[row_M].set(new.astype(old.dtype), mode="drop", unique_indices=True)

    def put_prompt(old: Array, new: Array) -> Array:
        return old.at[row_M, : new.shape[1]].set(new, mode="drop", unique_indices=True)

    new = Slots(
        prompt_R=prompt_M,
        token_R=token_M,
        length_R=kept_M.astype(jnp.int32),
        budget_R=budget_M,
        running_R=kept_M & (budget_M > 1),
        finished_R=some_M & ends_M,
        tokens_RG=jnp.where(first_G & kept_M[:, None], token_M[:, None], 0),
        logprobs_RG=jnp.where(first_G & kept_M[:, None], logprob_M[:, None], 0.0),
        choice=choice,
        caches=(),
    )
    filled = jax.tree.map(put, replace(slots, caches=()), new)
    with jax.named_scope("keep_prompts"):
        caches = tuple(
            (put_prompt(keys, k), put_prompt(values, v))
            for (keys, values), k, v in zip(slots.caches, *kept, strict=True)
        )
    return replace(filled, caches=caches)


def decode(
    asr: Asr,
    slots: Slots,
    leave: Int[Array, ""],
    *,
    end_ids: tuple[int, ...],
    sample: bool,
    together: tuple[str, ...] = (),
) -> Slots:
    """Decodes until no more than `leave` rows run; those that stand still are left alone.

    Args:
      together: mesh axes, inside `shard_map`: devices along them stop together, once none has more
        than `leave` rows running. They ask after every `_STEPS_TOGETHER` steps.
    """
    layers = asr.decoder.unstacked()
    budget = slots.tokens_RG.shape[1]

    def running(slots: Slots) -> Array:
        rows = jnp.sum(slots.running_R)
        return jax.lax.pmax(rows, together) if together else rows

    def body(carry: tuple[Slots, Array]) -> tuple[Slots, Array]:
        slots = jax.lax.fori_loop(
            0, _STEPS_TOGETHER if together else 1, lambda _, slots: step(slots), carry[0]
        )
        return slots, running(slots)

    def step(slots: Slots) -> Slots:
        position_R = jnp.maximum(slots.prompt_R + slots.length_R - 1, 0)
        written_R = jnp.where(slots.running_R, position_R + 1, 1)
        hidden_R1D, caches = _decode_one(
            asr, layers, slots.token_R, position_R, written_R, slots.caches
        )
        token_R, logprob_R = _choose(asr, hidden_R1D, slots.choice, slots.length_R, sample)
        ends_R = is_end(token_R, end_ids)
        kept_R = slots.running_R & ~ends_R
        newest_RG = (jnp.arange(budget) == slots.length_R[:, None]) & kept_R[:, None]
        length_R = slots.length_R + kept_R
        return replace(
            slots,
            token_R=jnp.where(kept_R, token_R, slots.token_R),
            length_R=length_R,
            running_R=kept_R & (length_R < slots.budget_R),
            finished_R=slots.finished_R | (slots.running_R & ends_R),
            tokens_RG=jnp.where(newest_RG, token_R[:, None], slots.tokens_RG),
            logprobs_RG=jnp.where(newest_RG, logprob_R[:, None], slots.logprobs_RG),
            caches=caches,
        )

    with jax.named_scope("decode"):
        return jax.lax.while_loop(lambda carry: carry[1] > leave, body, (slots, running(slots)))[0]


def is_end(tokens: Int[Array, "..."], end_ids: tuple[int, ...]) -> Bool[Array, "..."]:
    """Which tokens are one of these, of which there may be none.

    Without an array of them: handed to each device and, being empty, not used, it crashed XLA's
    compiler on several GPUs (Shardy's ManualComputationUnusedInputsPattern, jax 0.11.2).
    """
    ends = jnp.zeros(tokens.shape, bool)
    for end in end_ids:
        ends |= tokens == end
    return ends


def generate(
    asr: Asr,
    inputs: Inputs,
    budget_B: Int[Array, " B"],
    *,
    end_ids: tuple[int, ...],
    max_new_tokens: int,
    choice: Choice | None = None,
) -> Slots:
    """Continuations of B prompts at once; a row's result never depends on its neighbours.

    Args:
      inputs: `text_BX` holds prompts only.
      budget_B: tokens each row may take, capped at `max_new_tokens`; 0 leaves a row empty.
      end_ids: tokens that end a row.
      max_new_tokens: G, the length of the output; at least 1.
      choice: None takes the best token.
    """
    rows, text = inputs.text_BX.shape
    prompt = text + CHUNK_TOKENS * -(-inputs.mel_BTM.shape[1] // CHUNK_FRAMES)
    dtype = asr.decoder.compute.dtype
    slots = empty_slots(asr.decoder.config, rows, prompt, max_new_tokens, dtype)
    sample = choice is not None
    slots = fill(
        asr,
        slots,
        inputs,
        jnp.arange(rows),
        jnp.minimum(budget_B, max_new_tokens),
        choice or greedy(rows),
        end_ids=end_ids,
        sample=sample,
    )
    return decode(asr, slots, jnp.zeros((), jnp.int32), end_ids=end_ids, sample=sample)


def _choose(
    asr: Asr, hidden_R1D: Array, choice: Choice, n_R: Array, sample: bool
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """The next token of each row and its log-probability; `n_R` numbers the draw."""
    logits_RV = asr.decoder.logits(hidden_R1D[:, 0])
    if sample:
        drawn_R = choice.temperature_R > 0
        logits_RV = logits_RV / jnp.where(drawn_R, choice.temperature_R, 1.0)[:, None]
        noise_RV = jax.vmap(partial(_gumbel, size=logits_RV.shape[1]))(choice.seed_R2, n_R)
        scores_RV = logits_RV + jnp.where(drawn_R[:, None], noise_RV, 0.0)
    else:
        scores_RV = logits_RV
    token_R = jnp.argmax(scores_RV, axis=-1).astype(jnp.int32)
    chosen_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0]
    return token_R, chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)


def _gumbel(seed_2: Array, n: Array, *, size: int) -> Float[Array, " V"]:
    """Gumbel noise of a row's n-th draw: the largest of scores + noise is a sample of them."""
    key = jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), n)
    return jax.random.gumbel(key, (size,), jnp.float32)


def _decode_one(
    asr: Asr,
    layers: list[Any],
    token_R: Array,
    position_R: Array,
    written_R: Array,
    caches: tuple[tuple[Array, Array], ...],
) -> tuple[Float[Array, "R 1 D"], tuple[tuple[Array, Array], ...]]:
    """One new position of every row through all layers, unrolled: a scanned cache is copied.

    A row that stands still writes its last place again and attends to one place only: nobody
    reads what comes of it.
    """
    x_R1D = asr.decoder.embed_text(token_R[:, None])
    angles = asr.decoder.angles(position_R[:, None])
    row_R, kernel = jnp.arange(len(token_R)), asr.decoder.compute.kernel
    updated = []
    for layer, (keys, values) in zip(layers, caches, strict=True):

        def mix(q: Array, k: Array, v: Array, keys: Array = keys, values: Array = values) -> Any:
            keys, values = (
                cache.at[row_R, position_R].set(new[:, 0], mode="drop", unique_indices=True)
                for cache, new in ((keys, k), (values, v))
            )
            return attend_written(q, keys, values, written_R, kernel), (keys, values)

        x_R1D, cache = layer(x_R1D, angles, mix)
        updated.append(cache)
    return asr.decoder.norm(x_R1D), tuple(updated)

"""Beam search over a shared cache: hypotheses change parents, keys and values never move.

The cache of a layer is [B, L + G * W, K, H]: L slots with the row's right-padded prompt, once for
all its beams, then W slots for each new position. A hypothesis knows which slot of each position
is its own, and its query attends to those (tree attention). So a change of parents reorders a
table of small integers, and all beams of a row read the row's cache together.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hebasr_jax.generate import is_end
from hebasr_jax.model.asr import Asr, Inputs
from hebasr_jax.model.attention import attend_cache


@struct.dataclass
class Beams:
    """The best hypotheses of each row, best first.

    tokens_BWG: new tokens, 0 behind each hypothesis' end; the end token itself is not kept.
    lengths_BW: tokens of each hypothesis.
    scores_BW: sum of log-probabilities / length ** length_penalty, where both the sum and the
      length count the end token; -inf: there is no such hypothesis, the others were all.
    finished_BW: the hypothesis ended by itself. False: the row's budget cut it.
    """

    tokens_BWG: Int[Array, "B W G"]
    lengths_BW: Int[Array, "B W"]
    scores_BW: Float[Array, "B W"]
    finished_BW: Bool[Array, "B W"]


@struct.dataclass
class _Search:
    """Live hypotheses, best first, all of them `step` tokens long, and the best that are done."""

    step: Int[Array, ""]
    open_B: Bool[Array, " B"]  # a live hypothesis may still become one of the best
    hidden_BWD: Float[Array, "B W D"]  # final hidden states at their newest tokens
    logprobs_BW: Float[Array, "B W"]  # sums over their tokens; -inf: no such hypothesis
    tokens_BWG: Int[Array, "B W G"]
    slots_BWG: Int[Array, "B W G"]  # which of a position's W slots is theirs; -1: none yet
    caches: tuple[tuple[Array, Array], ...]  # keys and values of each layer
    best: Beams


@struct.dataclass
class _Candidates:
    """Continuations of live hypotheses by one token, best first."""

    logprobs_BC: Float[Array, "B C"]
    parents_BC: Int[Array, "B C"]
    tokens_BC: Int[Array, "B C"]
    ends_BC: Bool[Array, "B C"]


def generate_beam(
    asr: Asr,
    inputs: Inputs,
    budget_B: Int[Array, " B"],
    *,
    beams: int,
    length_penalty: float | Float[Array, ""],
    end_ids: tuple[int, ...],
    max_new_tokens: int,
) -> Beams:
    """Beam search from each row's prompt; a row's result never depends on its neighbours.

    Each step ranks all continuations of a row's live hypotheses by their log-probabilities. Those
    of the first W that end are done, and compete by score with the W best done before; the first
    W that do not end live on. A row stops when W hypotheses are done and the score of its best
    live one, at its present length, exceeds none of theirs; or at its budget, where the first W
    continuations are done as they are. This is the search of transformers 5 (`num_beams=W,
    early_stopping=False`) on each row alone; with one beam it is `generate`.

    Args:
      inputs: `text_BX` holds prompts only.
      budget_B: tokens a hypothesis may take, the end token among them, capped at
        `max_new_tokens`; 0 leaves a row without hypotheses.
      beams: W, hypotheses kept of each row; at least 1.
      length_penalty: above 0 favours longer hypotheses, below 0 shorter ones.
      end_ids: tokens that end a hypothesis.
      max_new_tokens: G, the length of the output; at least 1.
    """
    budget_B = jnp.minimum(budget_B, max_new_tokens)
    search, prompt_B = _prefill(asr, inputs, beams, max_new_tokens)
    layers = asr.decoder.unstacked()

    def running(search: _Search) -> Array:
        return search.open_B & (search.step < budget_B)

    def body(search: _Search) -> _Search:
        new = _continue(asr, search, end_ids)
        divisor = (search.step + 1).astype(jnp.float32) ** length_penalty
        cut_B1 = (search.step + 1 >= budget_B)[:, None]
        done_BC = (new.ends_BC | cut_B1) & running(search)[:, None]
        best = _keep_best(search, new, done_BC[:, :beams], divisor)
        live = _live(new, beams)
        may_B = live.logprobs_BC[:, 0] / divisor > best.scores_BW[:, -1]
        advanced = _advance(asr, layers, search, prompt_B, live)
        # A stopped row stays so: with a length penalty, longer hypotheses could overtake later.
        return replace(advanced, open_B=search.open_B & may_B, best=best)

    with jax.named_scope("decode"):
        return jax.lax.while_loop(lambda search: jnp.any(running(search)), body, search).best


def _prefill(asr: Asr, inputs: Inputs, beams: int, steps: int) -> tuple[_Search, Array]:
    """One live hypothesis, empty, in each row; and the prompts' lengths."""
    x_BLD, prompt_B = asr.embed(inputs)
    with jax.named_scope("prefill"):
        x_BLD, kept = asr.decoder(x_BLD, prompt_B, keep_kv=True)
        last_B1D = jnp.take_along_axis(x_BLD, (prompt_B - 1)[:, None, None], axis=1)
    assert kept is not None
    rows, width = len(prompt_B), x_BLD.shape[2]
    room = ((0, 0), (0, steps * beams), (0, 0), (0, 0))
    empty_BW = jnp.full((rows, beams), -jnp.inf)
    empty_BWG = jnp.zeros((rows, beams, steps), jnp.int32)
    search = _Search(
        step=jnp.zeros((), jnp.int32),
        open_B=jnp.ones(rows, bool),
        hidden_BWD=jnp.broadcast_to(last_B1D, (rows, beams, width)),
        logprobs_BW=empty_BW.at[:, 0].set(0.0),
        tokens_BWG=empty_BWG,
        slots_BWG=empty_BWG - 1,
        caches=tuple((jnp.pad(k, room), jnp.pad(v, room)) for k, v in zip(*kept, strict=True)),
        best=Beams(
            tokens_BWG=empty_BWG,
            lengths_BW=empty_BWG[..., 0],
            scores_BW=empty_BW,
            finished_BW=jnp.zeros((rows, beams), bool),
        ),
    )
    return search, prompt_B


def _continue(asr: Asr, search: _Search, end_ids: tuple[int, ...]) -> _Candidates:
    """The best (1 + E) * W continuations: W of them at least do not end, though E * W may.

    Each hypothesis picks by logits, as greedy decoding does: sums of log-probabilities round, and
    may tie where logits do not.
    """
    rows, beams = search.logprobs_BW.shape
    logits_BWV = asr.decoder.logits(search.hidden_BWD)
    count = (1 + len(end_ids)) * beams
    top_BWC, token_BWC = jax.lax.top_k(logits_BWV, min(count, logits_BWV.shape[-1]))
    total_BW1 = jax.nn.logsumexp(logits_BWV, axis=-1, keepdims=True)
    logprobs_BWC = search.logprobs_BW[..., None] + (top_BWC - total_BW1)
    logprobs_BC, index_BC = jax.lax.top_k(logprobs_BWC.reshape(rows, -1), count)
    tokens_BC = jnp.take_along_axis(token_BWC.reshape(rows, -1), index_BC, axis=1)
    return _Candidates(
        logprobs_BC=logprobs_BC,
        parents_BC=index_BC // token_BWC.shape[2],
        tokens_BC=tokens_BC,
        ends_BC=is_end(tokens_BC, end_ids),
    )


def _live(new: _Candidates, beams: int) -> _Candidates:
    """The first `beams` continuations that do not end."""
    logprobs_BC = jnp.where(new.ends_BC, -jnp.inf, new.logprobs_BC)
    return _pick(replace(new, logprobs_BC=logprobs_BC), jax.lax.top_k(logprobs_BC, beams)[1])


def _keep_best(search: _Search, new: _Candidates, done_BW: Array, divisor: Array) -> Beams:
    """The W best of those done before and of those of the first W continuations done now.

    Equal scores keep their order, so that places without a hypothesis stay empty and last.
    """
    beams = done_BW.shape[1]
    parents_BW, ends_BW = new.parents_BC[:, :beams], new.ends_BC[:, :beams]
    token_BW = jnp.where(ends_BW, 0, new.tokens_BC[:, :beams])
    fresh = Beams(
        tokens_BWG=_of(search.tokens_BWG, parents_BW).at[:, :, search.step].set(token_BW),
        lengths_BW=search.step + ~ends_BW,
        scores_BW=jnp.where(done_BW, new.logprobs_BC[:, :beams] / divisor, -jnp.inf),
        finished_BW=ends_BW,
    )
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), search.best, fresh)
    return _pick(both, jax.lax.top_k(both.scores_BW, beams)[1])


def _advance(
    asr: Asr, layers: list[Any], search: _Search, prompt_B: Array, live: _Candidates
) -> _Search:
    """The live continuations' tokens through all layers, W new positions of each row."""
    rows, beams, steps = search.slots_BWG.shape
    step, prompt_slots = search.step, search.caches[0][0].shape[1] - steps * beams
    own_BW = jnp.broadcast_to(jnp.arange(beams), (rows, beams))
    slots_BWG = _of(search.slots_BWG, live.parents_BC).at[:, :, step].set(own_BW)
    theirs_BWS = (slots_BWG[..., None] == jnp.arange(beams)).reshape(rows, beams, steps * beams)
    prompt_BWS = jnp.broadcast_to(
        (jnp.arange(prompt_slots) < prompt_B[:, None])[:, None], (rows, beams, prompt_slots)
    )
    valid_BWS = jnp.concatenate([prompt_BWS, theirs_BWS], axis=2)
    slot = prompt_slots + step * beams
    x_BWD = asr.decoder.embed_text(live.tokens_BC)
    angles = asr.decoder.angles(jnp.broadcast_to((prompt_B + step)[:, None], (rows, beams)))
    caches = []
    for layer, (keys, values) in zip(layers, search.caches, strict=True):

        def mix(q: Array, k: Array, v: Array, keys: Array = keys, values: Array = values) -> Any:
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k, slot, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v, slot, axis=1)
            return attend_cache(q, keys, values, valid_BWS), (keys, values)

        x_BWD, cache = layer(x_BWD, angles, mix)
        caches.append(cache)
    return replace(
        search,
        step=step + 1,
        hidden_BWD=asr.decoder.norm(x_BWD),
        logprobs_BW=live.logprobs_BC,
        tokens_BWG=_of(search.tokens_BWG, live.parents_BC).at[:, :, step].set(live.tokens_BC),
        slots_BWG=slots_BWG,
        caches=tuple(caches),
    )


def _pick(hypotheses: Any, index_BW: Array) -> Any:
    """These hypotheses, by their places in each row, of a struct of arrays [B, C, ...]."""
    return jax.tree.map(lambda x: _of(x, index_BW), hypotheses)


def _of(x_BC: Array, index_BW: Array) -> Array:
    """`x_BC[b, index_BW[b, w]]`, whatever axes follow."""
    return jnp.take_along_axis(x_BC, index_BW.reshape(*index_BW.shape, *[1] * (x_BC.ndim - 2)), 1)

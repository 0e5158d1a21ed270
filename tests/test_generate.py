"""Rung 6: cached decoding equals the full forward, and transformers' generate token for token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import load_ours, load_torch, make_inputs, noise, tiny_folder, torch_inputs

from hebasr_jax.generate import Slots, generate, is_end
from hebasr_jax.model.asr import bind
from hebasr_jax.model.layers import Compute

SAMPLES = [140000, 16080, 3000, 52000]
TEXTS = [np.random.default_rng(n).integers(0, 250, n).tolist() for n in (17, 6, 11, 8)]
AT = [9, 1, 0, 8]
STEPS = 24


@pytest.fixture(scope="module")
def ours():
    return load_ours(tiny_folder())


@pytest.fixture(scope="module")
def batch():
    return make_inputs([noise(n, n) for n in SAMPLES], TEXTS, AT)


@partial(jax.jit, static_argnames=("end_ids", "steps"))
def _generate(params, inputs, budget_B, end_ids=(), steps=STEPS) -> Slots:
    asr = bind(params, load_ours(tiny_folder())[1], Compute())
    return generate(asr, inputs, budget_B, end_ids=end_ids, max_new_tokens=steps)


def _rows(out: Slots) -> list[list[int]]:
    return [
        np.asarray(tokens[:n]).tolist()
        for tokens, n in zip(out.tokens_RG, out.length_R, strict=True)
    ]


def _full(count: int) -> jax.Array:
    return jnp.full(count, STEPS, jnp.int32)


@pytest.fixture(scope="module")
def greedy(ours, batch) -> list[list[int]]:
    """The batch's free greedy continuations."""
    out = _generate(ours[0], batch, _full(4))
    assert not np.any(out.finished_R)
    return _rows(out)


def test_outputs_vary_enough_to_prove_something(greedy) -> None:
    assert all(len(row) == STEPS for row in greedy)
    assert len({token for row in greedy for token in row}) > 12


def test_equals_the_reference_token_for_token(ours, batch, greedy) -> None:
    """Each row of a mixed batch against transformers' generate on that row alone."""
    model = load_torch(tiny_folder())
    for row in range(4):
        inputs = torch_inputs(batch, row, ours[1].audio_token_id)
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert ids[0, inputs["input_ids"].shape[1] :].tolist() == greedy[row]


def test_cache_equals_the_full_forward(ours, batch, greedy) -> None:
    """Feeding the output back as text predicts the same tokens at every step."""
    params, config = ours
    grown = make_inputs(
        [noise(n, n) for n in SAMPLES], [t + g for t, g in zip(TEXTS, greedy, strict=True)], AT
    )

    @jax.jit
    def predict(params, inputs):
        asr = bind(params, config, Compute())
        return jnp.argmax(asr.decoder.logits(asr.hidden_before_text(inputs)), axis=-1)

    best = np.asarray(predict(params, grown))
    for row, text in enumerate(TEXTS):
        assert best[row, len(text) : len(text) + STEPS].tolist() == greedy[row]


def test_rows_do_not_depend_on_their_batch(ours, batch, greedy) -> None:
    """Alone, in another order, and in wider padding: the same tokens."""
    order = [3, 0, 2, 1]
    other = make_inputs(
        [noise(SAMPLES[i], SAMPLES[i]) for i in order],
        [TEXTS[i] for i in order],
        [AT[i] for i in order],
        pad=2,
    )
    assert _rows(_generate(ours[0], other, _full(4))) == [greedy[i] for i in order]
    alone = make_inputs([noise(SAMPLES[1], SAMPLES[1])], [TEXTS[1]], [AT[1]])
    assert _rows(_generate(ours[0], alone, _full(1))) == [greedy[1]]


def _own(rows: list[list[int]]) -> dict[int, int]:
    """Row -> where it first has a token that no other row has."""
    others = [{t for j, row in enumerate(rows) if j != i for t in row} for i in range(len(rows))]
    found = {}
    for i, row in enumerate(rows):
        own = [n for n, token in enumerate(row) if token not in others[i]]
        if own:
            found[i] = own[0]
    return found


def test_an_end_token_ends_its_row_only(ours, batch, greedy) -> None:
    """Each of two end tokens stops its row before itself; the other rows go on."""
    stops = dict(list(_own(greedy).items())[:2])
    assert len(stops) == 2
    out = _generate(
        ours[0], batch, _full(4), end_ids=tuple(greedy[row][n] for row, n in stops.items())
    )
    lengths = [stops.get(row, STEPS) for row in range(4)]
    assert _rows(out) == [free[:n] for free, n in zip(greedy, lengths, strict=True)]
    assert out.finished_R.tolist() == [row in stops for row in range(4)]
    for row, n in enumerate(lengths):
        assert not np.any(out.tokens_RG[row, n:])


def test_an_end_beyond_the_budget_is_no_end(ours, batch, greedy) -> None:
    """A cut row stays cut, though it would have ended while its neighbours still run."""
    row, stop = next(iter(_own(greedy).items()))
    budget = _full(4).at[row].set(stop)
    out = _generate(ours[0], batch, budget, end_ids=(greedy[row][stop],))
    assert _rows(out)[row] == greedy[row][:stop]
    assert not out.finished_R[row]


def test_a_budget_beyond_the_output_is_capped(ours, batch, greedy) -> None:
    out = _generate(ours[0], batch, jnp.full(4, STEPS + 9))
    assert _rows(out) == greedy


def test_budgets_are_kept_row_by_row(ours, batch, greedy) -> None:
    """A row stops at its own budget, marked as unfinished; 0 leaves it empty."""
    budgets = [0, 1, 7, STEPS]
    out = _generate(ours[0], batch, jnp.asarray(budgets))
    assert _rows(out) == [free[:n] for free, n in zip(greedy, budgets, strict=True)]
    assert not np.any(out.finished_R)


def test_an_end_token_within_the_budget_counts_as_finished(ours, batch, greedy) -> None:
    """The end token itself needs one step of the budget; one step less is not finished."""
    end = greedy[2][3]
    first = greedy[2].index(end)
    for budget, finished in ((first + 1, True), (first, False)):
        out = _generate(ours[0], batch, jnp.full(4, budget), end_ids=(end,))
        assert _rows(out)[2] == greedy[2][:first]
        assert bool(out.finished_R[2]) == finished


@pytest.mark.parametrize("end_ids", [(), (3,), (3, 7)])
def test_ends_are_found_without_an_array_of_them(end_ids) -> None:
    """An array that is handed to each device and not used crashes the compiler for several GPUs."""
    tokens = jnp.arange(9)
    found = is_end(tokens, end_ids)
    assert np.flatnonzero(found).tolist() == list(end_ids)
    assert not jax.make_jaxpr(lambda t: is_end(t, end_ids))(tokens).consts

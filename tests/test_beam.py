"""Beam search equals transformers' token for token, and a search through all there is."""

from dataclasses import replace
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import load_ours, load_torch, make_inputs, noise, tiny_folder, torch_inputs

from hebasr_jax.beam import Beams, generate_beam
from hebasr_jax.generate import generate
from hebasr_jax.model.asr import bind
from hebasr_jax.model.layers import Compute

SAMPLES = [40000, 16080, 3000, 32000]
TEXTS = [np.random.default_rng(n).integers(0, 250, n).tolist() for n in (17, 6, 11, 8)]
AT = [9, 1, 0, 8]
BUDGETS = [14, 9, 14, 12]
STEPS = 14
ENDS = (309, 31)
PENALTIES = (0.0, 0.7, 1.0, 2.5, -1.0)
QUICK = {"xla_backend_optimization_level": 0}  # compiled in half the time
Hypotheses = list[tuple[list[int], bool, float]]  # tokens, finished, score


@pytest.fixture(scope="module")
def ours():
    return load_ours(tiny_folder())


@pytest.fixture(scope="module")
def batch():
    return _batch()


def _batch(pad=0):
    return make_inputs([noise(n, n) for n in SAMPLES], TEXTS, AT, pad=pad)


@partial(jax.jit, static_argnames=("beams",), compiler_options=QUICK)
def _search(params, inputs, budget_B, length_penalty, *, beams) -> Beams:
    asr = bind(params, load_ours(tiny_folder())[1], Compute())
    return generate_beam(
        asr,
        inputs,
        budget_B,
        beams=beams,
        length_penalty=length_penalty,
        end_ids=ENDS,
        max_new_tokens=STEPS,
    )


def _row(out: Beams, row: int) -> Hypotheses:
    """A row's hypotheses, after a look at what must hold of any row."""
    tokens, lengths, scores, finished = (np.asarray(x[row]) for x in jax.tree.leaves(out))
    assert np.all(scores[:-1] >= scores[1:])
    assert all(not np.any(t[n:]) for t, n in zip(tokens, lengths, strict=True))
    there = [w for w in range(len(scores)) if scores[w] > -np.inf]
    assert not np.any(lengths[len(there) :] | finished[len(there) :])
    return [(tokens[w, : lengths[w]].tolist(), bool(finished[w]), scores[w]) for w in there]


def _theirs(model, inputs, row, budget, beams, length_penalty) -> Hypotheses:
    one = torch_inputs(inputs, row, load_ours(tiny_folder())[1].audio_token_id)
    with torch.no_grad():
        out = model.generate(
            **one,
            max_new_tokens=budget,
            do_sample=False,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=length_penalty,
            early_stopping=False,
            eos_token_id=list(ENDS),
            pad_token_id=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    found = []
    for tokens, score in zip(out.sequences, out.sequences_scores.tolist(), strict=True):
        new = tokens[one["input_ids"].shape[1] :].tolist()
        ends = [n for n, token in enumerate(new) if token in ENDS]
        found.append((new[: ends[0]] if ends else new, bool(ends), score))
    return found


def _same(first: Hypotheses, second: Hypotheses) -> None:
    assert [h[:2] for h in first] == [h[:2] for h in second]
    np.testing.assert_allclose([h[2] for h in first], [h[2] for h in second], rtol=1e-5)


@pytest.mark.parametrize("beams", [2, 4, 5])
def test_equals_transformers_token_for_token(ours, batch, beams) -> None:
    """All W hypotheses of each row of a mixed batch, against the reference on that row alone."""
    model = load_torch(tiny_folder())
    seen = []
    for length_penalty in PENALTIES:
        out = _search(ours[0], batch, jnp.asarray(BUDGETS), length_penalty, beams=beams)
        for row, budget in enumerate(BUDGETS):
            mine = _row(out, row)
            assert len(mine) == beams
            _same(mine, _theirs(model, batch, row, budget, beams, length_penalty))
            seen += mine
    assert len({len(tokens) for tokens, _, _ in seen}) > 5
    assert 0.2 < np.mean([finished for _, finished, _ in seen]) < 0.8


def test_one_beam_is_greedy_decoding(ours, batch) -> None:
    @partial(jax.jit, compiler_options=QUICK)
    def greedy(params, budget_B):
        asr = bind(params, ours[1], Compute())
        return generate(asr, batch, budget_B, end_ids=ENDS, max_new_tokens=STEPS)

    for budgets in (BUDGETS, [1, 2, 30, 5]):
        expected = greedy(ours[0], jnp.asarray(budgets))
        for length_penalty in PENALTIES:
            out = _search(ours[0], batch, jnp.asarray(budgets), length_penalty, beams=1)
            np.testing.assert_array_equal(out.tokens_BWG[:, 0], expected.tokens_RG)
            np.testing.assert_array_equal(out.lengths_BW[:, 0], expected.length_R)
            np.testing.assert_array_equal(out.finished_BW[:, 0], expected.finished_R)
        assert 0 < np.sum(expected.finished_R) < 4


_VOCABULARY, _END, _MOST = 4, 3, 4
_TEXT = [2, 0, 1, 1, 2]


def _full_forward(params, config) -> dict[tuple[int, ...], np.ndarray]:
    """Tokens that do not end -> log-probabilities [4, V] after 0, 1, 2 and 3 of them, no cache."""
    prefixes = list(product(set(range(_VOCABULARY)) - {_END}, repeat=_MOST - 1))
    inputs = make_inputs(
        [noise(3000)] * len(prefixes),
        [[*_TEXT, *prefix, 0] for prefix in prefixes],
        [2] * len(prefixes),
    )

    @partial(jax.jit, compiler_options=QUICK)
    def predict(params, inputs):
        asr = bind(params, config, Compute())
        hidden_BXD = asr.hidden_before_text(inputs)[:, len(_TEXT) :]
        return jax.nn.log_softmax(asr.decoder.logits(hidden_BXD))

    return dict(zip(prefixes, np.asarray(predict(params, inputs), np.float64), strict=True))


def _every_hypothesis(table, budget: int, length_penalty: float) -> Hypotheses:
    """All sequences there are, best first."""
    found = {}
    for prefix, log in table.items():
        for n in range(budget):
            said = prefix[:n]
            before = sum(log[i, token] for i, token in enumerate(said))
            for token in range(_VOCABULARY):
                score = (before + log[n, token]) / (n + 1) ** length_penalty
                if token == _END:
                    found[said, True] = score
                elif n + 1 == budget:
                    found[(*said, token), False] = score
    rows = [(list(tokens), finished, score) for (tokens, finished), score in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def test_with_room_for_all_it_is_exhaustive(ours) -> None:
    """As many beams as there are sequences of up to 4 tokens: all come back, in order."""
    params, config = ours
    embedding = params["decoder"]["embed"]["embedding"][:_VOCABULARY]
    params = {**params, "decoder": {**params["decoder"], "embed": {"embedding": embedding}}}
    config = replace(config, decoder=replace(config.decoder, vocab_size=_VOCABULARY))
    inputs = make_inputs([noise(3000)] * 2, [_TEXT] * 2, [2] * 2)

    @partial(jax.jit, compiler_options=QUICK)
    def search(params, length_penalty):
        return generate_beam(
            bind(params, config, Compute()),
            inputs,
            jnp.asarray([_MOST, 2]),
            beams=128,
            length_penalty=length_penalty,
            end_ids=(_END,),
            max_new_tokens=_MOST,
        )

    table = _full_forward(params, config)
    for length_penalty in (1.0, -0.5):
        out = search(params, length_penalty)
        for row, (budget, count) in enumerate([(_MOST, 121), (2, 13)]):
            expected = _every_hypothesis(table, budget, length_penalty)
            assert len(expected) == count
            _same(_row(out, row), expected)


@pytest.fixture(scope="module")
def alone(ours):
    """(clip, budget, length penalty) -> its hypotheses without neighbours, in wider padding."""
    padded = _batch(pad=2)
    behind = jnp.arange(padded.text_BX.shape[1]) >= padded.text_lengths_B[:, None]
    padded = padded.replace(text_BX=jnp.where(behind, 99, padded.text_BX))

    @cache
    def decode(clip: int, budget: int, length_penalty: float) -> Hypotheses:
        one = jax.tree.map(lambda x: x[clip : clip + 1], padded)
        return _row(_search(ours[0], one, jnp.asarray([budget]), length_penalty, beams=4), 0)

    return decode


_ROWS = st.tuples(*4 * [st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 5, 9, 14]))])


@settings(max_examples=20)
@given(rows=_ROWS, length_penalty=st.sampled_from(PENALTIES))
def test_neighbours_order_and_padding_change_nothing(
    ours, batch, alone, rows, length_penalty
) -> None:
    """Whichever clips share a batch, in any order, each with its own budget."""
    clips, budgets = zip(*rows, strict=True)
    drawn = jax.tree.map(lambda x: x[jnp.asarray(clips)], batch)
    out = _search(ours[0], drawn, jnp.asarray(budgets), length_penalty, beams=4)
    for row, (clip, budget) in enumerate(rows):
        _same(_row(out, row), alone(clip, budget, length_penalty))


def test_a_budget_of_nothing_has_no_hypothesis(alone) -> None:
    assert alone(0, 0, 1.0) == []


def test_bfloat16_keeps_its_types_through_the_loop(ours, batch) -> None:
    def search(params):
        out = generate_beam(
            bind(params, ours[1], Compute(dtype=jnp.bfloat16)),
            batch,
            jnp.full(4, STEPS),
            beams=3,
            length_penalty=1.0,
            end_ids=ENDS,
            max_new_tokens=STEPS,
        )
        return out.tokens_BWG, out.scores_BW

    tokens_BWG, scores_BW = jax.eval_shape(search, ours[0])
    assert (tokens_BWG.shape, scores_BW.dtype) == ((4, 3, STEPS), jnp.float32)

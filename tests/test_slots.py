"""Decoding in slots: any batch and order gives what each utterance gives alone; draws repeat."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_inputs, noise, tiny_folder

from hebasr_jax import slots
from hebasr_jax.model.asr import bind
from hebasr_jax.model.layers import Compute
from hebasr_jax.slots import Decoded, Utterance, decode_all, search_all
from hebasr_jax.text import PromptStyle, build_prompt
from hebasr_jax.transcribe import Recognizer, load_recognizer

# Two classes of slots, two buckets in the first, two clips of one length; each shape is compiled.
LENGTHS = (3_000, 16_000, 16_000, 60_000, 64_000, 62_000, 61_000, 70_000, 80_000)
BUDGETS = (5, 12, 3, 9, 1, 20, 7, 16, 11)
ORDERS = (range(9), (8, 3, 0, 7, 2, 5, 6, 1, 4))


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return load_recognizer(str(tiny_folder()))


@pytest.fixture(scope="module")
def utterances(recognizer) -> list[Utterance]:
    """Clips of several lengths, prompts and budgets."""
    prompts = [
        build_prompt(recognizer.tokenizer, PromptStyle(), context=text) for text in ("תודה", "שלום")
    ]
    return [
        Utterance(noise(samples, n), prompts[n % 2], budget)
        for n, (samples, budget) in enumerate(zip(LENGTHS, BUDGETS, strict=True))
    ]


def _decode(
    recognizer: Recognizer,
    some: Sequence[Utterance],
    end_ids: tuple[int, ...] = (),
    audio_s: float = 100.0,
) -> list[Decoded]:
    found = decode_all(
        recognizer.params,
        some,
        config=recognizer.config,
        compute=recognizer.compute,
        mesh=recognizer.mesh,
        end_ids=end_ids,
        batch_audio_s=audio_s,
    )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def alone(recognizer, utterances) -> list[Decoded]:
    return [_decode(recognizer, [utterance])[0] for utterance in utterances]


@pytest.fixture(scope="module")
def end(alone) -> int:
    """A token that ends some rows early, one at once, and that others never write."""
    rows = [row.tokens for row in alone]
    common = max({t for row in rows for t in row}, key=lambda t: sum(t in row for row in rows))
    assert 2 <= sum(common in row for row in rows) < len(rows)
    return common


def _same(found: Decoded, expected: Decoded, end: int | None = None) -> None:
    tokens, count = expected.tokens, len(expected.tokens)
    stops = end in tokens
    count = tokens.index(end) if stops else count
    assert found.tokens == tokens[:count]
    assert found.finished == stops
    np.testing.assert_allclose(found.logprobs_G, expected.logprobs_G[:count], atol=1e-5)


@pytest.mark.parametrize(("rows", "ends"), [(1, False), (4, True), (16, True)])
def test_any_batch_and_order_equals_each_alone(recognizer, utterances, alone, end, rows, ends):
    """Fewer slots than utterances: rows that end are refilled, in the ring and out of step."""
    for order in ORDERS:
        some = [utterances[i] for i in order]
        found = _decode(recognizer, some, (end,) if ends else (), audio_s=4.0 * rows)
        for i, row in zip(order, found, strict=True):
            _same(row, alone[i], end if ends else None)


def test_rows_are_refilled_while_others_run(recognizer, utterances, alone, monkeypatch) -> None:
    """Four slots for seven utterances of a class, one filled at a time."""
    runs = []
    real = slots._decoder(recognizer.mesh.devices.flat[0].platform)

    def counted(params, state, leave, program):
        runs.append((int(leave), int(np.sum(state.running_R))))
        return real(params, state, leave, program)

    monkeypatch.setattr(slots, "_decoder", lambda platform: counted)
    some = [
        replace(u, budget=b) for u, b in zip(utterances[:7], (9, 2, 12, 4, 7, 3, 8), strict=True)
    ]
    found = _decode(recognizer, some[:6], audio_s=16.0)
    assert [len(row.tokens) for row in found] == [9, 2, 12, 4, 7, 3]
    assert [leave for leave, _ in runs] == [3, 3, 0]
    assert all(running > 1 for _, running in runs)


def test_log_probabilities_are_those_of_the_full_forward(recognizer, utterances) -> None:
    """Greedy at temperature 1; draws under the distribution that they were drawn from."""
    for temperature in (0.0, 0.7):
        some = [
            replace(u, budget=12, temperature=temperature, seed=n)
            for n, u in enumerate(utterances[3:7])
        ]
        found = _decode(recognizer, some)
        texts = [
            [*u.prompt.before, *u.prompt.after, *row.tokens]
            for u, row in zip(some, found, strict=True)
        ]
        at = [len(u.prompt.before) for u in some]
        inputs = make_inputs([u.wave_S for u in some], texts, at)
        asr = bind(recognizer.params, recognizer.config, Compute())
        logits_BXV = asr.decoder.logits(asr.hidden_before_text(inputs)) / (temperature or 1.0)
        told_BXV = jax.nn.log_softmax(logits_BXV, axis=-1)
        for row, text, result in zip(told_BXV, texts, found, strict=True):
            place = range(len(text) - len(result.tokens), len(text))
            expected = [float(row[x, text[x]]) for x in place]
            np.testing.assert_allclose(result.logprobs_G, expected, atol=2e-4)


def test_draws_follow_from_the_seed_alone(recognizer, utterances) -> None:
    """Whatever decodes beside them; other seeds, other texts; when cold, greedy."""
    drawn = [replace(utterances[5], temperature=1.0, seed=seed) for seed in (1, 2, 1, 2**40 + 1)]
    first = _decode(recognizer, drawn)
    assert first[0].tokens == first[2].tokens
    assert len({row.tokens for row in first}) == 3
    mixed = _decode(recognizer, [*utterances[3:7], *drawn[::-1]], audio_s=16.0)
    assert [row.tokens for row in mixed[:-5:-1]] == [row.tokens for row in first]
    greedy = _decode(recognizer, utterances[5:6])[0]
    assert mixed[2].tokens == greedy.tokens
    cold = _decode(recognizer, [replace(utterances[5], temperature=1e-4, seed=3)])[0]
    assert cold.tokens == greedy.tokens


def test_first_draws_have_the_models_frequencies(recognizer, utterances) -> None:
    """600 draws of one token: the commonest ones within four standard errors."""
    draws, temperature = 600, 0.5
    base = replace(utterances[0], budget=1, temperature=temperature)
    found = _decode(recognizer, [replace(base, seed=n) for n in range(draws)], audio_s=4096.0)
    text = [*base.prompt.before, *base.prompt.after]
    inputs = make_inputs([base.wave_S], [[*text, 0]], [len(base.prompt.before)])
    asr = bind(recognizer.params, recognizer.config, Compute())
    logits_V = asr.decoder.logits(asr.hidden_before_text(inputs))[0, len(text)]
    share_V = np.asarray(jax.nn.softmax(logits_V / temperature))
    count_V = np.bincount([row.tokens[0] for row in found], minlength=len(share_V))
    for token in np.argsort(-share_V)[:5]:
        error = np.sqrt(share_V[token] * (1 - share_V[token]) / draws)
        assert abs(count_V[token] / draws - share_V[token]) < 4 * error


def test_a_beam_search_in_batches_equals_one_alone(recognizer, utterances) -> None:
    """Of several batches and classes; and its best is no worse than the greedy text."""
    some = [replace(utterances[i], budget=6) for i in (8, 1, 4, 2, 0)]
    options = {
        "config": recognizer.config,
        "compute": recognizer.compute,
        "mesh": recognizer.mesh,
        "end_ids": (),
        "beams": 3,
    }
    found = search_all(recognizer.params, some, batch_audio_s=24.0, **options)
    (alone,) = search_all(recognizer.params, some[2:3], batch_audio_s=24.0, **options)
    assert found[2].tokens == alone.tokens
    greedy = _decode(recognizer, some)
    for best, first in zip(found, greedy, strict=True):
        assert len(best.tokens) == 6
        assert not best.finished
        assert best.logprobs_G.mean() >= first.logprobs_G.mean() - 1e-4
    assert any(best.tokens != first.tokens for best, first in zip(found, greedy, strict=True))


def test_a_signal_ends_it(recognizer, utterances) -> None:
    found = decode_all(
        recognizer.params,
        utterances,
        config=recognizer.config,
        compute=recognizer.compute,
        mesh=recognizer.mesh,
        end_ids=(),
        batch_audio_s=8.0,
        stopped=lambda: True,
    )
    assert found is None


def test_float_and_int16_sound_alike(recognizer, utterances) -> None:
    whole = (utterances[3].wave_S * 32767).astype(np.int16)
    prompts = [replace(utterances[3], wave_S=wave) for wave in (whole, whole / np.float32(32768))]
    first, second = _decode(recognizer, prompts)
    assert first.tokens == second.tokens
    assert jnp.array_equal(first.logprobs_G, second.logprobs_G)

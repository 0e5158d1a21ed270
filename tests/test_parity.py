"""Rungs 2 to 4 of the proof ladder: the model equals transformers' in float32, gradients too.

With -s it prints the parity table of docs/model.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import (
    ENCODER_BOUND,
    LOGITS_BOUND,
    load_ours,
    load_torch,
    make_inputs,
    noise,
    relative,
    tiny_folder,
    torch_inputs,
)

from hebasr_jax.loss import next_token_loss
from hebasr_jax.model.asr import bind
from hebasr_jax.model.encoder import audio_tokens
from hebasr_jax.model.layers import Compute
from hebasr_jax.weights import entries

# Around every border: hop, window, chunk (1 s), attention window (8 s).
SAMPLES = [160, 200, 201, 1600, 9600, 15840, 16000, 16080, 127840, 128000, 128160, 244800]
LONG = [336000, 480000, 752000]


@pytest.fixture(scope="module")
def torch_model():
    return load_torch(tiny_folder())


@pytest.fixture(scope="module")
def ours():
    return load_ours(tiny_folder())


def _text(row: int, length: int = 12) -> list[int]:
    return np.random.default_rng(row).integers(0, 250, length).tolist()


@pytest.mark.parametrize("samples", [9600, 16000])
def test_stem_and_positions(ours, torch_model, samples) -> None:
    """Convolutions, flattening order and position rows, before any attention."""
    params, config = ours
    inputs = make_inputs([noise(samples)], [_text(0)], [3])
    stem = bind(params, config, Compute()).encoder.stem(inputs.mel_BTM)
    found = []
    hook = torch_model.model.audio_tower.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: found.append((args or list(kwargs.values()))[0]),
        with_kwargs=True,
    )
    batch = torch_inputs(inputs, 0, config.audio_token_id)
    with torch.no_grad():
        torch_model.get_audio_features(batch["input_features"], batch["input_features_mask"])
    hook.remove()
    theirs = found[0].numpy()
    assert relative(stem[0, : len(theirs)], theirs) <= ENCODER_BOUND


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _forward(params, inputs, config, compute):
    """Audio embeddings and logits everywhere."""
    asr = bind(params, config, compute)
    audio_BAD = asr.projector(asr.encoder(inputs.mel_BTM, inputs.frames_B))
    return audio_BAD, asr.decoder.logits(asr.hidden(inputs))


def _check_row(ours, torch_model, inputs, row, audio_BAD, logits_BLV) -> None:
    batch = torch_inputs(inputs, row, ours[1].audio_token_id)
    with torch.no_grad():
        audio = torch_model.get_audio_features(
            batch["input_features"], batch["input_features_mask"]
        ).pooler_output.numpy()
        logits = torch_model(**batch).logits[0].numpy()
    assert len(audio) == audio_tokens(int(inputs.frames_B[row]))
    encoder = relative(audio_BAD[row, : len(audio)], audio)
    head = relative(logits_BLV[row, : len(logits)], logits)
    print(f"\n{int(inputs.frames_B[row])} frames: encoder {encoder:.1e}, logits {head:.1e}")
    assert encoder <= ENCODER_BOUND
    assert head <= LOGITS_BOUND


@pytest.mark.parametrize("samples", SAMPLES + LONG)
def test_encoder_and_logits_alone(ours, torch_model, samples) -> None:
    params, config = ours
    inputs = make_inputs([noise(samples)], [_text(1)], [4])
    audio, logits = _forward(params, inputs, config, Compute())
    _check_row(ours, torch_model, inputs, 0, audio, logits)


def test_encoder_and_logits_in_a_mixed_batch(ours, torch_model) -> None:
    """Rows of very different length, text and audio position; none knows of the others."""
    params, config = ours
    lengths = [336000, 160, 128160, 15840, 16080]
    texts = [_text(row, 5 + 7 * row) for row in range(5)]
    inputs = make_inputs([noise(n, n) for n in lengths], texts, [4, 0, 7, 26, 1], pad=2)
    audio, logits = _forward(params, inputs, config, Compute())
    for row in range(5):
        _check_row(ours, torch_model, inputs, row, audio, logits)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_loss_and_gradient_of_every_parameter(ours, torch_model, remat) -> None:
    """||difference|| <= 1e-4 max(||g||, 1e-6 x global norm), parameter by parameter."""
    params, config = ours
    lengths, at = [140000, 20000], [4, 6]
    texts = [_text(3, 20), _text(4, 13)]
    inputs = make_inputs([noise(n, n) for n in lengths], texts, at)
    in_loss = np.zeros(inputs.text_BX.shape, bool)
    in_loss[0, 9:20] = in_loss[1, 8:13] = True

    def loss(params):
        asr = bind(params, config, Compute(remat=remat))
        total, count = next_token_loss(asr, inputs, jnp.asarray(in_loss))
        return total / count

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)

    torch_model.zero_grad()
    total = torch.zeros(())
    for row in range(2):
        batch = torch_inputs(inputs, row, config.audio_token_id)
        logits = torch_model(**batch).logits[0]
        first = int(np.argmax(in_loss[row]))
        stop = int(inputs.text_lengths_B[row])
        labels = torch.tensor(texts[row][first:stop])
        total = total + torch.nn.functional.cross_entropy(
            logits[-len(labels) - 1 : -1], labels, reduction="sum"
        )
    mean = total / in_loss.sum()
    mean.backward()
    assert float(value) == pytest.approx(mean.item(), rel=1e-5)

    theirs = {n: p.grad.numpy() for n, p in torch_model.named_parameters() if p.grad is not None}
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in theirs.values()))
    flat = dict(_paths(gradient))
    checked, worst = set(), 0.0
    for entry in entries(config, "transformers"):
        g = theirs[entry.key]
        error = np.linalg.norm(entry.to_theirs(flat[entry.path], config) - g)
        # The encoder's key bias has no gradient in theory and noise in practice.
        assert error <= 1e-4 * max(np.linalg.norm(g), 1e-6 * norm) or (
            entry.path == "encoder/layers/key/bias" and error <= 1e-6 * norm
        ), entry.key
        checked.add(entry.key)
        if entry.path != "encoder/layers/key/bias":
            worst = max(worst, error / np.linalg.norm(g))
    assert checked == set(theirs)
    print(f"\nloss {float(value):.6f}, reference {mean.item():.6f}; gradients within {worst:.1e}")


def _paths(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def test_bfloat16_stays_near_float32(ours) -> None:
    """Half precision differs by rounding only; the bound is twice what real sizes show (1.3e-2)."""
    params, config = ours
    inputs = make_inputs([noise(140000)], [_text(5)], [4])
    _, exact = _forward(params, inputs, config, Compute())
    _, half = _forward(params, inputs, config, Compute(dtype=jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert relative(half, np.asarray(exact)) <= 5e-2

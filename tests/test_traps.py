"""Each port trap of the fact sheet, walked into on purpose: the parity bounds catch it.

The numbers are those of the trap list in docs/model.md. Traps of text, weights and commands have
tests of their own, named there.
"""

import dataclasses

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

from hebasr_jax import features
from hebasr_jax.model import asr as asr_module
from hebasr_jax.model import decoder as decoder_module
from hebasr_jax.model import encoder as encoder_module
from hebasr_jax.model import layers
from hebasr_jax.model.asr import bind
from hebasr_jax.model.layers import Compute
from hebasr_jax.tiny import TINY

# 21 s: three attention windows; 3.37 s: a last chunk of 37 frames.
LENGTHS, TEXTS = [336000, 53920], [list(range(9, 40)), list(range(60, 75))]


@pytest.fixture(scope="module")
def inputs():
    return make_inputs([noise(n, n) for n in LENGTHS], TEXTS, [9, 4])


@pytest.fixture(scope="module")
def theirs(inputs):
    """The reference's audio embeddings and logits, row by row."""
    model, rows = load_torch(tiny_folder()), []
    for row in range(2):
        batch = torch_inputs(inputs, row, TINY.audio_token_id)
        with torch.no_grad():
            audio = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
            rows.append((audio.pooler_output.numpy(), model(**batch).logits[0].numpy()))
    return rows


def errors(inputs, theirs, config=TINY, change=lambda params: params) -> tuple[float, float]:
    """Largest relative error of the encoder and of the logits over the rows."""
    asr_module._definition.cache_clear()
    params = change(load_ours(tiny_folder())[0])

    def forward(params, inputs):
        asr = bind(params, config, Compute())
        audio_BAD = asr.projector(asr.encoder(inputs.mel_BTM, inputs.frames_B))
        return audio_BAD, asr.decoder.logits(asr.hidden(inputs))

    audio_BAD, logits_BLV = jax.jit(forward)(params, inputs)
    asr_module._definition.cache_clear()
    return (
        max(relative(audio_BAD[i, : len(a)], a) for i, (a, _) in enumerate(theirs)),
        max(relative(logits_BLV[i, : len(z)], z) for i, (_, z) in enumerate(theirs)),
    )


def test_without_a_trap_both_bounds_hold(inputs, theirs) -> None:
    encoder, logits = errors(inputs, theirs)
    assert encoder <= ENCODER_BOUND
    assert logits <= LOGITS_BOUND


def _replace(part: str, **values):
    return dataclasses.replace(TINY, **{part: dataclasses.replace(getattr(TINY, part), **values)})


def _patch_stem(monkeypatch) -> None:
    """Positions that run on over the whole clip instead of restarting each second."""
    stem = encoder_module.Encoder.stem

    def shifted(self, mel_BTM):
        x_BAD = stem(self, mel_BTM)
        half = x_BAD.shape[2] // 2
        frequency = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
        angle = np.arange(x_BAD.shape[1])[:, None] * frequency
        everywhere = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
        chunk = np.tile(everywhere[:13], (x_BAD.shape[1] // 13, 1))
        return x_BAD + jnp.asarray(everywhere - chunk, jnp.float32)

    monkeypatch.setattr(encoder_module.Encoder, "stem", shifted)


def _interleave(rows: np.ndarray) -> np.ndarray:
    half = rows.shape[1] // 2
    return np.stack([rows[:, :half], rows[:, half:]], axis=2).reshape(rows.shape)


def _flatten_channel_major(params):
    kernel = params["encoder"]["conv_out"]["kernel"]
    shape = (TINY.encoder.conv_bins, TINY.encoder.conv_channels, -1)
    swapped = jnp.swapaxes(kernel.reshape(shape), 0, 1).reshape(kernel.shape)
    encoder = {**params["encoder"], "conv_out": {"kernel": swapped}}
    return {**params, "encoder": encoder}


def _adjacent_pairs(x, angles):
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = x[..., ::2], x[..., 1::2]
    pairs = [first * cos - second * sin, second * cos + first * sin]
    return jnp.stack(pairs, axis=-1).reshape(x.shape)


def _tile_heads(attend):
    def tiled(q, k, v, **rest):
        group = q.shape[2] // k.shape[2]
        return attend(q, jnp.tile(k, (1, 1, group, 1)), jnp.tile(v, (1, 1, group, 1)), **rest)

    return tiled


def _norm(epsilon):
    def make(width, compute, rngs):
        return layers.nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)

    return make


ROTATE, SINUSOIDS = layers.rotate, encoder_module.sinusoids
PATCHES = {
    "2 positions over the clip": _patch_stem,
    "4 sines and cosines interleaved": lambda m: m.setattr(
        encoder_module, "sinusoids", lambda width: _interleave(SINUSOIDS(width))
    ),
    "5 tanh GELU": lambda m: m.setattr(encoder_module, "gelu", jax.nn.gelu),
    "6 Flax's LayerNorm epsilon": lambda m: m.setattr(encoder_module, "layer_norm", _norm(1e-6)),
    "10 12.5 tokens a second": lambda m: m.setattr(
        asr_module, "audio_tokens", lambda frames: (frames + 7) // 8
    ),
    "14 rotation of adjacent pairs": lambda m: m.setattr(decoder_module, "rotate", _adjacent_pairs),
    "35 key heads tiled, not repeated": lambda m: m.setattr(
        decoder_module, "attend", _tile_heads(decoder_module.attend)
    ),
}


@pytest.mark.parametrize("trap", PATCHES)
def test_a_trap_in_the_code_is_caught(inputs, theirs, monkeypatch, trap) -> None:
    PATCHES[trap](monkeypatch)
    encoder, logits = errors(inputs, theirs)
    assert encoder > ENCODER_BOUND or logits > LOGITS_BOUND


CONFIGS = {
    "1 attention over the whole clip": _replace("encoder", window_chunks=1000),
    "12 the default rope_theta": _replace("decoder", rope_theta=1e4),
    "14 the default norm epsilon": _replace("decoder", norm_eps=1e-4),
}


@pytest.mark.parametrize("trap", CONFIGS)
def test_a_trap_in_the_config_is_caught(inputs, theirs, trap) -> None:
    encoder, logits = errors(inputs, theirs, CONFIGS[trap])
    assert encoder > ENCODER_BOUND or logits > LOGITS_BOUND


def test_channel_major_flattening_is_caught(inputs, theirs) -> None:
    """Trap 3: the fact sheet's 60 to 70 %."""
    assert errors(inputs, theirs, change=_flatten_channel_major)[0] > 0.1


def _filled(inputs, value: float):
    behind = jnp.arange(inputs.mel_BTM.shape[1]) >= inputs.frames_B[:, None]
    return inputs.replace(mel_BTM=jnp.where(behind[..., None], value, inputs.mel_BTM))


INPUTS = {
    "7 padded frames left at the log floor": lambda i: _filled(i, -0.63),
    "8 frames rounded up": lambda i: i.replace(frames_B=i.frames_B + 1),
    "11 every clip padded to 30 s": lambda i: i.replace(
        mel_BTM=jnp.pad(i.mel_BTM, ((0, 0), (0, 900), (0, 0))), frames_B=jnp.full(2, 3000)
    ),
}


@pytest.mark.parametrize("trap", INPUTS)
def test_a_trap_in_the_features_is_caught(inputs, theirs, trap) -> None:
    encoder, logits = errors(INPUTS[trap](inputs), theirs)
    assert encoder > ENCODER_BOUND or logits > LOGITS_BOUND


def test_the_mel_floor_is_the_clips_own() -> None:
    """Trap 9: a floor taken over the batch would lift a quiet clip beside a loud one."""
    quiet, loud = 1e-4 * noise(16000, 1), noise(16000, 2)
    waves = jnp.asarray(np.stack([quiet, 5 * loud]))
    together, _ = features.log_mel(waves, jnp.full(2, 16000), mel_bins=128)
    alone, _ = features.log_mel(waves[:1], jnp.full(1, 16000), mel_bins=128)
    np.testing.assert_allclose(together[0], alone[0], atol=2e-6)
    assert float(together[1].max() - 8 / 4) > float(together[0].min()) + 0.1


def test_rotary_angles_stay_in_float32() -> None:
    """Traps 15 and 16: in bfloat16 the angle of position 3000 is wrong by whole turns."""
    positions = jnp.arange(60000)[None]
    angles = layers.rotary_angles(positions, 128, 1e6)
    exact = np.arange(60000)[:, None] * 1e6 ** (-np.arange(0, 128, 2) / 128)
    assert angles.dtype == jnp.float32
    assert np.abs(np.cos(angles[0]) - np.cos(exact)).max() <= 2e-2
    rotated = ROTATE(jnp.ones((1, 60000, 1, 128), jnp.bfloat16), angles)
    assert rotated.dtype == jnp.bfloat16
    expected = np.cos(exact) - np.sin(exact)
    assert np.abs(np.asarray(rotated[0, :, 0, :64], np.float32) - expected).max() <= 3e-2

"""The reference in torch: tiny random models of transformers' own class, and its inputs."""

import functools
import io
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import soundfile
import torch
from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

from hebasr_jax.config import ModelConfig, layout_of, model_config, read_config
from hebasr_jax.features import log_mel
from hebasr_jax.layout import write_settings
from hebasr_jax.model.asr import Inputs, Params
from hebasr_jax.model.encoder import audio_tokens
from hebasr_jax.text import load_tokenizer
from hebasr_jax.tiny import TINY, write_byte_tokenizer
from hebasr_jax.weights import load_params

SHARED = Path(__file__).parents[2] / "shared"
# Relative to the reference in float32. The design allows 1e-5 and 1e-4; a wrong LayerNorm epsilon
# is 5e-6 off (trap 6), so that these are tighter.
ENCODER_BOUND, LOGITS_BOUND = 2e-6, 1e-5
torch.set_num_threads(1)


@functools.cache
def tiny_folder(config: ModelConfig = TINY) -> Path:
    """A transformers-layout folder whose weights the real class drew and saved, in float32."""
    folder = Path(tempfile.mkdtemp(prefix="hebasr-test-"))
    write_byte_tokenizer(folder)
    write_settings(folder, config, load_tokenizer(folder), "transformers", "float32")
    randomize(
        Qwen3ASRForConditionalGeneration(Qwen3ASRConfig.from_pretrained(folder))
    ).save_pretrained(folder)
    return folder


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, norms and biases too, so that none can be dropped unseen.

    The scale keeps activations near 1 and makes greedy outputs vary.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name or "ln_post" in name else 0.0
                parameter.copy_(
                    torch.where(torch.tensor("weight" in name), centre, 0.0) + 0.3 * noise
                )
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * 1.5 / fan_in**0.5)
    return model


def load_torch(folder: Path) -> Qwen3ASRForConditionalGeneration:
    """The reference model, strictly: nothing missing, nothing unexpected."""
    model, info = Qwen3ASRForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def load_ours(folder: Path) -> tuple[Params, ModelConfig]:
    content = read_config(folder)
    config = model_config(content)
    return load_params(folder, config, layout_of(content)), config


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise with a moving level, so that frames differ."""
    rng = np.random.default_rng(seed)
    level = 0.05 + 0.1 * np.abs(np.sin(np.arange(samples) / 7000.0))
    return (rng.standard_normal(samples) * level).astype(np.float32)


def speech(name: str, clips: int) -> list[np.ndarray]:
    """The first clips of a set's test part in ../shared/data, at 16 kHz."""
    table = pyarrow.parquet.read_table(SHARED / "data" / name / "test.parquet", columns=["audio"])
    waves = []
    for row in table.slice(0, clips).to_pylist():
        wave, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        assert rate == 16000
        waves.append(wave)
    return waves


def features(waves: list[np.ndarray], *, samples: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Our features of right-padded clips."""
    wave_BS = np.zeros((len(waves), samples or max(map(len, waves))), np.float32)
    for row, wave in enumerate(waves):
        wave_BS[row, : len(wave)] = wave
    lengths = jnp.asarray([len(wave) for wave in waves])
    return _log_mel(jnp.asarray(wave_BS), lengths)


@jax.jit
def _log_mel(wave_BS, samples_B):
    return log_mel(wave_BS, samples_B, mel_bins=128)


def make_inputs(
    waves: list[np.ndarray], texts: list[list[int]], audio_at: list[int], *, pad: int = 0
) -> Inputs:
    """A batch; `pad` adds columns of text and 100-frame chunks of features behind every row."""
    mel_BTM, frames_B = features(waves, samples=max(map(len, waves)) + pad * 16000)
    text_BX = np.zeros((len(texts), max(map(len, texts)) + pad), np.int32)
    for row, text in enumerate(texts):
        text_BX[row, : len(text)] = text
    lengths = jnp.asarray([len(text) for text in texts])
    return Inputs(mel_BTM, frames_B, jnp.asarray(text_BX), lengths, jnp.asarray(audio_at))


def torch_inputs(inputs: Inputs, row: int, audio_token_id: int) -> dict[str, torch.Tensor]:
    """One row of a batch as the reference takes it: alone, features times mask, filled chunks."""
    frames = int(inputs.frames_B[row])
    mel = np.zeros((128, 100 * -(-frames // 100)), np.float32)
    mel[:, :frames] = np.asarray(inputs.mel_BTM[row, :frames]).T
    mask = np.arange(mel.shape[1]) < frames
    text = np.asarray(inputs.text_BX[row, : inputs.text_lengths_B[row]]).tolist()
    at = int(inputs.audio_at_B[row])
    ids = text[:at] + [audio_token_id] * audio_tokens(frames) + text[at:]
    return {
        "input_ids": torch.tensor([ids]),
        "input_features": torch.tensor(mel[None]),
        "input_features_mask": torch.tensor(mask[None].astype(np.int64)),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """||ours - theirs|| / ||theirs||."""
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))

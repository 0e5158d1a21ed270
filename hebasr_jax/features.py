"""Log-mel features inside jit, equal to transformers' WhisperFeatureExtractor with 128 bins.

The steps (Whisper's front end, as Qwen3-ASR uses it): periodic Hann window of 400 samples every
160, reflected edges, power spectrum without the last frame, Slaney mel filters, log10 floored at
1e-10, a floor 8 below the clip's maximum, then (x + 4) / 4.
"""

from functools import cache
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int16

from hebasr_jax.audio import SAMPLE_RATE

HOP = 160  # samples between frames
WINDOW = 400  # samples under one frame
Count = TypeVar("Count", int, Array, np.ndarray)
_BLOCK = 80  # divides both HOP and WINDOW, so that frames are joined from whole blocks


@cache
def mel_filters(mel_bins: int) -> np.ndarray:
    """Triangular filters [201, mel_bins] over 0 to 8 kHz, float32, each of area 1 over Hz.

    Evenly spaced on the mel scale of Slaney's Auditory Toolbox (1998): 15 mel a kHz up to 1 kHz,
    above it 27 mel for each factor of 6.4. Whisper's filters; librosa and transformers have them
    too, but bring numba, or torch where torchaudio is installed.
    """
    top_mel = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    mel_E = np.linspace(0, top_mel, mel_bins + 2)
    edge_E = np.where(mel_E < 15, mel_E / 15, 6.4 ** ((mel_E - 15) / 27)) * 1000
    hertz_F1 = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
    low_M, middle_M, high_M = edge_E[:-2], edge_E[1:-1], edge_E[2:]
    rising_FM = (hertz_F1 - low_M) / (middle_M - low_M)
    falling_FM = (high_M - hertz_F1) / (high_M - middle_M)
    triangles_FM = np.maximum(0, np.minimum(rising_FM, falling_FM))
    return (triangles_FM * 2 / (high_M - low_M)).astype(np.float32)


def frame_count(samples: Count) -> Count:
    """Mel frames of a clip: one per whole hop. A clip under 160 samples has none."""
    return samples // HOP


def log_mel(
    wave_BS: Float[Array, "B S"] | Int16[Array, "B S"],
    samples_B: Int[Array, " B"],
    *,
    mel_bins: int,
) -> tuple[Float[Array, "B T {mel_bins}"], Int[Array, " B"]]:
    """Log-mel features of right-padded clips, each computed as if it were alone.

    Args:
      wave_BS: int16 samples, or floats in [-1, 1], at 16 kHz; S is at least 160.
      samples_B: valid samples of each row, at most S; what lies behind them is never read.
      mel_bins: number of mel filters.

    Returns:
      Features [B, S // 160, mel_bins] in float32, zero behind each clip's last frame, and the
      valid frames of each row. Under 201 samples, where torch's reflection is undefined, the
      reflection repeats (numpy's rule for `mode="reflect"`).
    """
    frames = wave_BS.shape[1] // HOP
    if frames == 0:
        raise ValueError(f"log_mel needs at least {HOP} samples a row, got {wave_BS.shape[1]}")
    if wave_BS.dtype == jnp.int16:
        wave_BS = wave_BS.astype(jnp.float32) / 32768.0
    # Block k of the reflected wave holds samples 80k - 200 ...; frame t is blocks 2t to 2t + 4.
    blocks = 2 * frames + 3
    position_P = jnp.arange(blocks * _BLOCK) - WINDOW // 2
    wave_BP = jnp.take_along_axis(wave_BS, _reflect(position_P, samples_B[:, None]), axis=1)
    wave_BKP = wave_BP.reshape(wave_BS.shape[0], blocks, _BLOCK).astype(jnp.float32)
    frame_BTP = jnp.concatenate(
        [wave_BKP[:, k : k + 2 * frames - 1 : 2] for k in range(WINDOW // _BLOCK)], axis=-1
    )
    hann_P = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    spectrum_BTF = jnp.fft.rfft(frame_BTP * hann_P.astype(np.float32), axis=-1)
    power_BTF = jnp.square(spectrum_BTF.real) + jnp.square(spectrum_BTF.imag)
    mel_BTM = jnp.matmul(
        power_BTF, jnp.asarray(mel_filters(mel_bins)), precision=jax.lax.Precision.HIGHEST
    )
    log_BTM = jnp.log10(jnp.maximum(mel_BTM, 1e-10))
    frames_B = frame_count(samples_B)
    valid_BT1 = (jnp.arange(frames) < frames_B[:, None])[..., None]
    loudest_B11 = jnp.max(log_BTM, axis=(1, 2), keepdims=True, where=valid_BT1, initial=-jnp.inf)
    log_BTM = (jnp.maximum(log_BTM, loudest_B11 - 8.0) + 4.0) / 4.0
    return jnp.where(valid_BT1, log_BTM, 0.0), frames_B


def _reflect(position: Array, length: Array) -> Array:
    """Index into a clip of `length` samples for any position, mirrored at both ends."""
    period = jnp.maximum(2 * (length - 1), 1)
    folded = jnp.mod(position, period)
    return jnp.where(folded < length, folded, period - folded)

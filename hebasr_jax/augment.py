"""Augmentation inside the training step: pure functions under jit, float32, no host work.

int16 wave -> speed -> noise -> band limit -> gain (`augment_wave`) -> log-mel -> masks over time
and mel bins (`mask_features`). The order is that of a recording: a voice, its room, the line, the
recorder. Draws follow from a row's two seed words alone: not from its batch, its place in it, the
padded length or the devices. An augmentation whose share is 0 compiles to nothing.
"""

from collections.abc import Callable
from fractions import Fraction
from math import ceil, pi
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int16, UInt32

from hebasr_jax.audio import SAMPLE_RATE, expand_inputs, read_audio
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Augment

Count = TypeVar("Count", int, np.ndarray, Array)

# What a draw is for; folded into the row's key, so these numbers never change.
_NOISE, _WHITE, _BAND, _GAIN, _TIME_MASKS, _MEL_MASKS = range(6)
_STOP_DB = 70.0  # attenuation of the resampling and band filters
_REACH = 160  # samples that the band and pink filters look to each side
_SPEED_REACH = 80  # the same of the resampler, at the lower of both rates: flat to 94 % of Nyquist
_NOISE_ROW_S = 10  # seconds of a noise bank's rows
_NOISE_ROWS = 4096  # at most: 1.3 GB
_NOISE_ROWS_EACH = 64  # at most, of one recording


def augment_wave(
    wave_BS: Float[Array, "B S"] | Int16[Array, "B S"],
    samples_B: Int[Array, " B"],
    speed_B: Float[Array, " B"],
    seed_B2: UInt32[Array, "B 2"],
    config: Augment,
    noise_NS: Float[Array, "N R"] | Int16[Array, "N R"] | None = None,
    *,
    out_samples: int,
) -> tuple[Float[Array, "B {out_samples}"], Int[Array, " B"]]:
    """Augmented waves of right-padded clips at 16 kHz, and their lengths.

    Args:
      wave_BS: int16 samples, or floats in [-1, 1].
      samples_B: valid samples of each row; what lies behind them is never read.
      speed_B: one of `config.speed_factors` for each row; any other value leaves the row as it is.
      seed_B2: the two words that all draws of a row come from.
      noise_NS: recordings to draw noise from (`load_noise`); None: white and pink noise.
      out_samples: length of the result, at least `perturbed_samples` of every row.

    Returns:
      float32 waves, zero behind each clip's end, and int samples. With the default `Augment()`
      the waves are the given ones, bit for bit.
    """
    if wave_BS.dtype == jnp.int16:
        wave_BS = wave_BS.astype(jnp.float32) / 32768.0
    wave_BS = _zero_behind(wave_BS.astype(jnp.float32), samples_B)
    wave_BS, samples_B = _perturb_speed(
        wave_BS, samples_B, speed_B, config.speed_factors, out_samples
    )
    if config.noise_share > 0:
        wave_BS = _add_noise(wave_BS, samples_B, seed_B2, config, noise_NS)
    if config.band_share > 0:
        wave_BS = _limit_band(wave_BS, samples_B, seed_B2, config)
    if config.gain_share > 0:
        wave_BS = _change_gain(wave_BS, seed_B2, config)
    return wave_BS, samples_B


def mask_features(
    mel_BTM: Float[Array, "B T M"],
    frames_B: Int[Array, " B"],
    seed_B2: UInt32[Array, "B 2"],
    config: Augment,
) -> Float[Array, "B T M"]:
    """SpecAugment (arXiv 1904.08779) on log-mel features, filled with the clip's mean.

    Each of `time_masks` masks is 0 to min(time_mask_frames, time_mask_share x frames) frames wide,
    each of `mel_masks` 0 to mel_mask_bins bins, drawn evenly, anywhere in the clip's own frames.
    Frames behind them stay as they are.
    """
    if not config.time_masks and not config.mel_masks:
        return mel_BTM
    rows, frames, bins = mel_BTM.shape
    valid_BT = jnp.arange(frames) < frames_B[:, None]
    masked_BTM = jnp.zeros((rows, 1, 1), bool)
    if config.time_masks:
        share_B = (config.time_mask_share * frames_B).astype(frames_B.dtype)
        widest_B = jnp.minimum(config.time_mask_frames, share_B)
        place_BK2 = _draw(seed_B2, _TIME_MASKS, (config.time_masks, 2))
        masked_BTM |= _spans(place_BK2, widest_B, frames_B, frames)[:, :, None]
    if config.mel_masks:
        widest_B = jnp.full_like(frames_B, min(config.mel_mask_bins, bins))
        place_BK2 = _draw(seed_B2, _MEL_MASKS, (config.mel_masks, 2))
        masked_BTM |= _spans(place_BK2, widest_B, jnp.full_like(frames_B, bins), bins)[:, None, :]
    valid_BT1 = valid_BT[..., None]
    total_B11 = jnp.sum(mel_BTM, axis=(1, 2), keepdims=True, where=valid_BT1)
    mean_B11 = total_B11 / jnp.maximum(frames_B * bins, 1)[:, None, None]
    return jnp.where(masked_BTM & valid_BT1, mean_B11, mel_BTM)


def speed_ratio(speed: float) -> Fraction:
    """A speed factor as input samples per output sample. Raises UserError where it is none."""
    ratio = Fraction(speed if 0.5 <= speed <= 2 else 0).limit_denominator(100)
    if abs(ratio - speed) > 1e-6 or not ratio:
        raise UserError(
            f"augment.speed_factors: {speed} cannot be used",
            "A factor lies between 0.5 and 2 and is a fraction with a denominator up to 100.",
            "Use for example 0.9, 1.0 and 1.1.",
        )
    return ratio


def perturbed_samples(samples: Count, speed: float) -> Count:
    """floor(samples / speed), exactly: the samples of a clip after speed perturbation."""
    ratio = speed_ratio(speed)
    whole, rest = samples // ratio.numerator, samples % ratio.numerator
    # samples * denominator would pass 2^31 for 20 minutes at 1.01.
    return whole * ratio.denominator + rest * ratio.denominator // ratio.numerator


def load_noise(path: str | None) -> np.ndarray | None:
    """A bank of the recordings in a folder: int16 [rows, 160000], each row's peak at full scale.

    Long recordings give several rows, short ones are repeated to fill theirs; silent ones give
    none. Raises UserError when nothing audible is found, or what `read_audio` raises.
    """
    if path is None:
        return None
    files = expand_inputs([path])
    if len(files) > _NOISE_ROWS:
        raise UserError(
            f"{path}: holds {len(files)} recordings",
            f"The noise stays in the device's memory, so that {_NOISE_ROWS} are the most.",
            "Give a folder with fewer.",
        )
    samples = _NOISE_ROW_S * SAMPLE_RATE
    each = min(_NOISE_ROWS_EACH, _NOISE_ROWS // len(files))
    bank = []
    for file in files:
        wave = read_audio(file, max_seconds=3600.0)
        rows = np.resize(wave, (min(max(1, len(wave) // samples), each), samples))
        peaks = np.abs(rows).max(axis=1)
        bank += [
            np.round(row * (32767 / peak)).astype(np.int16)
            for row, peak in zip(rows, peaks, strict=True)
            if peak > 0
        ]
    if not bank:
        raise UserError(f"{path}: every recording in it is silent", "", "Give recorded noise.")
    return np.stack(bank)


def _perturb_speed(
    wave_BS: Array, samples_B: Array, speed_B: Array, factors: tuple[float, ...], out_samples: int
) -> tuple[Array, Array]:
    """Kaldi's speed perturbation: pitch and tempo change together.

    Every factor is computed for all rows: a product with one fixed matrix is nearer to the peak
    than one with a gathered matrix per row, and factors share no block length in general.
    """
    missing = max(0, out_samples - wave_BS.shape[1])
    out_BS, lengths_B = jnp.pad(wave_BS, ((0, 0), (0, missing)))[:, :out_samples], samples_B
    for factor in sorted(set(factors) - {1.0}):
        ratio = speed_ratio(factor)
        reach = ceil(_SPEED_REACH * max(1.0, factor))
        # The stop band begins at the lower of the two Nyquist frequencies.
        edge = 0.5 * min(1.0, 1 / factor) - _transition(reach) / 2
        chosen_B = speed_B == np.float32(factor)
        sped_BS = _filter(wave_BS, _low_pass(edge, reach), reach, ratio, out_samples)
        out_BS = jnp.where(chosen_B[:, None], sped_BS, out_BS)
        lengths_B = jnp.where(chosen_B, perturbed_samples(samples_B, factor), lengths_B)
    return _zero_behind(out_BS, lengths_B), lengths_B


def _add_noise(
    wave_BS: Array, samples_B: Array, seed_B2: Array, config: Augment, noise_NS: Array | None
) -> Array:
    """Noise at a drawn ratio of the whole clip's energy to the noise's over the clip."""
    drawn_B, level_B, which_B, start_B = _draw(seed_B2, _NOISE, (4,)).T
    length = wave_BS.shape[1]
    if noise_NS is None:
        white_BS = _draw(seed_B2, _WHITE, (length,), jax.random.normal)
        pink_BS = _filter(white_BS, _pink, _REACH, Fraction(1), length)
        noise_BS = jnp.where(which_B[:, None] < 0.5, white_BS, pink_BS)
    else:
        rows, period = noise_NS.shape
        row_B, start_B = (which_B * rows).astype(jnp.int32), (start_B * period).astype(jnp.int32)
        at_BS = (start_B[:, None] + jnp.arange(length)) % period
        scale = 32768.0 if noise_NS.dtype == jnp.int16 else 1.0
        noise_BS = noise_NS[row_B[:, None], at_BS].astype(jnp.float32) / scale
    noise_BS = _zero_behind(noise_BS, samples_B)
    low, high = config.noise_snr_db
    snr_B = 10.0 ** ((low + level_B * (high - low)) / 20)
    norm_B, noise_norm_B = (jnp.sqrt(jnp.sum(x * x, axis=1)) for x in (wave_BS, noise_BS))
    audible_B = (drawn_B < config.noise_share) & (noise_norm_B > 0)
    gain_B = jnp.where(audible_B, norm_B / (noise_norm_B * snr_B), 0.0)
    return wave_BS + gain_B[:, None] * noise_BS


def _limit_band(wave_BS: Array, samples_B: Array, seed_B2: Array, config: Augment) -> Array:
    """A telephone-like band-pass, 6 dB down at both edges, without delay."""
    low, high = (hertz / SAMPLE_RATE for hertz in config.band_hz)
    if not 0 <= low < high <= 0.5:
        raise UserError(
            f"augment.band_hz: {config.band_hz} is no band",
            "The edges rise and lie between 0 and 8000 Hz.",
        )
    above, below = _low_pass(low, _REACH), _low_pass(high, _REACH)
    band_BS = _filter(wave_BS, lambda t: below(t) - above(t), _REACH, Fraction(1), wave_BS.shape[1])
    chosen_B = _draw(seed_B2, _BAND, ()) < config.band_share
    return jnp.where(chosen_B[:, None], _zero_behind(band_BS, samples_B), wave_BS)


def _change_gain(wave_BS: Array, seed_B2: Array, config: Augment) -> Array:
    """A drawn gain; what exceeds full scale is clipped, as a recorder does."""
    drawn_B, level_B = _draw(seed_B2, _GAIN, (2,)).T
    low, high = config.gain_db
    gain_B = 10.0 ** ((low + level_B * (high - low)) / 20)
    loud_BS = jnp.clip(gain_B[:, None] * wave_BS, -1.0, 1.0)
    return jnp.where(drawn_B[:, None] < config.gain_share, loud_BS, wave_BS)


def _draw(
    seed_B2: Array,
    kind: int,
    shape: tuple[int, ...],
    sampler: Callable[..., Array] = jax.random.uniform,
) -> Array:
    """Draws [B, *shape] of one kind, each row's from its own words. A longer draw begins as a
    shorter one does: JAX's threefry hashes each position by itself."""
    key_B = jax.random.wrap_key_data(seed_B2, impl="threefry2x32")
    return jax.vmap(lambda key: sampler(jax.random.fold_in(key, kind), shape))(key_B)


def _spans(place_BK2: Array, widest_B: Array, length_B: Array, size: int) -> Array:
    """Where any of K spans lies [B, size]; 0 to `widest_B` wide, within the first `length_B`."""
    width_BK = (place_BK2[..., 0] * (widest_B + 1)[:, None]).astype(jnp.int32)
    start_BK = (place_BK2[..., 1] * (length_B[:, None] - width_BK + 1)).astype(jnp.int32)
    offset_BKS = jnp.arange(size) - start_BK[..., None]
    return jnp.any((offset_BKS >= 0) & (offset_BKS < width_BK[..., None]), axis=1)


def _zero_behind(wave_BS: Array, samples_B: Array) -> Array:
    return jnp.where(jnp.arange(wave_BS.shape[1]) < samples_B[:, None], wave_BS, 0.0)


def _filter(
    wave_BS: Array,
    impulse: Callable[[np.ndarray], np.ndarray],
    reach: int,
    ratio: Fraction,
    out_samples: int,
) -> Array:
    """y[n] = sum over k of x[k] impulse(n ratio - k), zeros around x, as one product of matrices.

    impulse: response at times in samples of x; zero beyond `reach`. With ratio p / q the phases
    repeat after p samples of x and q of y. A block of x holds as many periods as `reach` needs
    to each side, so that a block and the start of the next give one block of y.
    """
    p, q = ratio.numerator, ratio.denominator
    periods = ceil(2 * reach / p)
    block_in, block_out = periods * p, periods * q
    from_I, to_O = np.arange(block_in + 2 * reach) - reach, np.arange(block_out) * p / q
    matrix_IO = impulse(to_O - from_I[:, None]).astype(np.float32)
    blocks = ceil(out_samples / block_out)
    wave_BS = wave_BS[:, : (blocks + 1) * block_in - reach]
    missing = (blocks + 1) * block_in - reach - wave_BS.shape[1]
    wave_BKI = jnp.pad(wave_BS, ((0, 0), (reach, missing))).reshape(-1, blocks + 1, block_in)
    wave_BKI = jnp.concatenate([wave_BKI[:, :-1], wave_BKI[:, 1:, : 2 * reach]], axis=-1)
    out_BKO = jnp.matmul(wave_BKI, matrix_IO, precision=jax.lax.Precision.HIGHEST)
    return out_BKO.reshape(-1, blocks * block_out)[:, :out_samples]


def _low_pass(edge: float, reach: int) -> Callable[[np.ndarray], np.ndarray]:
    """A sinc under Kaiser's window, 6 dB down at `edge` cycles per sample, down by `_STOP_DB`
    half a `_transition` further."""
    beta = 0.1102 * (_STOP_DB - 8.7)

    def impulse(time: np.ndarray) -> np.ndarray:
        inside = np.sqrt(np.clip(1 - (time / reach) ** 2, 0, 1))
        window = np.where(np.abs(time) <= reach, np.i0(beta * inside) / np.i0(beta), 0)
        return 2 * edge * np.sinc(2 * edge * time) * window

    return impulse


def _transition(reach: int) -> float:
    """Cycles per sample from the pass band to the stop band of `_low_pass` (Kaiser 1974)."""
    return (_STOP_DB - 7.95) / (2.285 * 2 * pi * 2 * reach)


def _pink(time: np.ndarray) -> np.ndarray:
    """Response that makes white noise pink above 100 Hz: half an integration (Kasdin 1995). It
    looks back only, so that a noise's beginning does not depend on its length."""
    k = np.arange(1, _REACH + 1)
    response = np.concatenate([[1.0], np.cumprod((k - 0.5) / k)])
    at = time.astype(int)
    return np.where((at >= 0) & (at <= _REACH), response[np.clip(at, 0, _REACH)], 0)

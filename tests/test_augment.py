"""Augmentation as properties: pitch, lengths, bands, ratios, masks, and draws of a clip's own."""

from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr

from hebasr_jax.augment import (
    augment_wave,
    load_noise,
    mask_features,
    perturbed_samples,
    speed_ratio,
)
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Augment

RATE = 16000
EVERYTHING = Augment(
    speed_factors=(0.9, 1.0, 1.1),
    time_masks=2,
    mel_masks=2,
    noise_share=0.7,
    gain_share=0.7,
    band_share=0.5,
)

_jitted = jax.jit(augment_wave, static_argnames=("config", "out_samples"))
_masked = jax.jit(mask_features, static_argnames="config")


def seeds(rows: int, first: int = 0) -> jax.Array:
    words = np.stack([np.arange(first, first + rows), np.arange(rows) * 7 + 1], axis=1)
    return jnp.asarray(words, jnp.uint32)


def augment(config, waves, *, speed=1.0, seed_B2=None, size=None, out=None, bank=None):
    """Results [samples] of clips in one batch; what lies behind a clip is poison, not zeros."""
    size = size or max(map(len, waves)) + 1
    wave_BS = np.full((len(waves), size), 9999 if waves[0].dtype == np.int16 else 0.3)
    for row, wave in enumerate(waves):
        wave_BS[row, : len(wave)] = wave
    samples_B = np.asarray([len(w) for w in waves], np.int32)
    speed_B = np.broadcast_to(np.float32(speed), len(waves))
    seed_B2 = seeds(len(waves)) if seed_B2 is None else seed_B2
    wave_BS = jnp.asarray(wave_BS, waves[0].dtype)
    out_BS, out_B = _jitted(
        wave_BS, samples_B, speed_B, seed_B2, config, bank, out_samples=out or size
    )
    assert out_BS.dtype == jnp.float32
    out_BS, out_B = np.asarray(out_BS), np.asarray(out_B)
    assert np.isfinite(out_BS).all()
    for row, samples in enumerate(out_B):
        assert not np.any(out_BS[row, samples:])
    return [out_BS[row, :n] for row, n in enumerate(out_B)]


def tone(hertz: float, seconds: float = 2.0, level: float = 0.5) -> np.ndarray:
    t = np.arange(int(RATE * seconds)) / RATE
    return (level * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def hiss(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def spectrum_db(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in Hz and levels in dB of a sine of amplitude 1; side lobes under -120 dB."""
    inner = wave[800:-800].astype(np.float64)
    window = np.kaiser(len(inner), 18)
    level = np.abs(np.fft.rfft(inner * window)) / window.sum() * 2
    return np.fft.rfftfreq(len(inner), 1 / RATE), 20 * np.log10(np.maximum(level, 1e-12))


@pytest.mark.parametrize(
    ("speed", "hertz"),
    [(0.9, 1000), (1.1, 1000), (0.9, 7500), (1.1, 6800), (0.5, 3300), (2.0, 3300), (0.97, 7300)],
)
def test_a_tone_moves_by_the_factor_without_images(speed, hertz) -> None:
    config = Augment(speed_factors=(1.0, speed))
    (moved,) = augment(config, [tone(hertz)], speed=speed, out=64000)
    f, level = spectrum_db(moved)
    peak = f[level.argmax()]
    assert abs(peak - speed * hertz) < 1.0
    assert abs(np.sqrt(2) * np.std(moved[800:-800]) - 0.5) < 0.002
    assert level[np.abs(f - peak) > 20].max() < level.max() - 68


@pytest.mark.parametrize(("speed", "hertz"), [(1.1, 7600.0), (1.1, 7300.0), (2.0, 4100.0)])
def test_a_tone_above_the_new_nyquist_is_removed(speed, hertz) -> None:
    config = Augment(speed_factors=(1.0, speed))
    (moved,) = augment(config, [tone(hertz)], speed=speed)
    assert spectrum_db(moved)[1].max() < 20 * np.log10(0.5) - 68


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_equals_soxr(speed) -> None:
    """Noise below 6.2 kHz, full band to both; a quarter second from the ends."""
    wave = soxr.resample(soxr.resample(hiss(32000), 16000, 12400), 12400, 16000)
    ratio = speed_ratio(speed)
    (ours,) = augment(Augment(speed_factors=(speed,)), [wave], speed=speed, out=40000)
    theirs = soxr.resample(wave.astype(np.float64), ratio.numerator, ratio.denominator, "VHQ")
    error = (ours - theirs[: len(ours)])[4000:-4000]
    assert np.sqrt(np.mean(error**2) / np.mean(theirs**2)) < 5e-4


def test_each_row_has_its_own_speed_and_1_is_the_input() -> None:
    config = Augment(speed_factors=(0.9, 1.0, 1.1))
    wave = hiss(5001)
    slow, same, fast = augment(config, [wave] * 3, speed=[0.9, 1.0, 1.1], out=6000)
    assert [len(slow), len(same), len(fast)] == [5556, 5001, 4546]
    np.testing.assert_array_equal(same, wave)
    np.testing.assert_allclose(slow, augment(config, [wave], speed=0.9, out=6000)[0], atol=1e-6)
    np.testing.assert_allclose(fast, augment(config, [wave], speed=1.1, out=6000)[0], atol=1e-6)


def test_lengths_are_the_floor_of_the_quotient() -> None:
    """Also of 22 minutes, whose product with a denominator is more than an int32 holds."""
    speeds = (0.9, 1.1, 0.5, 2.0, 0.97, 1.03, 4 / 3, 1.01)
    samples = np.asarray([0, 1, 2, 10, 11, 12, 89, 90, 479999, 480000, 960000, 1347 * 16000])
    for speed in speeds:
        ratio = Fraction(speed).limit_denominator(100)
        expected = [n * ratio.denominator // ratio.numerator for n in samples.tolist()]
        assert perturbed_samples(samples, speed).tolist() == expected
        assert jax.jit(perturbed_samples, static_argnums=1)(samples, speed).tolist() == expected
        assert [perturbed_samples(n, speed) for n in samples.tolist()] == expected
    pairs = [(n, speed) for speed in speeds for n in (0, 1, 2, 11, 399, 400)]
    waves = [hiss(n) for n, _ in pairs]
    moved = augment(Augment(speed_factors=speeds), waves, speed=[s for _, s in pairs], out=801)
    assert [len(w) for w in moved] == [perturbed_samples(n, speed) for n, speed in pairs]


@pytest.mark.parametrize("speed", [0.0, 0.49, 2.01, 0.912345, float("nan")])
def test_a_factor_that_is_none_is_refused(speed) -> None:
    with pytest.raises(UserError, match="speed_factors"):
        speed_ratio(speed)


def test_the_default_is_the_identity() -> None:
    waves = [np.asarray([-32768, 32767, 0, 1, -1], np.int16), np.arange(-50, 50, dtype=np.int16)]
    for wave, same in zip(waves, augment(Augment(), waves, size=400, out=320), strict=True):
        np.testing.assert_array_equal(same, wave.astype(np.float32) / 32768)
    mel_BTM = hiss(2 * 7 * 5).reshape(2, 7, 5)
    out_BTM = mask_features(jnp.asarray(mel_BTM), jnp.asarray([7, 3]), seeds(2), Augment())
    np.testing.assert_array_equal(out_BTM, mel_BTM)


def test_what_is_off_is_not_in_the_program() -> None:
    def program(config: Augment) -> str:
        shapes = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in [
                ((2, 800), jnp.int16),
                ((2,), jnp.int32),
                ((2,), jnp.float32),
                ((2, 2), jnp.uint32),
            ]
        )
        return str(jax.make_jaxpr(lambda *a: augment_wave(*a, config, out_samples=800))(*shapes))

    off = program(Augment(noise_path="x", band_hz=(200.0, 3000.0), speed_factors=(1.0, 1.0)))
    assert not any(word in off for word in ("dot_general", "threefry", "random", "sin", "clamp"))
    assert "dot_general" in program(Augment(band_share=0.1))
    assert "random" in program(Augment(gain_share=0.1))


@pytest.mark.parametrize("bank", [None, (3000 * hiss(3 * 701)).astype(np.int16).reshape(3, 701)])
def test_a_clip_gets_the_same_draw_in_any_batch(bank) -> None:
    """Whatever its row, its neighbours, and the padded length before and after."""
    clips = [hiss(n, n) for n in (3000, 3333, 3666, 3666)]  # all 3,332 or 3,333 samples after
    seed_B2, speed_B = seeds(4, first=5), [0.9, 1.0, 1.1, 1.1]
    for clip, words, speed, alone in zip(
        clips,
        seed_B2,
        speed_B,
        augment(EVERYTHING, clips, speed=speed_B, seed_B2=seed_B2, out=3333, bank=bank),
        strict=True,
    ):
        others = [hiss(4321, 1), clip, hiss(77, 2)]
        some = np.stack([words + 9, words, words * 3])
        (_, again, _) = augment(
            EVERYTHING, others, speed=speed, seed_B2=some, size=6400, out=8000, bank=bank
        )
        np.testing.assert_allclose(again, alone, atol=1e-6)
        assert np.abs(alone).max() > 0


def test_clips_differ_in_their_draws_and_kinds_in_theirs() -> None:
    wave, changed = hiss(50), []
    for name in ("noise_share", "gain_share", "band_share"):
        out = augment(Augment(**{name: 0.5}), [wave] * 200, seed_B2=seeds(200))
        changed.append([np.any(w != wave) for w in out])
    assert np.all(np.abs(np.mean(changed, axis=1) - 0.5) < 0.12)  # 3.4 standard deviations
    assert np.all(np.abs(np.corrcoef(changed)[np.triu_indices(3, 1)]) < 0.25)


@pytest.mark.parametrize("with_bank", [False, True])
def test_the_ratio_to_the_noise_is_the_drawn_one(with_bank) -> None:
    """A range of one value, over the whole valid part and not behind it."""
    bank = jnp.asarray(hiss(2 * 997).reshape(2, 997)) if with_bank else None
    half_silent = np.concatenate([np.zeros(3000, np.float32), hiss(1000)])
    waves = [tone(300, 0.2), hiss(4000), half_silent]
    for snr_db in (5.0, 20.0):
        config = Augment(noise_share=1.0, noise_snr_db=(snr_db, snr_db))
        for wave, noisy in zip(waves, augment(config, waves, size=8000, bank=bank), strict=True):
            added = (noisy - wave).astype(np.float64)
            measured = 10 * np.log10(np.sum(wave.astype(np.float64) ** 2) / np.sum(added**2))
            assert abs(measured - snr_db) < 0.05


def test_drawn_ratios_and_gains_fill_their_range() -> None:
    waves = [hiss(400)] * 100
    config = Augment(noise_share=1.0, noise_snr_db=(5.0, 30.0))
    noisy = np.stack(augment(config, waves))
    snr = 10 * np.log10(np.sum(waves[0] ** 2) / np.sum((noisy - waves[0]) ** 2, axis=1))
    louder = np.stack(augment(Augment(gain_share=1.0, gain_db=(-12.0, 6.0)), waves))
    gain = 20 * np.log10(np.max(np.abs(louder), axis=1) / np.max(np.abs(waves[0])))
    for values, low, high in ((snr, 5, 30), (gain, -12, 6)):
        assert low - 0.05 <= values.min() < low + 0.1 * (high - low)
        assert high + 0.05 >= values.max() > high - 0.1 * (high - low)
        assert abs(values.mean() - (low + high) / 2) < 0.1 * (high - low)  # 3.5 deviations


def test_noise_without_a_bank_is_white_or_pink() -> None:
    config = Augment(noise_share=1.0, noise_snr_db=(0.0, 0.0))
    silent = np.zeros(32000, np.float32)
    silent[0] = 1.0  # energy to measure the ratio by
    slopes = []
    for noise in augment(config, [silent] * 12, size=32000):
        power = np.abs(np.fft.rfft(noise[1:])) ** 2
        octave = [power[2 * f : 4 * f].mean() for f in (125, 250, 500, 1000, 2000)]
        slopes.append(10 * np.polyfit(range(5), np.log10(octave), 1)[0])
    white, pink = [s for s in slopes if s > -1.5], [s for s in slopes if s <= -1.5]
    assert white
    assert pink
    assert np.all(np.abs(white) < 0.5)
    assert np.all(np.abs(np.asarray(pink) + 3) < 0.5)  # dB per octave


def test_bank_noise_is_a_turned_row_of_the_bank() -> None:
    bank = np.stack([np.arange(1, 101), np.arange(1001, 1101)]).astype(np.int16)
    config = Augment(noise_share=1.0, noise_snr_db=(0.0, 0.0))
    wave = np.full(250, 1e-3, np.float32)
    rows, starts = set(), set()
    for noisy in augment(config, [wave] * 40, bank=bank):
        added = noisy.astype(np.float64) - wave
        fits = [
            (np.abs(added / turned * turned.mean() - added.mean()).max(), row, start)
            for row in range(2)
            for start in range(100)
            for turned in [np.resize(np.roll(bank[row], -start), 250).astype(np.float64)]
        ]
        error, row, start = min(fits)
        assert error < 1e-5
        rows.add(row)
        starts.add(start)
    assert rows == {0, 1}
    assert len(starts) > 20


def test_silence_and_tiny_clips_stay_finite() -> None:
    """`augment` checks that everything is finite; silence stays silence."""
    full = np.tile(np.repeat(np.asarray([-32768, 32767], np.int16), 8), 50)
    config = replace(EVERYTHING, noise_share=1.0, band_share=1.0, gain_share=1.0)
    waves = [full[:0], full[:1], np.zeros(800, np.int16), full] * 3
    for bank in (None, jnp.zeros((1, 5)), jnp.full((1, 5), 1e-30)):
        out = augment(config, waves, speed=[0.9] * 4 + [1.0] * 4 + [1.1] * 4, out=900, bank=bank)
        assert [len(w) for w in out[0::4]] == [0, 0, 0]
        assert [len(w) for w in out[1::4]] == [1, 1, 0]
        assert not np.any(out[2::4][1])
        assert all(0.1 < np.abs(w).max() <= 1.0 for w in out[3::4])


def test_gain_clips_at_full_scale() -> None:
    config = Augment(gain_share=1.0, gain_db=(6.0, 6.0))
    wave = tone(200, 0.1, 0.9)
    (loud,) = augment(config, [wave])
    np.testing.assert_allclose(loud, np.clip(wave * 10 ** (6 / 20), -1, 1), atol=1e-6)
    assert loud.max() == 1.0


@pytest.mark.parametrize("band_hz", [(300.0, 3400.0), (0.0, 4000.0), (500.0, 8000.0)])
def test_the_band_is_passed_and_the_rest_is_not(band_hz) -> None:
    config = Augment(band_share=1.0, band_hz=band_hz)
    click = np.eye(1, 4001, 2000, dtype=np.float32)[0]
    (response,) = augment(config, [click])
    np.testing.assert_allclose(response, response[::-1], atol=1e-6)  # no delay
    level = 20 * np.log10(np.abs(np.fft.rfft(response, 16000)) + 1e-9)
    f, (low, high) = np.arange(8001), band_hz
    passed = (f > low + (low > 0) * 120) & (f < high - (high < 8000) * 120)
    assert np.abs(level[passed]).max() < 0.1
    stopped = (f < low - 120) | (f > high + 120)
    assert level[stopped].max(initial=-999) < -60


def test_a_band_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="band_hz"):
        augment(Augment(band_share=1.0, band_hz=(3400.0, 300.0)), [hiss(10)])


def test_jit_and_eager_agree() -> None:
    clips = jnp.asarray(np.stack([hiss(640, 1), hiss(640, 2)]))
    given = (clips, jnp.asarray([640, 300]), jnp.asarray([0.9, 1.0], jnp.float32), seeds(2))
    config, bank = Augment(speed_factors=(0.9, 1.0), noise_share=1.0), jnp.ones((1, 9))
    eager_BS, eager_B = augment_wave(*given, config, bank, out_samples=720)
    jitted_BS, jitted_B = _jitted(*given, config, bank, out_samples=720)
    np.testing.assert_allclose(eager_BS, jitted_BS, atol=1e-6)
    np.testing.assert_array_equal(eager_B, jitted_B)


BOTH = Augment(time_masks=2, mel_masks=2, mel_mask_bins=9)
NARROW = Augment(time_masks=1, time_mask_frames=6)


def masks(config: Augment, frames: int, first: int = 0, rows: int = 64, size: int = 100):
    """Features with every value its own, then masked, and where that changed them."""
    mel_BTM = np.random.default_rng(3).standard_normal((64, 1, 40)).astype(np.float32)
    mel_BTM = mel_BTM[first : first + rows] + np.linspace(0, 1, size, dtype=np.float32)[:, None]
    mel_BTM[:, frames:] = 0
    frames_B, seed_B2 = jnp.full(rows, frames, jnp.int32), seeds(64)[first : first + rows]
    out_BTM = np.asarray(_masked(jnp.asarray(mel_BTM), frames_B, seed_B2, config))
    return mel_BTM, out_BTM, out_BTM != mel_BTM


def test_masks_stay_inside_and_hold_the_mean() -> None:
    mel_BTM, out_BTM, masked_BTM = masks(BOTH, frames=50)
    assert not masked_BTM[:, 50:].any()
    assert masked_BTM.any(axis=(1, 2)).mean() > 0.9
    for row in np.flatnonzero(masked_BTM.any(axis=(1, 2))):
        mean = mel_BTM[row, :50].mean(dtype=np.float64)
        np.testing.assert_allclose(out_BTM[row][masked_BTM[row]], mean, atol=1e-6)


def test_time_masks_cover_frames_and_mel_masks_bins() -> None:
    """Features are (batch, time, mel); the widths reach their bounds and no further."""
    _, _, time_BTM = masks(NARROW, frames=90)
    time_BT = time_BTM.any(axis=2)
    assert np.array_equal(time_BTM.all(axis=2), time_BT)
    assert set(time_BT.sum(axis=1)) == set(range(7))
    at_T = np.flatnonzero(time_BT.any(axis=0))
    assert at_T.min() < 8
    assert 80 < at_T.max() < 90
    _, _, mel_BTM = masks(Augment(mel_masks=1, mel_mask_bins=5), frames=90)
    mel_BM = mel_BTM.any(axis=1)
    assert np.array_equal(mel_BTM[:, :90].all(axis=1), mel_BM)
    assert set(mel_BM.sum(axis=1)) == set(range(6))
    assert mel_BM.any(axis=0).mean() > 0.9


def test_a_time_mask_is_at_most_its_share_of_the_clip() -> None:
    for frames, widest in ((50, 6), (20, 4), (4, 0), (0, 0)):
        _, out_BTM, masked_BTM = masks(NARROW, frames=frames)
        assert masked_BTM.any(axis=2).sum(axis=1).max() == widest
        assert np.isfinite(out_BTM).all()


def test_every_width_and_place_is_as_likely() -> None:
    """A mask up to the whole clip covers half of it on average, the beginning as the end."""
    _, _, masked_BTM = masks(replace(NARROW, time_mask_frames=90, time_mask_share=1.0), frames=90)
    covered_BT = masked_BTM[:, :90].any(axis=2)
    assert abs(covered_BT.mean() - 0.5) < 0.13  # 3.6 standard deviations
    assert abs(covered_BT[:, :45].mean() - covered_BT[:, 45:].mean()) < 0.2


def test_masks_are_the_clips_own_in_any_batch() -> None:
    _, _, together_BTM = masks(BOTH, frames=50)
    _, _, alone_BTM = masks(BOTH, frames=50, first=17, rows=1, size=60)
    assert alone_BTM.any()
    np.testing.assert_array_equal(alone_BTM[0, :50], together_BTM[17, :50])


def test_the_noise_bank(tmp_path) -> None:
    assert load_noise(None) is None
    with pytest.raises(UserError):
        load_noise(str(tmp_path))
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), RATE)
    with pytest.raises(UserError, match="silent"):
        load_noise(str(tmp_path))
    short, long = hiss(12000, 1), hiss(330000, 2)
    soundfile.write(tmp_path / "b.wav", short, RATE, "FLOAT")
    soundfile.write(tmp_path / "a.wav", long, RATE, "FLOAT")
    bank = load_noise(str(tmp_path))
    assert bank.dtype == np.int16
    assert bank.shape == (3, 160000)  # two rows of the long one, the short one repeated
    assert np.all(np.abs(bank.astype(int)).max(axis=1) == 32767)
    for row, wave in zip(
        bank, (long[:160000], long[160000:320000], np.resize(short, 160000)), strict=True
    ):
        np.testing.assert_allclose(row, wave / np.abs(wave).max() * 32767, atol=0.51)

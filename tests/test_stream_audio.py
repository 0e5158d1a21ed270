"""stream_audio: the blocks of a file are what read_audio returns, and a fault comes first."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from memory import peak_anonymous

from hebasr_jax import audio
from hebasr_jax.audio import SAMPLE_RATE, read_audio, stream_audio
from hebasr_jax.errors import UserError

KEPT_S = (0.0, 2.0, 120.0)  # decoded twice, twice with something kept at first, once


def speechlike(samples: int, peak: float = 0.9) -> np.ndarray:
    wave = np.random.default_rng(samples).standard_normal(samples)
    return (peak * wave / np.abs(wave).max()).astype(np.float32)


def write(path: Path, wave: np.ndarray, rate: int, **options: str) -> Path:
    soundfile.write(path, wave, rate, **options)
    return path


@pytest.mark.parametrize("kept_s", KEPT_S)
@pytest.mark.parametrize("peak", [0.9, 3.0])
@pytest.mark.parametrize(
    ("name", "rate"), [("a.wav", 16_000), ("a.flac", 44_100), ("a.mp3", 8_000)]
)
def test_stream_and_whole_agree_sample_for_sample(
    tmp_path, monkeypatch, name, rate, peak, kept_s
) -> None:
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 10_000)
    subtype = {"subtype": "FLOAT"} if name.endswith("wav") else {}
    path = write(tmp_path / name, speechlike(5 * rate, peak), rate, **subtype)
    blocks = list(stream_audio(path, kept_s=kept_s))
    assert len(blocks) > 4
    whole = read_audio(path, max_seconds=60.0)
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    if peak > 1 and subtype:
        assert np.abs(whole).max() == 1.0


@pytest.mark.parametrize("kept_s", KEPT_S)
def test_nothing_comes_of_a_file_with_a_fault_at_its_end(tmp_path, monkeypatch, kept_s) -> None:
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 10_000)
    path = write(tmp_path / "cut.flac", speechlike(5 * SAMPLE_RATE), SAMPLE_RATE)
    os.truncate(path, int(path.stat().st_size * 0.95))
    wave = speechlike(5 * SAMPLE_RATE)
    wave[-1] = np.nan
    for bad in (path, write(tmp_path / "nan.wav", wave, SAMPLE_RATE, subtype="FLOAT")):
        with pytest.raises(UserError, match=r"cut or damaged|NaN"):
            next(stream_audio(bad, kept_s=kept_s))


def test_sound_beyond_the_head_is_not_doubled_by_the_second_decoder(tmp_path) -> None:
    path = write(tmp_path / "a.mp3", speechlike(12 * SAMPLE_RATE), SAMPLE_RATE)
    path.write_bytes(2 * path.read_bytes())
    for kept_s in KEPT_S:
        samples = sum(map(len, stream_audio(path, kept_s=kept_s)))
        assert samples / SAMPLE_RATE == pytest.approx(24, abs=0.2)


def test_a_limit_holds_and_hours_take_little_memory(tmp_path) -> None:
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 2_000, 1, "PCM_16") as file:
        for _ in range(3):
            file.write(np.zeros(3600 * 2_000, np.int16))
    with pytest.raises(UserError, match="limit of 3600 s"):
        next(stream_audio(tmp_path / "long.flac", max_seconds=3600.0))
    with peak_anonymous() as growth:
        samples = sum(map(len, stream_audio(tmp_path / "long.flac")))
    assert samples == 3 * 3600 * SAMPLE_RATE
    assert growth[0] < 4 * 120 * SAMPLE_RATE + 60e6  # what is kept, and a few blocks

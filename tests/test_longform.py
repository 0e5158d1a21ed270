"""recognize_long: an oracle in the model's place loses, doubles and fuses no word at a joint."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from memory import peak_anonymous

from hebasr_jax import longform, silence
from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.errors import UserError
from hebasr_jax.longform import Cutting, Failure, LongRecognition, Sound, recognize_long
from hebasr_jax.text import Transcript
from hebasr_jax.timestamps import Segment
from hebasr_jax.transcribe import MAX_CLIP_S, Recognition

RATE = SAMPLE_RATE
Word = tuple[int, int, str]  # first and last sample, text


def spoken(count: int, seed: int) -> tuple[np.ndarray, list[Word]]:
    """Words as bursts of noise: with closures inside, short pauses in phrases, longer between."""
    rng = np.random.default_rng(seed)
    parts, words, at = [], [], 0
    for number in range(count):
        phrase_ends = rng.random() < 0.15
        pause_s = rng.uniform(0.2, 1.0) if phrase_ends else rng.uniform(0.06, 0.15)
        samples, pause = round(rng.uniform(0.15, 0.7) * RATE), round(pause_s * RATE)
        wave = rng.standard_normal(samples, np.float32) * np.float32(rng.uniform(0.03, 0.2))
        if samples > 0.4 * RATE:
            closure = round(rng.uniform(0.3, 0.6) * samples)
            wave[closure : closure + round(0.05 * RATE)] *= 0.02
        words.append((at, at + samples, f"מילה{number}"))
        parts += [wave, np.zeros(pause, np.float32)]
        at += samples + pause
    wave = np.concatenate(parts)
    return wave + np.float32(1e-4) * rng.standard_normal(len(wave), np.float32), words


@dataclass
class Oracle:
    """Knows the recordings; finds a piece by its samples, and returns the words that lie in it."""

    recordings: Sequence[tuple[np.ndarray, list[Word]]]
    stamps: bool = False
    contexts: list[str] = field(default_factory=list)
    calls_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = {
            wave[at : at + 8].tobytes(): (number, at)
            for number, (wave, _) in enumerate(self.recordings)
            for at in range(0, len(wave), silence.FRAME)
        }

    def __call__(self, waves: Sequence[np.ndarray], contexts: Sequence[str]) -> list[Recognition]:
        self.calls_s.append(sum(map(len, waves)) / RATE)
        self.contexts += contexts
        return [self._one(wave) for wave in waves]

    def _one(self, piece: np.ndarray) -> Recognition:
        number, start = self.places[piece[:8].tobytes()]
        wave, words = self.recordings[number]
        np.testing.assert_array_equal(wave[start : start + len(piece)], piece)
        end = start + len(piece)
        inside = [word for word in words if start <= word[0] and word[1] <= end]
        segments = tuple(
            Segment((first - start) / RATE, (last - start) / RATE, text)
            for first, last, text in inside * self.stamps
        )
        transcript = Transcript("Hebrew", " ".join(text for _, _, text in inside), segments)
        return Recognition(transcript, tuple(range(len(inside))), len(piece) / RATE, True)


def sound(name: str, wave: np.ndarray, block: int = 100_000) -> Sound:
    return Sound(name, lambda: iter(np.array_split(wave, len(wave) // block + 1)))


def texts(words: list[Word]) -> str:
    return " ".join(text for _, _, text in words)


@pytest.fixture(scope="module")
def clips() -> list[tuple[np.ndarray, list[Word]]]:
    return [spoken(900, seed) for seed in range(8)]


@pytest.fixture(scope="module")
def hour(clips) -> tuple[np.ndarray, list[Word]]:
    """The clips one after the other: an hour."""
    starts = [0, *itertools.accumulate(len(wave) for wave, _ in clips)]
    words = [
        (start + first, start + last, f"{text}-{clip}")
        for clip, (start, (_, of_clip)) in enumerate(zip(starts, clips, strict=False))
        for first, last, text in of_clip
    ]
    return np.concatenate([wave for wave, _ in clips]), words


def one(decode, wave: np.ndarray, cutting: Cutting) -> LongRecognition:
    [result] = recognize_long(decode, [sound("hour", wave)], cutting)
    return result


@pytest.mark.parametrize("cutting", [Cutting(), Cutting(piece_s=12.0, search_s=5.0)])
def test_an_hour_comes_back_with_no_word_lost_doubled_or_fused(hour, cutting) -> None:
    wave, words = hour
    oracle = Oracle([hour], stamps=True)
    result = one(oracle, wave, cutting)
    assert len(wave) / RATE > 3500
    assert result.text == texts(words)
    assert result.pieces > len(wave) / RATE / cutting.piece_s
    for segment, (first, last, text) in zip(result.segments, words, strict=True):
        assert segment.text == text
        assert (segment.start_s, segment.end_s) == pytest.approx((first / RATE, last / RATE))
    assert len(result.tokens) == len(words)
    assert result.duration_s == len(wave) / RATE


def test_the_oracle_sees_words_that_a_blind_cut_splits(hour, monkeypatch) -> None:
    monkeypatch.setattr(silence, "_quietest", lambda held, first, last, levels: last)
    found = one(Oracle([hour]), hour[0], Cutting()).text.split()
    assert 30 < len(hour[1]) - len(found) < 120


def test_recordings_share_calls_and_come_back_in_order(clips) -> None:
    oracle = Oracle(clips)
    sounds = [sound(str(n), wave) for n, (wave, _) in enumerate(clips)]
    results = list(recognize_long(oracle, sounds, Cutting()))
    assert [result.name for result in results] == list("01234567")
    assert [result.text for result in results] == [texts(words) for _, words in clips]
    assert len(oracle.calls_s) <= 2
    assert set(oracle.contexts) == {""}


def test_text_is_carried_only_when_asked_and_then_for_each_recording(clips, monkeypatch) -> None:
    monkeypatch.setattr(longform, "_LANES", 3)
    oracle = Oracle(clips[:5])
    sounds = [sound(str(n), wave) for n, (wave, _) in enumerate(clips[:5])]
    results = list(recognize_long(oracle, sounds, Cutting(carry_text=True)))
    assert [result.text for result in results] == [texts(words) for _, words in clips[:5]]
    most = max(result.pieces for result in results)
    assert len(oracle.calls_s) < 2 * most + 3  # three at a time
    assert oracle.contexts[:3] == ["", "", ""]
    for context in oracle.contexts[3:6]:
        assert any(texts(words).startswith(context) for _, words in clips[:3])
        assert context
    assert max(map(len, oracle.contexts)) == longform._CONTEXT_CHARACTERS


def answers(*rows: tuple) -> longform.Decode:
    """Recognitions in turn: text, language, finished, loops."""
    left = iter(rows)

    def decode(waves, contexts) -> list[Recognition]:
        found = []
        for wave in waves:
            text, language, finished, loops = next(left)
            transcript = Transcript(language, text)
            found.append(Recognition(transcript, (7,), len(wave) / RATE, finished, loops))
        return found

    return decode


def test_what_pieces_say_is_added_up() -> None:
    burst = 0.1 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    wave = np.concatenate([np.pad(burst, (RATE, RATE))] * 4)  # 12 s: a burst in every 3
    decode = answers(
        (" שלום", "Hebrew", True, 0),
        ("", None, True, 1),
        ("good", "English", False, 2),
        ("עולם ", "Hebrew", True, 0),
    )
    result = one(decode, wave, Cutting(piece_s=5.0, search_s=2.0))
    assert (result.text, result.language) == ("שלום good עולם", "Hebrew")
    assert (result.loops, result.finished, result.pieces) == (3, False, 4)
    assert result.tokens == (7, 7, 7, 7)
    [(start_s, end_s)] = result.unfinished_s
    assert 5 < start_s < 7
    assert 8 < end_s < 10
    assert [segment.text for segment in result.segments] == ["שלום", "good", "עולם"]
    assert result.segments[0].tokens == (7,)
    for segment, burst_s in zip(result.segments, (1, 7, 10), strict=True):
        times = (segment.start_s, segment.end_s)
        assert times == pytest.approx((burst_s - 0.1, burst_s + 1.1), abs=0.02)


def test_a_recording_that_fails_does_not_stop_the_others(clips) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield clips[1][0]
        raise UserError("b.wav: is cut or damaged")

    for carry_text in (False, True):
        oracle = Oracle(clips[:3])
        sounds = [sound("a", clips[0][0]), Sound("b", broken), sound("c", clips[2][0])]
        first, bad, last = recognize_long(oracle, sounds, Cutting(carry_text=carry_text))
        assert isinstance(bad, Failure)
        assert (bad.name, str(bad.error)) == ("b", "b.wav: is cut or damaged")
        assert [first.text, last.text] == [texts(clips[n][1]) for n in (0, 2)]


def test_no_sound_no_text() -> None:
    assert list(recognize_long(answers(), [], Cutting())) == []
    [nothing] = recognize_long(answers(), [Sound("empty", lambda: iter(()))], Cutting())
    assert nothing == LongRecognition("empty", "", None, (), (), 0.0, True, 0, 0)


def test_memory_is_bounded_by_a_call(monkeypatch) -> None:
    """An hour as a stream, of 230 MB, ten minutes a call."""
    monkeypatch.setattr(longform, "_CALL_S", 600.0)
    block = 0.1 * np.random.default_rng(0).standard_normal(60 * RATE).astype(np.float32)
    stream = Sound("ten", lambda: iter([block] * 60))
    decode = answers(*[("מילה", "Hebrew", True, 0)] * 200)
    with peak_anonymous() as growth:
        [result] = recognize_long(decode, [stream], Cutting())
    assert result.duration_s == 3600
    assert growth[0] < 120e6


@pytest.mark.parametrize(
    ("piece_s", "search_s"),
    [(0.5, 0.2), (MAX_CLIP_S + 1, 10.0), (30.0, 0.0), (30.0, 15.1), (float("nan"), 10.0)],
)
def test_pieces_that_cannot_be_had(piece_s, search_s) -> None:
    with pytest.raises(UserError, match=r"cannot be (had|sought)"):
        Cutting(piece_s, search_s)

"""The six public Hebrew test sets, and what others are reported to score on them."""

from dataclasses import dataclass
from typing import Literal

from hebasr_jax.errors import UserError


@dataclass(frozen=True)
class BenchmarkSet:
    """A test set on the hub.

    rows: whole recordings or short clips; a bootstrap draws what a row is.
    licence: as its card says; None: it says nothing.
    """

    name: str
    hub: str
    config: str | None
    split: str
    text: str
    gated: bool
    rows: Literal["recordings", "clips"]
    licence: str | None


_IVRIT = "ivrit.ai licence v2"
BENCHMARK_SETS = (
    BenchmarkSet("eval-d1", "ivrit-ai/eval-d1", None, "test", "text", False, "recordings", _IVRIT),
    BenchmarkSet(
        "eval-whatsapp", "ivrit-ai/eval-whatsapp", None, "test", "text", True, "recordings", _IVRIT
    ),
    BenchmarkSet(
        "saspeech", "upai-inc/saspeech", None, "test", "text", False, "clips", "non-commercial"
    ),
    BenchmarkSet(
        "fleurs", "google/fleurs", "he_il", "test", "transcription", False, "clips", "CC-BY-4.0"
    ),
    BenchmarkSet(
        "common-voice",
        "mozilla-foundation/common_voice_17_0",
        "he",
        "test",
        "sentence",
        True,
        "clips",
        "CC0-1.0",
    ),
    BenchmarkSet(
        "kan",
        "imvladikon/hebrew_speech_kan",
        None,
        "validation",
        "sentence",
        False,
        "clips",
        None,
    ),
)


def benchmark_set(name: str) -> BenchmarkSet:
    """The set of this name; a UserError names the six."""
    for row in BENCHMARK_SETS:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in BENCHMARK_SETS)
    do = "Give data of your own with --manifest, or a copy of a set as NAME=PATH."
    raise UserError(f"{name}: is no set that is known", f"The sets are {known}.", do)


@dataclass(frozen=True)
class Published:
    """WER in percent as others report it. It was not measured here, and systems, versions and
    decoding differ: the same weights moved by up to two points between two editions of the board.
    """

    system: str
    source: str
    wer_percent: dict[str, float]


_BOARD = "ivrit.ai's Hebrew transcription leaderboard, read September 2026"


def _published(system: str, *wer_percent: float | None, source: str = _BOARD) -> Published:
    names = (row.name for row in BENCHMARK_SETS)
    pairs = zip(names, wer_percent, strict=True)
    return Published(system, source, {name: wer for name, wer in pairs if wer is not None})


# In the order of the six. The board dropped its column of Common Voice after 2024.
PUBLISHED = (
    _published(
        "ivrit-ai/whisper-large-v3-ct2, 2025-05-13",
        *(5.1, 7.2, 6.4, 17.4, 14.9, 8.1),
        source=f"{_BOARD}; Common Voice: the model's card",
    ),
    _published("ivrit-ai/whisper-large-v3-turbo-ct2, 2025-05-13", 5.3, 7.1, 6.6, 18.1, None, 8.2),
    _published("ivrit-ai/whisper-large-v3-turbo-ct2, 2025-04-03", 5.5, 6.1, 7.4, 20.8, None, 10.0),
    _published("Soniox", 4.8, 9.0, 6.5, 17.7, None, 11.4),
    _published("Amazon batch", 6.6, 10.4, 8.5, 23.0, None, 9.0),
    _published("Deepgram nova-3", 6.7, 12.0, 10.2, 23.3, None, 21.0),
    _published("OpenAI gpt-4o-transcribe", 7.3, 12.6, 10.9, 21.0, None, 39.4),
    _published("OpenAI gpt-4o-mini-transcribe", 9.0, 15.8, None, None, None, 30.0),
    _published("ElevenLabs scribe_v1", 20.0, 26.4, 6.8, 18.1, None, 10.9),
    _published("Google speech", 21.1, 35.2, 18.9, 38.5, None, 29.2),
    _published("OpenAI whisper large-v2", 7.7, 12.1, 9.8, 26.6, None, 16.4),
    _published("OpenAI whisper large-v3", 9.8, 13.2, 9.4, 26.2, None, 13.4),
    _published("OpenAI whisper large-v3-turbo", 8.4, 12.8, 10.4, 28.9, None, 15.6),
    _published(
        "Caspi, round 1",
        *(9.2, 17.1, 8.4, None, None, 14.5),
        source="its authors, on 200 clips of each set: not comparable",
    ),
)


def published_rates() -> dict[str, list[dict[str, object]]]:
    """For each set the systems with their WER (a rate) and source, as results.json holds them."""
    return {
        row.name: [
            {"system": p.system, "wer": p.wer_percent[row.name] / 100, "source": p.source}
            for p in PUBLISHED
            if row.name in p.wer_percent
        ]
        for row in BENCHMARK_SETS
    }

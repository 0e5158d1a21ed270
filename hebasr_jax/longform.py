"""Audio of any length to text: cut at pauses, decode many pieces at a time, join.

Memory is bounded by an hour of audio, however long and however many the sounds are.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.errors import UserError
from hebasr_jax.silence import Levels, Piece, cut, loudness, silero_levels, sound_span
from hebasr_jax.timestamps import Segment
from hebasr_jax.transcribe import MAX_CLIP_S, Recognition

# Waves (mono, 16 kHz) and a context for each -> what was recognised in each.
Decode = Callable[[Sequence[np.ndarray], Sequence[str]], list[Recognition]]

_CALL_S = 3600.0  # audio of one call of `Decode`: enough to sort by length, 230 MB
_LANES = 32  # sounds that go on side by side when each piece waits for the text before it
_CONTEXT_CHARACTERS = 2_000  # of which the prompt takes the last 224 tokens


@dataclass(frozen=True)
class Cutting:
    """How long audio is cut, and what a piece is told.

    piece_s: the most that a piece lasts; models are tuned on up to 30 s.
    search_s: a cut lies in the last so many seconds of that, at the best pause.
    vad: what tells a pause: the level, or also Silero VAD (the extra `vad`).
    carry_text: each piece is given the text before it as context. An error may then be carried
      too, and the pieces of one sound are decoded one after another.
    """

    piece_s: float = 30.0
    search_s: float = 10.0
    vad: Literal["energy", "silero"] = "energy"
    carry_text: bool = False

    def __post_init__(self) -> None:
        if not 1.0 <= self.piece_s <= MAX_CLIP_S:
            raise UserError(
                f"pieces of {self.piece_s:g} s cannot be had",
                f"a piece lasts 1 to {MAX_CLIP_S:.0f} s",
                "30 s is what models are tuned on",
            )
        if not 0.0 < self.search_s <= self.piece_s / 2:
            raise UserError(
                f"pauses cannot be sought in the last {self.search_s:g} s of a piece",
                f"it is more than 0 s and at most half of {self.piece_s:g} s",
            )


@dataclass(frozen=True)
class Sound:
    """A recording. blocks: a new iterator over its float32 [samples], mono at 16 kHz."""

    name: str
    blocks: Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class LongRecognition:
    """The transcript of a whole recording; times in seconds from its start.

    language: the most frequent of its pieces' languages.
    segments: by the model's stamps, or else one for each piece that has text.
    finished: False if a piece met its budget of tokens: text may be missing.
    loops: pieces that went round in circles and were decoded again.
    pieces: how many there were. unfinished_s: start and end of those that met their budget.
    """

    name: str
    text: str
    language: str | None
    segments: tuple[Segment, ...]
    tokens: tuple[int, ...]
    duration_s: float
    finished: bool
    loops: int
    pieces: int
    unfinished_s: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Failure:
    """A recording that could not be read to its end; nothing of it is told."""

    name: str
    error: UserError


def recognize_long(
    decode: Decode, sounds: Iterable[Sound], cutting: Cutting
) -> Iterator[LongRecognition | Failure]:
    """Transcripts of recordings, in their order, each as soon as it and those before it are done.

    Pieces of many recordings share calls of `decode`, of about an hour of audio each. A recording
    whose blocks raise UserError becomes a Failure, and the others go on. What `decode` raises is
    raised here. UserError before the first sound is read where the detector is not installed.
    """
    levels = silero_levels() if cutting.vad == "silero" else loudness
    jobs = (_Job(sound, _pieces(sound, cutting, levels)) for sound in sounds)
    calls = _side_by_side(jobs) if cutting.carry_text else _in_order(jobs)
    waiting: deque[_Job] = deque()
    for started, call in calls:
        waiting += started
        contexts = [job.text[-_CONTEXT_CHARACTERS:] * cutting.carry_text for job, _ in call]
        results = decode([piece.wave for _, piece in call], contexts) if call else []
        for (job, piece), result in zip(call, results, strict=True):
            job.add(piece, result)
        while waiting and waiting[0].ended:
            yield waiting.popleft().outcome()


class _Call(NamedTuple):
    """Pieces to decode together, and the recordings that were begun for it, in their order."""

    started: "list[_Job]"
    pieces: "list[tuple[_Job, Piece]]"


@dataclass
class _Job:
    """A recording under way."""

    sound: Sound
    left: Iterator[Piece]
    ended: bool = False
    error: UserError | None = None
    text: str = ""
    samples: int = 0
    done: list[tuple[float, float, Recognition]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def next_piece(self) -> Piece | None:
        """The next piece; None at the end, and at a fault."""
        try:
            piece = next(self.left, None)
        except UserError as error:
            self.error, piece = error, None
        self.ended = piece is None
        return piece

    def add(self, piece: Piece, result: Recognition) -> None:
        """Takes the transcript of a piece, which follows those before it."""
        self.samples = piece.start + len(piece.wave)
        start_s, long_s = piece.start / SAMPLE_RATE, len(piece.wave) / SAMPLE_RATE
        self.done.append((start_s, self.samples / SAMPLE_RATE, result))
        text = result.transcript.text.strip()
        self.text = f"{self.text} {text}" if self.text and text else self.text or text
        spoken = result.transcript.segments
        if text and not spoken:
            first, last = (at / SAMPLE_RATE for at in sound_span(piece.wave))
            spoken = (Segment(first, last, text, result.tokens),)
        for part in spoken:  # a model may stamp a time that the piece does not reach
            first_s, last_s = (start_s + min(at, long_s) for at in (part.start_s, part.end_s))
            self.segments.append(Segment(first_s, last_s, part.text, part.tokens))

    def outcome(self) -> LongRecognition | Failure:
        if self.error:
            return Failure(self.sound.name, self.error)
        results = [result for _, _, result in self.done]
        languages = Counter(r.transcript.language for r in results if r.transcript.language)
        unfinished_s = tuple((start, end) for start, end, r in self.done if not r.finished)
        return LongRecognition(
            name=self.sound.name,
            text=self.text,
            language=languages.most_common(1)[0][0] if languages else None,
            segments=tuple(self.segments),
            tokens=tuple(token for result in results for token in result.tokens),
            duration_s=self.samples / SAMPLE_RATE,
            finished=not unfinished_s,
            loops=sum(result.loops for result in results),
            pieces=len(results),
            unfinished_s=unfinished_s,
        )


def _pieces(sound: Sound, cutting: Cutting, levels: Levels) -> Iterator[Piece]:
    yield from cut(
        sound.blocks(), piece_s=cutting.piece_s, search_s=cutting.search_s, levels=levels
    )


def _in_order(jobs: Iterator[_Job]) -> Iterator[_Call]:
    """One recording after another, an hour of audio a call."""
    call, seconds = _Call([], []), 0.0
    for job in jobs:
        call.started.append(job)
        while piece := job.next_piece():
            call.pieces.append((job, piece))
            seconds += len(piece.wave) / SAMPLE_RATE
            if seconds >= _CALL_S:
                yield call
                call, seconds = _Call([], []), 0.0
    yield call


def _side_by_side(jobs: Iterator[_Job]) -> Iterator[_Call]:
    """The next piece of each of several recordings a call; one that ends makes room for another."""
    lanes: list[_Job] = []
    while True:
        started = list(islice(jobs, _LANES - len(lanes)))
        lanes += started
        pieces = [(job, piece) for job in lanes if (piece := job.next_piece())]
        yield _Call(started, pieces)
        lanes = [job for job, _ in pieces]
        if not started and not lanes:
            return

"""From the plan to batches: audio read, clips joined, text built, in threads, ahead of the step.

Every batch is a function of (feed, epoch, number), so that a run resumes at any of them at once.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import BadClip, Batch, Clip, ClipSet
from hebasr_jax.data.decode import ROUNDING_S
from hebasr_jax.data.draws import Table, generator, row_words, uniform
from hebasr_jax.data.plan import Bucket, EpochPlan, Row, choose_buckets, plan_epoch
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.data.table import make_table, prompt_style
from hebasr_jax.data.targets import Targets, can_stamp, row_targets
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Augment, Config
from hebasr_jax.text import (
    MAX_CONTEXT_TOKENS,
    Example,
    PromptStyle,
    TextTokenizer,
    build_example,
    build_target,
)
from hebasr_jax.timestamps import Segment

_ATTEMPTS = 16  # rows tried for one place in a batch
_CONTEXTS = 64  # clips tried for a wrong context
_READY = 2  # batches handed over in one thread, so that the step's own need not wait
_PLANS = 2  # kept at a time: those of a million clips are large


@dataclass(frozen=True, eq=False)
class Feed:
    """All that batches are made from. left_out: per set, clips not used, by reason."""

    sets: tuple[ClipSet, ...]
    table: Table
    buckets: tuple[Bucket, ...]
    left_out: dict[str, dict[str, int]]
    tokenizer: TextTokenizer
    config: Config
    quarantine: Quarantine

    def plan(self, epoch: int) -> EpochPlan:
        config = self.config
        return plan_epoch(self.table, self.buckets, config.data, config.augment, config.seed, epoch)

    @cached_property
    def targets(self) -> Targets:
        """How stamps and contexts are drawn for the rows of this feed's own mix."""
        config = self.config
        return row_targets(self.table, config.text, config.data, config.augment, config.seed)


class Item(NamedTuple):
    """A batch from the stream: its place in the run, its bucket's number, and its arrays.

    waited_s: how long the caller stood still for it.
    """

    epoch: int
    batch: int
    bucket: int
    data: Batch
    waited_s: float


class _Loaded(NamedTuple):
    wave: np.ndarray
    speed: float
    words: np.ndarray
    example: Example


def make_feed(
    sets: Sequence[ClipSet],
    tokenizer: TextTokenizer,
    config: Config,
    quarantine: Quarantine,
    row_multiple: int = 8,
) -> Feed:
    """Counts the tokens of all clips and chooses the buckets; errors as in the two."""
    table, left_out = make_table(sets, tokenizer, config.text, config.data)
    buckets = choose_buckets(table, config.data, config.augment, config.seed, row_multiple)
    return Feed(tuple(sets), table, buckets, left_out, tokenizer, config, quarantine)


def empty_batch(bucket: Bucket, augment: Augment, rows: int) -> Batch:
    """A batch of rows that only fill: the shapes of a bucket, and what `load_batch` starts from.

    Such a row has one text token, so that no kernel sees an empty one, and nothing in the loss.
    """
    return Batch(
        wave_BS=np.zeros((rows, bucket.wave_samples(augment)), np.int16),
        samples_B=np.zeros(rows, np.int32),
        speed_B=np.ones(rows, np.float32),
        seed_B2=np.zeros((rows, 2), np.uint32),
        text_BX=np.zeros((rows, bucket.text_tokens), np.int32),
        text_lengths_B=np.ones(rows, np.int32),
        audio_at_B=np.zeros(rows, np.int32),
        in_loss_BX=np.zeros((rows, bucket.text_tokens), bool),
    )


def load_batch(feed: Feed, plan: EpochPlan, number: int, rows: slice = slice(None)) -> Batch:
    """Batch `number` of a plan, or those of its rows that this host feeds; only they are read.

    A clip that cannot be used goes to the quarantine. Joined clips do without it; a row without a
    good clip is replaced by another row of its bucket, the same one on any host and thread.
    Raises `UserError` when too many clips are bad.
    """
    bucket, planned = plan.bucket(number), plan.batch(number)
    places = range(bucket.rows)[rows]
    batch = empty_batch(bucket, feed.config.augment, len(places))
    for row, place in enumerate(places):
        if place >= len(planned):
            break
        loaded = _load_row(feed, plan, number, planned[place])
        length = len(loaded.example.text_ids)
        batch.wave_BS[row, : len(loaded.wave)] = loaded.wave
        batch.samples_B[row] = len(loaded.wave)
        batch.speed_B[row] = loaded.speed
        batch.seed_B2[row] = loaded.words
        batch.text_BX[row, :length] = loaded.example.text_ids
        batch.text_lengths_B[row] = length
        batch.audio_at_B[row] = loaded.example.audio_at
        batch.in_loss_BX[row, :length] = loaded.example.in_loss
    return batch


@contextlib.contextmanager
def stream(
    feed: Feed,
    *,
    epochs: int,
    epoch: int = 0,
    batch: int = 0,
    local_rows: Callable[[int], slice] = lambda rows: slice(0, rows),
) -> Iterator[Iterator[Item]]:
    """The batches from number `batch` of `epoch` to the end of `epochs`, loaded ahead of time.

    Threads load `data.prefetch_batches` or more ahead. They end with the block, and what they
    raise, the iterator raises. None of them touches a device: a copy to a GPU from another thread
    while a program with cuDNN attention starts has crashed runs (docs/performance.md).

    Args:
      local_rows: from a batch's rows to those that this host reads.
    """
    import grain

    def load(position: tuple[EpochPlan, int] | tuple[()]) -> tuple[Any, ...]:
        if not position:
            return ()
        plan, number = position
        loaded = load_batch(feed, plan, number, local_rows(plan.bucket(number).rows))
        return plan.epoch, number, int(plan.bucket_N[number]), loaded

    data = feed.config.data
    threaded = data.threads > 0
    ahead = max(data.threads, data.prefetch_batches) if threaded else 0
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead)
    loaded = grain.MapDataset.source(_Positions(feed, epoch, batch, epochs)).map(load)
    elements = iter(
        grain.experimental.ThreadPrefetchIterDataset(
            loaded.to_iter_dataset(options), prefetch_buffer_size=_READY if threaded else 0
        )
    )
    try:
        yield _items(elements)
    finally:
        elements.close()


def _items(elements: Iterator[tuple[Any, ...]]) -> Iterator[Item]:
    while True:
        start_s = time.perf_counter()
        element = next(elements)
        if not element:
            return
        epoch, batch, bucket, data = element
        yield Item(epoch, batch, bucket, data, time.perf_counter() - start_s)


class _Positions:
    """The batches of a run in order, as (plan, number); () behind the last.

    Threads ask out of order, so that a dropped plan may be asked for again; it is then remade.
    """

    def __init__(self, feed: Feed, epoch: int, batch: int, epochs: int) -> None:
        self._feed, self._epochs = feed, epochs
        self._lock = threading.Lock()
        self._starts = [(-batch, epoch)]
        self._plans: dict[int, EpochPlan] = {}

    def __len__(self) -> int:
        return 1 << 40  # how many there are is only known when all plans are made

    def __getitem__(self, index: int) -> tuple[EpochPlan, int] | tuple[()]:
        with self._lock:
            start, epoch = next(at for at in reversed(self._starts) if at[0] <= index)
            while epoch < self._epochs:
                plan = self._plan(epoch)
                if index < start + len(plan):
                    return plan, index - start
                start, epoch = start + len(plan), epoch + 1
                if start > self._starts[-1][0]:
                    self._starts.append((start, epoch))
        return ()

    def _plan(self, epoch: int) -> EpochPlan:
        """An epoch's plan; the last few are kept."""
        if epoch not in self._plans:
            self._plans[epoch] = self._feed.plan(epoch)
            if len(self._plans) > _PLANS:
                del self._plans[next(iter(self._plans))]
        return self._plans[epoch]


def _load_row(feed: Feed, plan: EpochPlan, number: int, wanted: Row) -> _Loaded:
    """The row, or the first of its substitutes that can be used."""
    tried = set()
    for attempt in range(_ATTEMPTS):
        row = _substitute(feed, plan, number, wanted, attempt) if attempt else wanted
        loaded = None if row in tried else _read_row(feed, plan, number, row)
        if loaded is not None:
            return loaded
        tried.add(row)
    clip_set, clip = _clip(feed, wanted.clips[0])
    raise UserError(
        f"No clip was found to stand in for {clip.id} of {clip_set.name}.",
        f"It is bad, and so are the {len(tried) - 1} others that were tried.",
        "See the quarantine file for the reasons.",
    )


def _substitute(feed: Feed, plan: EpochPlan, number: int, row: Row, attempt: int) -> Row:
    """Another row of the same bucket; after half of the attempts, of that or a shorter one."""
    bucket_R = np.repeat(plan.bucket_N, np.diff(plan.first_N))
    mine = plan.bucket_N[number]
    fitting = np.flatnonzero(bucket_R == mine if attempt <= _ATTEMPTS // 2 else bucket_R <= mine)
    key = int(feed.table.key_C[row.clips[0]])
    rng = generator(feed.config.seed, plan.epoch, row.visit, key, attempt, "substitute")
    return plan.row(int(rng.choice(fitting)))


def _read_row(feed: Feed, plan: EpochPlan, number: int, row: Row) -> _Loaded | None:
    """The row's good clips, joined; None if there is none. Bad ones go to the quarantine."""
    stamps = _row_stamps(feed, row)
    waves: dict[int, np.ndarray] = {}
    for index in row.clips:
        try:
            waves[index] = _read_clip(feed, index, stamps)
        except BadClip as fault:
            _report(feed, index, fault, plan.epoch, number)
    try:
        return _join(feed, row, stamps, plan.bucket(number), waves) if waves else None
    except BadClip as fault:
        _report(feed, next(iter(waves)), fault, plan.epoch, number)
        return None


def _row_stamps(feed: Feed, row: Row) -> bool:
    """Stamps are drawn for the row as a whole, if all its words have times that can be written."""
    clips_C, first_R = np.array(row.clips), np.array([0, len(row.clips)])
    gap_s = feed.config.data.join_gap_s
    (able,) = can_stamp(feed.table, clips_C, first_R, np.array([row.speed]), gap_s)
    return bool(able) and _drawn(feed, row, row.clips[0], "stamps", feed.targets.stamps.probability)


def _style(feed: Feed, clips: Sequence[Clip], stamps: bool) -> PromptStyle:
    """The style that the text of these clips asks for: without words there is nothing to stamp."""
    spoken = any(clip.text.strip() for clip in clips)
    stamps &= spoken
    return prompt_style(feed.config.text, clips[0].language, spoken=spoken, stamps=stamps)


def _read_clip(feed: Feed, index: int, stamps: bool) -> np.ndarray:
    """A clip's samples, after its text was found to be one that can be trained on."""
    clip_set, clip = _clip(feed, index)
    try:
        build_target(feed.tokenizer, _style(feed, [clip], stamps), clip.text, clip.segments)
    except UserError as error:
        raise BadClip("text cannot be trained on", str(error)) from error
    wave = clip_set.read(int(feed.table.clip_C[index]))
    check_length(wave, clip.duration_s)
    return wave


def check_length(wave_S: np.ndarray, duration_s: float) -> None:
    """Refuses sound that is not as long as its row says; shards are read without a look at it."""
    length_s = len(wave_S) / SAMPLE_RATE
    rounding_s = 2 / SAMPLE_RATE  # of resampling, and of numbers such as 4.2 - 4.0
    if abs(length_s - duration_s) > max(ROUNDING_S, 0.02 * duration_s) + rounding_s:
        detail = f"{length_s:.2f} s, stated {duration_s:.2f} s"
        raise BadClip("audio is not as long as stated", detail)


def _join(
    feed: Feed, row: Row, stamps: bool, bucket: Bucket, waves: dict[int, np.ndarray]
) -> _Loaded:
    """One row of one or more clips: gaps of silence, texts with a space, segments shifted."""
    config = feed.config
    gap = np.zeros(round(config.data.join_gap_s * SAMPLE_RATE), np.int16)
    # Sound may be a little longer than its row says: a clip alone is cut at the bucket's end, one
    # of several at its stated length, so that none takes another's room.
    room = int(bucket.audio_s * SAMPLE_RATE * row.speed)
    pieces: list[np.ndarray] = []
    segments: list[Segment] = []
    for index, wave in waves.items():
        start, clip = sum(map(len, pieces)), _clip(feed, index)[1]
        if len(row.clips) > 1:
            wave = wave[: round(clip.duration_s * SAMPLE_RATE)]
        segments += _moved(clip, start, min(start + len(wave), room), row.speed)
        pieces += [wave, gap]
    wave = np.concatenate(pieces[:-1])[:room]
    clips = [_clip(feed, index)[1] for index in waves]
    head = next(iter(waves))
    style = _style(feed, clips, stamps)
    try:
        example = build_example(
            feed.tokenizer,
            style,
            " ".join(text for clip in clips if (text := clip.text.strip())),
            segments=segments if style.stamps else (),
            context=_context(feed, row, head),
        )
    except UserError as error:
        raise BadClip("text cannot be trained on", str(error)) from error
    if len(example.text_ids) > bucket.text_tokens:
        detail = f"{len(example.text_ids)} tokens, {bucket.text_tokens} fit"
        raise BadClip("text is longer than planned", detail)
    name = f"{_clip(feed, head)[0].name}/{clips[0].id}"
    return _Loaded(wave, row.speed, row_words(config.seed, row.visit, name), example)


def _moved(clip: Clip, start: int, end: int, speed: float) -> Iterator[Segment]:
    """The clip's segments in a row where its sound lies at these samples, after perturbation."""
    start_s, end_s = start / SAMPLE_RATE, end / SAMPLE_RATE
    for segment in clip.segments:
        first_s = min(start_s + segment.start_s, end_s)
        last_s = min(start_s + segment.end_s, end_s)
        yield Segment(first_s / speed, last_s / speed, segment.text)


def _context(feed: Feed, row: Row, head: int) -> str:
    """What came before a row's first sound, as its prompt tells it.

    The plan has room for the context of the row's planned first clip, and for no other's.
    """
    text, own = feed.config.text, _clip(feed, head)[1].context.strip()
    planned = own and head == row.clips[0]
    chance = feed.targets.context.probability
    if not planned or not _drawn(feed, row, head, "context", chance):
        return ""
    wrong = _drawn(feed, row, head, "wrong context", text.wrong_context_share)
    return _wrong_context(feed, row, head) if wrong else own


def _wrong_context(feed: Feed, row: Row, index: int) -> str:
    """A context no longer than the clip's own, of another recording of its set; else none."""
    table, own = feed.table, feed.tokenizer.encode(_clip(feed, index)[1].context.strip())
    number = table.set_of(index)
    rng = generator(feed.config.seed, row.visit, int(table.key_C[index]), "wrong context")
    first, last = table.first_S[number : number + 2]
    for other in rng.integers(first, last, size=_CONTEXTS).tolist():
        context = _clip(feed, other)[1].context.strip()
        one, two = sorted(table.recording_C[[index, other]])
        if context and 0 <= one < two:
            ids = feed.tokenizer.encode(context)
            if ids != own and min(len(ids), MAX_CONTEXT_TOKENS) <= len(own):
                return context
    return ""


def _drawn(feed: Feed, row: Row, index: int, what: str, share: float) -> bool:
    return bool(uniform(feed.table.key_C[index], row.visit, feed.config.seed, what) < share)


def _clip(feed: Feed, index: int) -> tuple[ClipSet, Clip]:
    clip_set = feed.sets[feed.table.set_of(index)]
    return clip_set, clip_set.clips[feed.table.clip_C[index]]


def _report(feed: Feed, index: int, fault: BadClip, epoch: int, number: int) -> None:
    clip_set, clip = _clip(feed, index)
    feed.quarantine.add(clip_set.name, clip.id, fault.reason, fault.detail, epoch, number)

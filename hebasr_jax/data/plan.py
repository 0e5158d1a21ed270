"""The epoch plan: buckets (the shapes that are compiled), and which rows make up which batch.

rows of the epoch -> bucket of each row -> shuffled batches (`EpochPlan`)

Nothing here knows of devices, hosts or threads, so that the plan is the same for all of them.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.draws import (
    Limit,
    Rows,
    Table,
    compose_rows,
    draws_per_set,
    generator,
    longest_row,
)
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Augment, Data

HOP = 160  # samples of one mel frame
AUDIO_TOKENS_PER_S = 13
_QUANTILES = (0.9, 0.97, 0.99, 1.0)


@dataclass(frozen=True)
class Bucket:
    """One shape: whole seconds of audio after speed perturbation, columns of text, rows."""

    audio_s: int
    text_tokens: int
    rows: int

    @property
    def positions(self) -> int:
        """Decoder positions of a row; always even, which cuDNN attention asks for."""
        return AUDIO_TOKENS_PER_S * self.audio_s + self.text_tokens

    def wave_samples(self, augment: Augment) -> int:
        """Samples of a row before speed perturbation, a whole number of mel frames."""
        longest = self.audio_s * SAMPLE_RATE * max(1.0, *augment.speed_factors)
        return HOP * math.ceil(round(longest) / HOP)


class Row(NamedTuple):
    """One row of a batch: clips of the table, joined in this order."""

    clips: tuple[int, ...]
    visit: int
    speed: float


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The batches of one epoch; batch n holds rows `first_N[n] : first_N[n + 1]`."""

    epoch: int
    buckets: tuple[Bucket, ...]
    rows: Rows
    bucket_N: np.ndarray
    first_N: np.ndarray

    def __len__(self) -> int:
        return len(self.bucket_N)

    def bucket(self, batch: int) -> Bucket:
        return self.buckets[self.bucket_N[batch]]

    def batch(self, batch: int) -> list[Row]:
        """A batch's rows; fewer than its bucket's in at most one batch of an epoch."""
        return [self.row(row) for row in range(self.first_N[batch], self.first_N[batch + 1])]

    def row(self, row: int) -> Row:
        rows = self.rows
        clips = rows.clips_C[rows.first_R[row] : rows.first_R[row + 1]]
        return Row(tuple(clips.tolist()), int(rows.visit_R[row]), float(rows.speed_R[row]))


def choose_buckets(
    table: Table, data: Data, augment: Augment, seed: int, row_multiple: int = 8
) -> tuple[Bucket, ...]:
    """At most `data.buckets` shapes, shortest first, for the whole run.

    They make the decoder positions of the first epoch's rows, padding included, as few as
    dynamic programming over whole seconds can. A bucket has as many text columns as nearly all of
    its rows need; the rows with more text go to a longer bucket, and the last one holds all.

    Args:
      row_multiple: with `data.batch_audio_s`, rows are a multiple of this, and at least this.
    """
    if data.buckets < 1:
        raise UserError(f"data.buckets is {data.buckets}.", "It must be at least 1.")
    limit = longest_row(table, augment)
    rows = compose_rows(table, data, augment, seed, 0)
    seconds_R = _seconds(rows)
    if data.batch_clips is not None:
        batches = len(seconds_R) / data.batch_clips
    else:
        batches = float(seconds_R.sum()) / float(data.batch_audio_s or math.inf)
    count = min(data.buckets, max(1, round(batches)))  # no shape without a batch to fill it
    rows_ST = np.zeros((limit.audio_s + 1, limit.text_tokens + 1), np.int64)
    np.add.at(rows_ST, (seconds_R, rows.tokens_R), 1)
    choices = [[*_shapes(rows_ST, count, quantile)[:-1], limit] for quantile in _QUANTILES]
    if count > 1:  # or one shape is kept for rows with very much text
        choices += [[*_shapes(rows_ST, count - 1, q), limit] for q in _QUANTILES[:-1]]
    best = min(map(_growing, choices), key=lambda shapes: _positions(rows_ST, shapes))
    return tuple(Bucket(*shape, _row_count(shape, data, row_multiple)) for shape in best)


def bucket_of(
    shapes: Sequence[Limit | Bucket], seconds_R: np.ndarray, tokens_R: np.ndarray
) -> np.ndarray:
    """Number of the first shape that holds a row; shapes grow in both measures."""
    by_audio = np.searchsorted([shape.audio_s for shape in shapes], seconds_R)
    return np.maximum(by_audio, np.searchsorted([shape.text_tokens for shape in shapes], tokens_R))


def plan_epoch(
    table: Table,
    buckets: tuple[Bucket, ...],
    data: Data,
    augment: Augment,
    seed: int,
    epoch: int,
) -> EpochPlan:
    """The shuffled batches of an epoch, each drawn clip in exactly one of them.

    Rows that do not fill a batch of their bucket move up to the next longer one, so that at most
    one batch, of the longest bucket, is left with fewer rows than it should have.
    """
    rows = compose_rows(table, data, augment, seed, epoch)
    rng = generator(seed, epoch, "order")
    order_R = rng.permutation(len(rows.speed_R))
    bucket_R = bucket_of(buckets, _seconds(rows)[order_R], rows.tokens_R[order_R])
    batches: list[tuple[int, np.ndarray]] = []
    left_over = order_R[:0]
    for number, bucket in enumerate(buckets):
        waiting = np.concatenate([left_over, order_R[bucket_R == number]])
        full = len(waiting) // bucket.rows * bucket.rows
        batches += [(number, part) for part in waiting[:full].reshape(-1, bucket.rows)]
        left_over = waiting[full:]
    if len(left_over):
        batches.append((len(buckets) - 1, left_over))
    batches = [batches[n] for n in rng.permutation(len(batches))]
    return EpochPlan(
        epoch,
        buckets,
        _reorder(rows, np.concatenate([part for _, part in batches])),
        np.array([number for number, _ in batches]),
        np.cumsum([0, *(len(part) for _, part in batches)]),
    )


def plan_table(table: Table, plan: EpochPlan, data: Data) -> dict[str, Any]:
    """What an epoch consists of, as plain values: `buckets` (the last entry sums up) and `sets`.

    A set's `synthetic` is the share of its clips that nobody spoke, told where there are any.
    Padding shares are of all frames and positions that are computed: what is silence between
    joined clips, behind a row's end, or a row that only fills the last batch is padding.
    """
    sums = [
        _bucket_sums(plan, np.flatnonzero(plan.bucket_N == number), bucket)
        for number, bucket in enumerate(plan.buckets)
    ]
    sums.append({name: sum(row[name] for row in sums) for name in sums[0]})
    shapes = [asdict(bucket) for bucket in plan.buckets]
    shapes.append(dict.fromkeys(shapes[0]))
    draws = draws_per_set(table.sets, data)
    clips_C = plan.rows.clips_C
    set_C = np.searchsorted(table.first_S, clips_C, side="right") - 1
    samples_S = np.bincount(set_C, table.samples_C[clips_C], minlength=len(table.sets))
    return {
        "epoch": plan.epoch,
        "buckets": [shape | _shares(row) for shape, row in zip(shapes, sums, strict=True)],
        "sets": [
            {
                "name": info.name,
                "clips": info.clips,
                "draws": count,
                "share": count / sum(draws),
                "effective_epochs": count / info.clips,
                "hours": float(samples) / SAMPLE_RATE / 3600,
            }
            | ({"synthetic": info.synthetic / info.clips} if info.synthetic else {})
            for info, count, samples in zip(table.sets, draws, samples_S, strict=True)
        ],
    }


def plan_fingerprint(
    table: Table, buckets: tuple[Bucket, ...], data: Data, augment: Augment, seed: int
) -> str:
    """sha256 of all that, with the config, determines the plans of all epochs and their targets."""
    settings = [data.join_share, data.join_gap_s, data.max_repeats, augment.speed_factors, seed]
    settings += [data.temperature, data.exhaust]
    sets = [[info.name, info.clips, info.share, info.fingerprint] for info in table.sets]
    content = [sets, [asdict(b) for b in buckets], settings]
    hasher = hashlib.sha256(json.dumps(content).encode())
    for column in (table.clip_C, table.key_C, table.samples_C, table.tokens_C):
        hasher.update(column.astype("<u8").tobytes())
    for column in (table.added_tokens_C, table.recording_C, table.language_C):
        hasher.update(column.astype("<i8").tobytes())
    # Not of the plan, but of the chances that `targets` draws by: with the config all they follow.
    for column in (table.timed_C, table.context_C):
        hasher.update(column.astype("<i8").tobytes())
    return hasher.hexdigest()


def _shapes(rows_ST: np.ndarray, count: int, quantile: float) -> list[Limit]:
    """At most `count` shapes for a histogram of rows over (seconds, text tokens).

    A shape serves the rows of (a, b] seconds with b seconds and the quantile of their texts.
    """
    # Only seconds that occur: one clip of 20 minutes makes 720,000 pairs of all of them.
    end_E = np.union1d([0, len(rows_ST) - 1], np.flatnonzero(rows_ST.any(1)))
    ends = len(end_E)
    below_ET = rows_ST.cumsum(0)[end_E].cumsum(1)
    text_AB = np.zeros((ends, ends), np.int64)
    cost_AB = np.full((ends, ends), np.inf)
    for a, b in itertools.combinations(range(ends), 2):
        between_T = below_ET[b] - below_ET[a]
        rows = between_T[-1]
        text_AB[a, b] = np.searchsorted(between_T, math.ceil(quantile * rows))
        cost_AB[a, b] = rows * (AUDIO_TOKENS_PER_S * end_E[b] + text_AB[a, b])
    # cost_KB[k, b]: the least that rows up to the b-th end cost with k shapes.
    cost_KB = np.full((count + 1, ends), np.inf)
    cost_KB[0, 0] = 0.0
    start_KB = np.zeros((count + 1, ends), np.int64)
    for k in range(1, count + 1):
        total_AB = cost_KB[k - 1][:, None] + cost_AB
        cost_KB[k], start_KB[k] = total_AB.min(0), total_AB.argmin(0)
    shapes, b = [], ends - 1
    for k in range(int(cost_KB[:, b].argmin()), 0, -1):
        a = int(start_KB[k, b])
        shapes.append(Limit(int(end_E[b]), int(text_AB[a, b])))
        b = a
    return shapes[::-1]


def _growing(shapes: Sequence[Limit]) -> list[Limit]:
    """The shapes with no less text than those before, and an even number of positions."""
    grown: list[Limit] = []
    for audio_s, text_tokens in shapes:
        text = max(text_tokens, grown[-1].text_tokens if grown else 1)
        grown.append(Limit(audio_s, text + (AUDIO_TOKENS_PER_S * audio_s + text) % 2))
    return grown


def _positions(rows_ST: np.ndarray, shapes: Sequence[Limit]) -> int:
    """Decoder positions, padding included, of a histogram of rows."""
    seconds, tokens = np.nonzero(rows_ST)
    each = np.array([AUDIO_TOKENS_PER_S * shape.audio_s + shape.text_tokens for shape in shapes])
    return int((each[bucket_of(shapes, seconds, tokens)] * rows_ST[seconds, tokens]).sum())


def _row_count(shape: Limit, data: Data, row_multiple: int) -> int:
    if data.batch_clips is not None:
        return data.batch_clips
    rows = int((data.batch_audio_s or 0.0) // shape.audio_s)
    return max(row_multiple, rows // row_multiple * row_multiple)


def _seconds(rows: Rows) -> np.ndarray:
    """Whole seconds that hold a row: the encoder fills its last chunk of 100 frames anyway."""
    return -(-rows.samples_R // SAMPLE_RATE)


def _reorder(rows: Rows, order_R: np.ndarray) -> Rows:
    count_R = np.diff(rows.first_R)
    place_R = np.empty_like(order_R)
    place_R[order_R] = np.arange(len(order_R))
    order_C = np.argsort(np.repeat(place_R, count_R), kind="stable")
    return Rows(
        rows.clips_C[order_C],
        np.cumsum([0, *count_R[order_R]]),
        rows.visit_R[order_R],
        rows.speed_R[order_R],
        rows.speech_R[order_R],
        rows.samples_R[order_R],
        rows.tokens_R[order_R],
    )


def _bucket_sums(plan: EpochPlan, batches: np.ndarray, bucket: Bucket) -> dict[str, Any]:
    """Counts over some batches of one bucket."""
    rows = plan.rows
    batch_R = np.repeat(np.arange(len(plan)), np.diff(plan.first_N))
    mine_R = np.isin(batch_R, batches)
    frames_R = np.floor(rows.speech_R[mine_R] / rows.speed_R[mine_R]).astype(np.int64) // HOP
    computed = len(batches) * bucket.rows
    return {
        "steps": len(batches),
        "rows_filled": int(mine_R.sum()),
        "clips": int(np.diff(rows.first_R)[mine_R].sum()),
        "hours": float(rows.speech_R[mine_R].sum()) / SAMPLE_RATE / 3600,
        "frames": int(frames_R.sum()),
        "frames_computed": computed * bucket.audio_s * SAMPLE_RATE // HOP,
        "positions": int(audio_tokens(frames_R).sum() + rows.tokens_R[mine_R].sum()),
        "positions_computed": computed * bucket.positions,
    }


def _shares(sums: dict[str, Any]) -> dict[str, Any]:
    """Padding shares in place of the counts they come from; 0 of a bucket without a batch."""
    counts = {name: sums[name] for name in ("steps", "rows_filled", "clips", "hours")}
    encoder = 1.0 - sums["frames"] / max(sums["frames_computed"], 1)
    decoder = 1.0 - sums["positions"] / max(sums["positions_computed"], 1)
    padding = (encoder, decoder) if sums["steps"] else (0.0, 0.0)
    return counts | {"encoder_padding": padding[0], "decoder_padding": padding[1]}


def audio_tokens(frames: np.ndarray) -> np.ndarray:
    """As `model.encoder.audio_tokens`, which a test compares, without loading JAX."""
    return AUDIO_TOKENS_PER_S * (frames // 100) + (frames % 100 + 7) // 8

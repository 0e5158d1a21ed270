"""The rows of one epoch: clips drawn from the sets, each with its speed, short ones joined.

Everything here is a function of (clips, config, seed, epoch). Randomness comes from hashes of
names, never from Python's `hash`, whose value differs from one process to the next.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Augment, Data

_WINDOW = 16  # clips looked at for the one that fills a row best


class Limit(NamedTuple):
    """The longest row: whole seconds after speed perturbation, and text tokens."""

    audio_s: int
    text_tokens: int


class SetInfo(NamedTuple):
    """One data set as the plan sees it; `synthetic` of its clips nobody spoke."""

    name: str
    clips: int
    share: float | None
    fingerprint: str
    synthetic: int = 0


@dataclass(frozen=True, eq=False)
class Table:
    """Columns over the usable clips of all sets, set after set.

    clip_C: index of the clip in its set. key_C: 64 bits that name set and clip.
    samples_C: at 16 kHz. tokens_C: prompt and target. added_tokens_C: what the clip adds to the
    text of a row when it follows another clip. recording_C: a number per recording of a set, -1:
    unknown. language_C: a number per language; clips of two languages are never joined.
    timed_C: 1 words with times, 0 no words, -1 words without times. context_C: 1 with a context.
    """

    sets: tuple[SetInfo, ...]
    clip_C: np.ndarray
    key_C: np.ndarray
    samples_C: np.ndarray
    tokens_C: np.ndarray
    added_tokens_C: np.ndarray
    recording_C: np.ndarray
    language_C: np.ndarray
    timed_C: np.ndarray
    context_C: np.ndarray

    @cached_property
    def first_S(self) -> np.ndarray:
        """Where each set begins, and the end of the last."""
        return np.cumsum([0, *(info.clips for info in self.sets)])

    def set_of(self, clip: int) -> int:
        """The set that a row of the table belongs to."""
        return int(np.searchsorted(self.first_S, clip, side="right")) - 1


def select_sets(table: Table, shares: Mapping[str, float | None]) -> Table:
    """The clips of some of a table's sets, in its order, with other shares."""
    chosen = [n for n, info in enumerate(table.sets) if info.name in shares]
    kept_C = np.isin(np.repeat(np.arange(len(table.sets)), np.diff(table.first_S)), chosen)
    columns = {
        column.name: getattr(table, column.name)[kept_C]
        for column in fields(table)
        if column.name != "sets"
    }
    sets = (table.sets[n] for n in chosen)
    return Table(tuple(info._replace(share=shares[info.name]) for info in sets), **columns)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one epoch. Row r holds the table's clips `clips_C[first_R[r] : first_R[r + 1]]`.

    visit_R: how often the row's first clip was drawn before; it is the `epoch` of everything
    random about the row, and differs where one epoch draws a clip twice.
    speed_R: factor of speed perturbation. speech_R: samples of the clips, before it.
    samples_R: with the silence of the gaps, after it. tokens_R: text.
    """

    clips_C: np.ndarray
    first_R: np.ndarray
    visit_R: np.ndarray
    speed_R: np.ndarray
    speech_R: np.ndarray
    samples_R: np.ndarray
    tokens_R: np.ndarray


def row_words(seed: int, visit: int, clip_id: str) -> np.ndarray:
    """Two uint32 words: the source of all randomness in the step for one clip's n-th visit."""
    return np.frombuffer(_digest(seed, visit, clip_id)[:8], "<u4").astype(np.uint32)


def clip_key(set_name: str, clip_id: str) -> int:
    """64 bits that name a clip of a set."""
    return int.from_bytes(_digest(set_name, clip_id)[:8], "little")


def generator(*parts: Any) -> np.random.Generator:
    """Random numbers that follow from `parts`."""
    return np.random.default_rng(int.from_bytes(_digest(*parts), "little"))


def uniform(keys: Any, visits: Any, seed: int, what: str) -> Any:
    """A number in [0, 1) for each clip and visit; another one for each seed and each `what`."""
    salt = np.uint64(int.from_bytes(_digest(seed, what)[:8], "little"))
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        bits = _mix(np.asarray(keys, np.uint64) + _mix(np.asarray(visits, np.uint64) + salt))
    return (bits >> np.uint64(11)) * 2.0**-53


def draws_per_set(sets: Sequence[SetInfo], data: Data) -> list[int]:
    """Clips that one epoch draws from each set.

    A set with a share gets that share of the epoch; sets without one divide what is left in
    proportion to their sizes, flattened by `data.temperature`; where every set has one, shares
    are taken relative to their sum. An epoch has as many draws as there are clips, or with
    `data.exhaust` as many as show every clip. No set gets more than `data.max_repeats` times its
    clips. Raises `UserError` for shares or a temperature that cannot be.
    """
    shares = [info.share for info in sets if info.share is not None]
    rest, weights = 1.0 - sum(shares), _weights(sets, data.temperature)
    if any(not 0.0 < share <= 1.0 for share in shares) or rest < -1e-9:
        told = ", ".join(f"{info.name} {info.share}" for info in sets if info.share is not None)
        raise UserError(
            "The shares of the data sets cannot be met.",
            f"They are {told}; each must lie in 0..1, and their sum must not pass 1.",
            "Lower them, or leave the share of the largest set out.",
        )
    if weights and rest < 1e-9:
        left = ", ".join(info.name for info in sets if info.share is None)
        raise UserError(
            f"Nothing would be drawn from {left}.",
            "The shares of the other data sets sum to 1.",
            "Give every set a share, or lower those that are given.",
        )
    scale = 1.0 if weights else sum(shares)
    part_S = [
        rest * weights[info.name] if info.share is None else info.share / scale for info in sets
    ]
    if data.exhaust:
        total = max(info.clips / part for info, part in zip(sets, part_S, strict=True))
    else:
        total = sum(info.clips for info in sets)
    return [
        max(1, round(min(total * part, math.floor(data.max_repeats * info.clips))))
        for info, part in zip(sets, part_S, strict=True)
    ]


def refuse_synthetic(sets: Sequence[SetInfo], data: Data) -> None:
    """Raises a UserError where more of an epoch's draws are synthetic than may be."""
    draws = draws_per_set(sets, data)
    made = {
        info.name: count * info.synthetic / info.clips / sum(draws)
        for info, count in zip(sets, draws, strict=True)
        if info.synthetic
    }
    if (share := sum(made.values())) > data.max_synthetic_share + 1e-9:
        raise UserError(
            f"{share:.1%} of an epoch's clips are synthetic speech, more than "
            f"data.max_synthetic_share = {data.max_synthetic_share:g}",
            f"By set: {', '.join(f'{name} {part:.1%}' for name, part in made.items())}.",
            "Give these sets a lower share, or raise data.max_synthetic_share.",
        )


def _weights(sets: Sequence[SetInfo], temperature: float | None) -> dict[str, float]:
    """How the sets without a share divide what the others leave; they sum to 1."""
    temperature = 1.0 if temperature is None else temperature
    if not 0.0 < temperature < math.inf:
        raise UserError(
            f"data.temperature is {temperature}.",
            "Sets are drawn in proportion to size ** (1 / temperature).",
            "Give a number above 0, such as 3, or None.",
        )
    free = [info for info in sets if info.share is None]
    largest = max((info.clips for info in free), default=1)
    powers = {info.name: (info.clips / largest) ** (1.0 / temperature) for info in free}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def longest_row(table: Table, augment: Augment) -> Limit:
    """What holds any clip of the table at any speed."""
    samples = math.floor(int(table.samples_C.max()) / min(augment.speed_factors))
    return Limit(max(1, -(-samples // SAMPLE_RATE)), int(table.tokens_C.max()))


def compose_rows(table: Table, data: Data, augment: Augment, seed: int, epoch: int) -> Rows:
    """Draws an epoch's clips, gives each its speed, and joins short ones into rows.

    A clip is short when two of its length fit into the longest row; of the short ones a share of
    `join_share` is joined. Rows are in no particular order.
    """
    limit = longest_row(table, augment)
    counts = draws_per_set(table.sets, data)
    parts = [
        _draw(int(start), info, count, seed, epoch)
        for start, info, count in zip(table.first_S, table.sets, counts, strict=False)
    ]
    clips_C, visit_C = (np.concatenate(part) for part in zip(*parts, strict=True))
    keys_C, samples_C = table.key_C[clips_C], table.samples_C[clips_C]
    factors = np.asarray(augment.speed_factors)
    choice_C = uniform(keys_C, visit_C, seed, "speed") * len(factors)
    speed_C = factors[choice_C.astype(np.int64)]
    gap = round(data.join_gap_s * SAMPLE_RATE)
    short_C = 2 * samples_C + gap <= limit.audio_s * SAMPLE_RATE * speed_C
    short_C &= uniform(keys_C, visit_C, seed, "join") < data.join_share
    groups = [[draw] for draw in np.flatnonzero(~short_C).tolist()]
    set_C = np.repeat(np.arange(len(counts)), counts)
    for number, info in enumerate(table.sets):
        draws_J = np.flatnonzero(short_C & (set_C == number))
        rng = generator(seed, epoch, info.name, "neighbours")
        draws_J = draws_J[_neighbours(table, clips_C[draws_J], visit_C[draws_J], rng)]
        joined = _join(table, clips_C[draws_J], speed_C[draws_J], limit, gap)
        groups += [draws_J[row].tolist() for row in joined]
    return _rows(table, groups, clips_C, visit_C, speed_C, gap)


def _draw(
    start: int, info: SetInfo, count: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The next `count` clips of the set's endless stream of permutations, and their visits."""
    first, last = epoch * count, (epoch + 1) * count
    clips, visits = [], []
    for visit in range(first // info.clips, -(-last // info.clips)):
        passed = visit * info.clips
        permuted = generator(seed, info.name, visit).permutation(info.clips)
        part = permuted[max(first - passed, 0) : last - passed]
        clips.append(start + part)
        visits.append(np.full(len(part), visit))
    return np.concatenate(clips), np.concatenate(visits)


def _neighbours(
    table: Table, clips_J: np.ndarray, visit_J: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """An order in which neighbours can be joined: recordings shuffled, each in its own order.

    A clip of unknown recording is a recording of its own.
    """
    known_J = table.recording_C[clips_J]
    unknown_J = known_J < 0
    recording_J = np.where(unknown_J, known_J.max(initial=-1) + np.cumsum(unknown_J), known_J)
    rank_J = rng.permutation(int(recording_J.max(initial=-1)) + 1)[recording_J]
    return np.lexsort((table.clip_C[clips_J], rank_J, visit_J, table.language_C[clips_J]))


def _join(
    table: Table, clips_J: np.ndarray, speed_J: np.ndarray, limit: Limit, gap: int
) -> list[list[int]]:
    """Fills rows up to the limit: the next clip, then whichever of the next few fits best.

    A row has its first clip's speed. Returns places in `clips_J`, ascending in each row.
    """
    samples, added = table.samples_C[clips_J].tolist(), table.added_tokens_C[clips_J].tolist()
    tokens, language = table.tokens_C[clips_J].tolist(), table.language_C[clips_J].tolist()
    room_J = np.floor(limit.audio_s * SAMPLE_RATE * speed_J).astype(np.int64).tolist()
    rows: list[list[int]] = []
    window, later = list(range(min(_WINDOW, len(samples)))), iter(range(_WINDOW, len(samples)))
    while window:
        row: list[int] = []
        best: int | None = window[0]
        room, text_room = room_J[best], limit.text_tokens - tokens[best] + added[best]
        while best is not None:
            window.remove(best)
            window.extend(itertools.islice(later, 1))
            row.append(best)
            room, text_room = room - samples[best] - gap, text_room - added[best]
            fits = [
                clip
                for clip in window
                if samples[clip] <= room
                and added[clip] <= text_room
                and language[clip] == language[row[0]]
            ]
            best = max(fits, key=samples.__getitem__, default=None)
        rows.append(sorted(row))
    return rows


def _rows(
    table: Table,
    groups: list[list[int]],
    clips_C: np.ndarray,
    visit_C: np.ndarray,
    speed_C: np.ndarray,
    gap: int,
) -> Rows:
    """The columns of rows given as lists of draws."""
    count_R = np.array([len(group) for group in groups])
    first_R = np.cumsum([0, *count_R])
    draw_C = np.array([draw for group in groups for draw in group])
    head_R = draw_C[first_R[:-1]]
    clip_C = clips_C[draw_C]
    tokens_C = table.added_tokens_C[clip_C]
    tokens_C[first_R[:-1]] = table.tokens_C[clips_C[head_R]]
    speech_R = np.add.reduceat(table.samples_C[clip_C], first_R[:-1])
    speed_R = speed_C[head_R]
    return Rows(
        clips_C=clip_C,
        first_R=first_R,
        visit_R=visit_C[head_R],
        speed_R=speed_R,
        speech_R=speech_R,
        samples_R=np.floor((speech_R + gap * (count_R - 1)) / speed_R).astype(np.int64),
        tokens_R=np.add.reduceat(tokens_C, first_R[:-1]),
    )


def _digest(*parts: Any) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def _mix(bits: Any) -> Any:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

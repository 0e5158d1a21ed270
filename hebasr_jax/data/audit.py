"""What is wrong with a data set: every clip decoded and measured, copies found, a verdict given.

A clip gets one reason at most, the first of: it cannot be decoded, it is below the set's least
quality, it is silent, clipped, hardly Hebrew, spoken too fast or too slowly, or another transcript
disagrees. Among the others, a clip that repeats an earlier one is removed.
"""

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int16

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import BadClip, Clip, ClipSet, quality_fault
from hebasr_jax.data.fingerprint import Fingerprint, build_index, find_copies, fingerprint
from hebasr_jax.errors import UserError
from hebasr_jax.metrics import character_errors, normalize_ivrit

_FRAME = 160  # samples: 10 ms
_CLIPPED = 32440  # 99 % of full scale
_CLIPPED_RUN = 3  # samples in a row; fewer are peaks
_FLOOR = 1e-6  # -60 dBFS: quieter frames are silence whatever the rest is
_RANGE = 1e-4  # so are those 40 dB under the loud frames
_SIGMA = 1.4826  # from a median absolute deviation to a normal law's standard deviation
_PARTNERS = 16  # near copies kept for a clip


@dataclass(frozen=True)
class Limits:
    """What a clip may be at most, or must be at least. Defaults are loose: they find the broken."""

    min_quality: float | None = None
    """least quality score; clips without a score go, as with `Source.min_quality`"""
    max_silence_share: float = 0.9
    """of the frames of 10 ms of a clip that has text"""
    max_clipping_share: float = 0.01
    """of the samples that stand in runs of 3 at 99 % of full scale"""
    min_hebrew_share: float = 0.5
    """of the letters; texts without a letter stay"""
    max_yiddish_share: float = 0.02
    """of the letters that are digraphs U+05F0 to U+05F2, which Hebrew does not use"""
    rate_spreads: float = 4.0
    """robust standard deviations that log characters a second may lie from the set's median"""
    min_rate_factor: float = 1.6
    """the bounds lie at least this factor from the median, however alike the clips are"""
    own_rate_clips: int = 30
    """sets with fewer texts get `usual_rate` for bounds"""
    usual_rate: tuple[float, float] = (2.0, 35.0)
    """characters a second"""
    max_cer: float = 0.4
    """character error rate of the text against the second transcript"""
    copied_share: float = 0.8
    """of the shorter of two clips that must be the same sound"""
    same_text_words: int = 5
    """shorter texts may repeat: people say the same things"""
    group_hours: float = 25.0
    """each group of so many hours is searched with the one before it: near copies less than this
    apart in the set's order are found, beyond twice as far they are not. Prints and index take
    4 MB an hour of both groups, twice that while the index is built: 0.4 GB. Exact copies are
    found at any distance"""


class Measures(NamedTuple):
    """What one clip is. Shares from 0 to 1; None where they mean nothing or are not known.

    duration_s: as decoded. rate, words_rate: normalised characters (words) a second.
    fault: why it could not be decoded; then all else is 0 or None.
    """

    duration_s: float
    rate: float | None = None
    words_rate: float | None = None
    hebrew: float | None = None
    yiddish: float = 0.0
    silence: float = 0.0
    clipping: float = 0.0
    cer: float | None = None
    sha: bytes = b""
    fault: BadClip | None = None


class Finding(NamedTuple):
    """Why a clip is to be left out; `reason` is one of few, `detail` is of this clip."""

    reason: str
    detail: str


class Verdict(NamedTuple):
    """Share of the sample whose text does not fit its sound, with its 95 % Wilson interval.

    by: "agreement" with a second transcript that has at least half of the texts, else "rate".
    decision: proceed below 10 %, caution to 15 %, stop above, as the point estimate says.
    """

    decision: Literal["proceed", "caution", "stop"]
    by: Literal["agreement", "rate"]
    low: int
    clips: int
    share: float
    interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Audit:
    """All that was found. `measures_N` and `findings_N` go with the set's clips."""

    clip_set: ClipSet
    limits: Limits
    measures_N: tuple[Measures, ...]
    findings_N: tuple[Finding | None, ...]
    rate_bounds: tuple[float, float]
    verdict: Verdict
    second: Mapping[str, str]
    other_speakers: int
    """clips whose text another speaker says as well; they stay"""


def audit_set(
    clip_set: ClipSet,
    limits: Limits = Limits(),
    *,
    second: Mapping[str, str] | None = None,
    sample: int = 400,
    seed: int = 0,
    threads: int = 4,
    advance: Callable[[float], None] = lambda audio_s: None,
) -> Audit:
    """Decodes every clip once and judges it; the same set gives the same audit.

    Args:
      second: another transcript by clip id; clips that it lacks are not judged by agreement.
      sample: clips of the alignment audit, drawn in proportion from strata of length and quality.
      advance: called with the seconds of audio that were just looked at.

    Raises:
      UserError: `second` has no clip of the set.
    """
    second = second or {}
    if second and not any(clip.id in second for clip in clip_set.clips):
        raise UserError(
            f"{clip_set.name}: the second transcript has none of its clips",
            f"The set's first id is {clip_set.clips[0].id!r}, the other's {next(iter(second))!r}.",
        )
    measures, copies = _measure_all(clip_set, limits, threads, advance)
    measures = [
        m if m.fault or clip.id not in second else m._replace(cer=cer(clip.text, second[clip.id]))
        for m, clip in zip(measures, clip_set.clips, strict=True)
    ]
    bounds = rate_bounds([m.rate for m in measures if m.rate], limits)
    own = [
        _own_fault(clip, m, bounds, limits)
        for clip, m in zip(clip_set.clips, measures, strict=True)
    ]
    findings, others = _without_repeats(clip_set.clips, measures, own, copies, limits)
    verdict = _verdict(clip_set.clips, measures, bounds, limits, sample, seed)
    found = tuple(measures), tuple(findings)
    return Audit(clip_set, limits, *found, bounds, verdict, second, others)


def measure_sound(wave_S: Int16[np.ndarray, " S"]) -> Measures:
    """Length, silence, clipping and sha256 of samples at 16 kHz, of any number from 1."""
    frames = np.pad(wave_S.astype(np.float64), (0, -len(wave_S) % _FRAME), "edge")
    power_T = frames.reshape(-1, _FRAME).var(axis=1) / 32768**2
    silent_T = power_T < max(_FLOOR, _RANGE * float(np.quantile(power_T, 0.95)))
    at_full_S = np.abs(wave_S.astype(np.int32)) >= _CLIPPED
    edges = np.flatnonzero(np.diff(np.concatenate([[False], at_full_S, [False]]).astype(np.int8)))
    runs = edges[1::2] - edges[::2]
    return Measures(
        duration_s=len(wave_S) / SAMPLE_RATE,
        silence=float(silent_T.mean()),
        clipping=float(runs[runs >= _CLIPPED_RUN].sum()) / len(wave_S),
        sha=hashlib.sha256(wave_S.tobytes()).digest(),
    )


def script_shares(text: str) -> tuple[float | None, float]:
    """Shares of the letters that are Hebrew, and that are Yiddish digraphs; None: no letter.

    Yiddish written with two plain letters instead is not told from Hebrew here.
    """
    letters = [c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] == "L"]
    if not letters:
        return None, 0.0
    hebrew = sum("\u05d0" <= c <= "\u05ea" or "\u05ef" <= c <= "\u05f2" for c in letters)
    yiddish = sum("\u05f0" <= c <= "\u05f2" for c in letters)
    return hebrew / len(letters), yiddish / len(letters)


def cer(text: str, other: str) -> float:
    """Character errors of `text` against `other` over the length of the longer, normalised.

    Over the longer, so that it ends at 1 and neither of the two is taken for the truth.
    """
    ours, theirs = normalize_ivrit(text), normalize_ivrit(other)
    if not ours or not theirs:
        return float(ours != theirs)
    errors = int(character_errors([theirs], [ours]).errors_N[0])
    return errors / max(len(ours), len(theirs))


def rate_bounds(rates: Sequence[float], limits: Limits) -> tuple[float, float]:
    """Characters a second that a set's texts may have: median and spread of their logarithm."""
    if len(rates) < limits.own_rate_clips:
        return limits.usual_rate
    logs = np.log(rates)
    middle = float(np.median(logs))
    spread = _SIGMA * float(np.median(np.abs(logs - middle)))
    width = max(limits.rate_spreads * spread, math.log(limits.min_rate_factor))
    return math.exp(middle - width), math.exp(middle + width)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, JASA 1927); (0, 1) where nothing was looked at."""
    if not total:
        return 0.0, 1.0
    z, share, weight = 1.96, hits / total, 1.96**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def stratified(clips: Sequence[Clip], numbers: Sequence[int], most: int, seed: int) -> list[int]:
    """At most `most` of the numbers: each stratum has its share, drawn at random.

    Strata: thirds of the lengths, and quality below or above its median, or not known.
    """
    if len(numbers) <= most:
        return list(numbers)
    third = np.quantile([clips[i].duration_s for i in numbers], [1 / 3, 2 / 3])
    scores = [score for i in numbers if (score := clips[i].quality) is not None]
    middle = float(np.median(scores)) if scores else 0.0
    strata: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in numbers:
        score = clips[i].quality
        good = -1 if score is None else int(score >= middle)
        strata[int(np.searchsorted(third, clips[i].duration_s)), good].append(i)
    parts = [strata[key] for key in sorted(strata)]
    exact = [most * len(part) / len(numbers) for part in parts]
    sizes = [math.floor(size) for size in exact]
    largest = sorted(range(len(parts)), key=lambda k: (sizes[k] - exact[k], k))
    for k in largest[: most - sum(sizes)]:
        sizes[k] += 1
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(part, size, False) for part, size in zip(parts, sizes, strict=True)]
    return sorted(int(i) for part in drawn for i in part)


def _measure_all(
    clip_set: ClipSet, limits: Limits, threads: int, advance: Callable[[float], None]
) -> tuple[list[Measures], dict[int, set[int]]]:
    """Measures of each clip, and which clips are near copies of which earlier ones."""
    measures: list[Measures] = []
    copies: dict[int, set[int]] = defaultdict(set)
    before: dict[int, Fingerprint] = {}
    group: dict[int, Fingerprint] = {}
    held_s = 0.0
    for number, (measure, mark) in enumerate(_looked_at(clip_set, threads)):
        advance(clip_set.clips[number].duration_s)
        measures.append(measure)
        if mark is None or mark.too_short:
            continue
        group[number] = mark
        held_s += measure.duration_s
        if held_s >= limits.group_hours * 3600:
            _find_near(before, group, measures, copies, limits)
            before, group, held_s = group, {}, 0.0
    _find_near(before, group, measures, copies, limits)
    return measures, copies


def _looked_at(clip_set: ClipSet, threads: int) -> Iterator[tuple[Measures, Fingerprint | None]]:
    def look(number: int) -> tuple[Measures, Fingerprint | None]:
        clip = clip_set.clips[number]
        try:
            wave = clip_set.read(number)
        except BadClip as fault:
            return Measures(0.0, fault=fault), None
        sound = measure_sound(wave)
        text = normalize_ivrit(clip.text)
        if not text:
            return sound, fingerprint(wave)
        hebrew, yiddish = script_shares(text)
        rates = (len(part) / sound.duration_s for part in (text, text.split()))
        full = sound._replace(hebrew=hebrew, yiddish=yiddish)
        return full._replace(rate=next(rates), words_rate=next(rates)), fingerprint(wave)

    at_once = 16 * threads
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(clip_set.clips), at_once):
            yield from pool.map(look, range(start, min(start + at_once, len(clip_set.clips))))


def _find_near(
    before: Mapping[int, Fingerprint],
    group: Mapping[int, Fingerprint],
    measures: Sequence[Measures],
    copies: dict[int, set[int]],
    limits: Limits,
) -> None:
    """Adds, for each clip of the group, the earlier clips of both that it is a copy of."""
    known = [*before, *group]
    index = build_index([*before.values(), *group.values()])
    for number, mark in group.items():
        for match in find_copies(index, mark):
            other = known[match.clip]
            shorter_s = min(measures[number].duration_s, measures[other].duration_s)
            enough = match.end_s - match.start_s >= limits.copied_share * shorter_s
            if other < number and enough and len(copies[number]) < _PARTNERS:
                copies[number].add(other)


def _own_fault(
    clip: Clip, found: Measures, bounds: tuple[float, float], limits: Limits
) -> Finding | None:
    if found.fault:
        return Finding(found.fault.reason, found.fault.detail)
    if limits.min_quality is not None and (low := quality_fault(clip, limits.min_quality)):
        return Finding(low, "" if clip.quality is None else f"{clip.quality:g}")
    if found.rate and found.silence > limits.max_silence_share:
        return Finding("is nearly all silence", f"{found.silence:.1%}")
    if found.clipping > limits.max_clipping_share:
        return Finding("is clipped", f"{found.clipping:.1%} of the samples")
    if found.hebrew is not None and found.hebrew < limits.min_hebrew_share:
        return Finding("has few Hebrew letters", f"{found.hebrew:.0%} of its letters")
    if found.yiddish > limits.max_yiddish_share:
        return Finding("is written in Yiddish", f"{found.yiddish:.0%} digraphs")
    if found.rate and not bounds[0] <= found.rate <= bounds[1]:
        told = f"{found.rate:.1f} characters a second, not {bounds[0]:.1f} to {bounds[1]:.1f}"
        return Finding("has too much or too little text for its length", told)
    if found.cer is not None and found.cer > limits.max_cer:
        return Finding("disagrees with the second transcript", f"CER {found.cer:.2f}")
    return None


def _without_repeats(
    clips: Sequence[Clip],
    measures: Sequence[Measures],
    own: Sequence[Finding | None],
    copies: Mapping[int, set[int]],
    limits: Limits,
) -> tuple[list[Finding | None], int]:
    """Findings with repeats of earlier clips that stay; and how many texts others say as well.

    A copy of a clip that goes for a fault of its own is no repeat: its text may be the right one.
    """
    findings = list(own)
    sounds: dict[bytes, int] = {}
    texts: dict[tuple[str, str], int] = {}
    said: dict[str, set[str]] = defaultdict(set)
    for i, clip in enumerate(clips):
        if findings[i]:
            continue
        text = normalize_ivrit(clip.text)
        long = len(text.split()) >= limits.same_text_words
        near = sorted(j for j in copies.get(i, ()) if findings[j] is None)
        if (first := sounds.get(measures[i].sha)) is not None:
            findings[i] = Finding("has the samples of another clip", clips[first].id)
        elif near:
            findings[i] = Finding("has the sound of another clip", clips[near[0]].id)
        elif long and (first := texts.get((clip.speaker, text))) is not None:
            findings[i] = Finding("has the text of another clip of its speaker", clips[first].id)
        else:
            sounds[measures[i].sha] = texts[clip.speaker, text] = i
            if long:
                said[text].add(clip.speaker)
    return findings, sum(len(speakers) for speakers in said.values() if len(speakers) > 1)


def _verdict(
    clips: Sequence[Clip],
    measures: Sequence[Measures],
    bounds: tuple[float, float],
    limits: Limits,
    most: int,
    seed: int,
) -> Verdict:
    """Clips without text, or that cannot be decoded, are no matter of alignment."""
    texts = [i for i, m in enumerate(measures) if m.rate]
    heard = [i for i, m in enumerate(measures) if m.cer is not None]
    agreement = bool(heard) and 2 * sum(measures[i].cer is not None for i in texts) >= len(texts)
    numbers = heard if agreement else texts
    drawn = [measures[i] for i in stratified(clips, numbers, most, seed)]
    if agreement:
        low = sum(m.cer is not None and m.cer > limits.max_cer for m in drawn)
    else:
        low = sum(not bounds[0] <= (m.rate or 0.0) <= bounds[1] for m in drawn)
    share = low / len(drawn) if drawn else 0.0
    decision: Literal["proceed", "caution", "stop"] = "proceed"
    if share >= 0.1:
        decision = "stop" if share > 0.15 else "caution"
    interval = wilson(low, len(drawn))
    return Verdict(decision, "agreement" if agreement else "rate", low, len(drawn), share, interval)

"""Contamination: is what a model was trained on in the sets that it is tested on?

Four ways to see it, each of which the others may miss: the same id, the same recording, the same
text, the same sound (`data/fingerprint.py`: re-encoded, louder, shifted, cut out of a longer file).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hebasr_jax.data.clips import BadClip, Clip, ClipSet
from hebasr_jax.data.fingerprint import (
    Fingerprint,
    Match,
    build_index,
    find_copies,
    fingerprint,
)
from hebasr_jax.metrics import normalize_ivrit
from hebasr_jax.run_folder import write_json

GRAM_WORDS = 8  # so many in a row are hardly ever said twice by chance
SHORT_WORDS = 5  # anybody may say a sentence of fewer
HELD_SHARE = 0.5  # of a test text's words that must stand in training texts
_AT_ONCE = 1024  # clips handed to the threads at a time
# Numbers, and rows of parquet files: two sets have the same ones and it means nothing.
_NO_NAME = re.compile(r"[\d\W_]*(\.\w+)?|.*\.parquet#\d+")

_COUNTED = ("id", "recording", "text", "audio")  # kinds that are overlap; the others are told
Given = TypeVar("Given")
Made = TypeVar("Made")


class _Found(NamedTuple):
    """What was found of one kind: the clips of the tests, and those of training."""

    tests: dict[int, dict[str, Any]]  # one example each: the first, or that of the highest score
    train: set[int]


class _Sound(NamedTuple):
    """What was found by ear, and which clips could not be heard or are too short."""

    found: _Found
    bad: dict[int, BadClip]  # of the tests
    short: set[int]
    bad_train: dict[int, BadClip]
    short_train: set[int]


def check_overlap(
    train: ClipSet,
    tests: Sequence[ClipSet],
    *,
    examples: int = 20,
    threads: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """What `train` shares with each of `tests`.

    id, recording: the same name, not empty, on both sides. Ids without a letter and default ids
      of parquet rows (`FILE.parquet#ROW`) name nothing and do not count.
    text: after `normalize_ivrit`, at least half of the words of a test text of 8 or more stand in
      runs of 8 that training texts have as well, all of training together; or the whole text is
      that of a training clip and has 5 words or more.
    phrase: some run of 8 words, but under half of the text. short_text: the same text of under 5
      words. Both are told and do not count as overlap: people say the same things.
    audio: a piece of at least half a second of the same sound (`fingerprint.find_copies`); the
      example tells where it begins and ends in both.

    The fingerprints of the tests are in memory (3 MB an hour); training clips are read once, in
    `threads`, and forgotten. Clips of either side that cannot be read are counted and named.

    Args:
      examples: of each kind and set, at most.
      progress: called with the clips whose sound was looked at, and their total.

    Returns:
      {"format", "rule", "train": {name, clips, hours, unreadable, too_short, overlapping: ids},
      "tests": {name: {clips, hours, unreadable, too_short, overlapping, and each kind}}}, where
      a kind is {"clips": number, "examples": [...]}, and so is unreadable.
    """
    clips = [clip for test in tests for clip in test.clips]
    found = {
        "id": _same_names(train, clips, lambda clip: clip.id),
        "recording": _same_names(train, clips, lambda clip: clip.recording),
        **_same_texts(train, clips),
    }
    sound = _same_sound(train, tests, threads=threads, progress=progress)
    found["audio"] = sound.found
    overlapping = sorted(set[int]().union(*(found[kind].train for kind in _COUNTED)))
    result: dict[str, Any] = {
        "format": 1,
        "rule": {"gram_words": GRAM_WORDS, "short_words": SHORT_WORDS, "held_share": HELD_SHARE},
        "train": _summary(train, sound.bad_train, sound.short_train, examples)
        | {"overlapping": [train.clips[i].id for i in overlapping]},
        "tests": {},
    }
    start = 0
    for test in tests:
        bad = {i - start: fault for i, fault in sound.bad.items() if i >= start}
        bad = {i: fault for i, fault in bad.items() if i < len(test.clips)}
        short = sound.short & set(range(start, start + len(test.clips)))
        result["tests"][test.name] = _summary(test, bad, short, examples) | _kinds(
            test.clips, start, found, examples
        )
        start += len(test.clips)
    return result


def _kinds(
    clips: Sequence[Clip], start: int, found: dict[str, _Found], examples: int
) -> dict[str, Any]:
    """Counts and examples of one test set, whose clips are numbered from `start`."""
    numbers = range(start, start + len(clips))
    told: dict[str, Any] = {
        "overlapping": sum(any(i in found[kind].tests for kind in _COUNTED) for i in numbers)
    }
    for kind, (hits, _) in found.items():
        rows = [
            {"test": clip.id} | hits[i] for i, clip in zip(numbers, clips, strict=True) if i in hits
        ]
        rows.sort(key=lambda row: -row.get("score", 0))
        told[kind] = {"clips": len(rows), "examples": rows[:examples]}
    return told


def write_overlap(out: Path, result: dict[str, Any]) -> Path:
    """Writes `out`/overlap.json, whole or not at all. Raises `UserError`."""
    write_json(out / "overlap.json", result)
    return out / "overlap.json"


def describe_overlap(result: dict[str, Any]) -> list[str]:
    """Lines for the terminal: one for training, one for each test set."""
    train = result["train"]
    lines = [
        f"{train['name']}: {len(train['overlapping']):,} of {train['clips']:,} training clips "
        f"overlap a test set{_unchecked(train)}"
    ]
    for name, test in result["tests"].items():
        told = ", ".join(
            f"{kind.replace('_', ' ')} {test[kind]['clips']:,}"
            for kind in (*_COUNTED, "phrase", "short_text")
            if test[kind]["clips"]
        )
        share = f"{test['overlapping']:,} of {test['clips']:,} clips overlap"
        lines.append(f"{name}: {share}{f' ({told})' if told else ''}{_unchecked(test)}")
    return lines


def _unchecked(summary: dict[str, Any]) -> str:
    bad, short = summary["unreadable"], summary["too_short"]
    told = f"; {bad['clips']:,} unreadable" if bad["clips"] else ""
    told += "".join(f", first {row['id']}" for row in bad["examples"][:1])
    return told + (f"; {short:,} too short for a fingerprint" if short else "")


def trained_on(train: Sequence[ClipSet], held: Sequence[ClipSet]) -> list[str]:
    """A line for each dev or test set whose clips or recordings, by their names, are trained on.

    A clip is the same where id and length are; where the id names nothing, the text as well. A
    recording is one of a source. Nothing is listened to, unlike in `check_overlap`.
    """
    lines = []
    clips = [(one.name, {_clip_key(clip) for clip in one.clips}) for one in train]
    recordings = [(one.name, {_recording_key(clip) for clip in one.clips}) for one in train]
    for one in held:
        for what, named, key in (
            ("clips", clips, _clip_key),
            ("recordings", recordings, lambda clip: clip.recording and _recording_key(clip)),
        ):
            own = {found for clip in one.clips if (found := key(clip))}
            shared = {name: len(own & theirs) for name, theirs in named if own & theirs}
            if shared:
                told = ", ".join(f"{count:,} in {name}" for name, count in shared.items())
                lines.append(
                    f"{one.name}: of its {len(own):,} {what} some are trained on: {told}; scores "
                    "on it are too good. Name a list of them in `without` of the training set"
                )
                break
    return lines


def _clip_key(clip: Clip) -> tuple[str, ...]:
    # Normalised, since hebrew-v1 may be one set's only.
    text = normalize_ivrit(clip.text) if _NO_NAME.fullmatch(clip.id) else ""
    return clip.id, f"{clip.duration_s:.3f}", text


def _recording_key(clip: Clip) -> tuple[str, str] | None:
    """Source and recording; stitched clips have the speaker or source for a recording."""
    name = clip.recording or clip.speaker or clip.source
    nothing = not clip.source and _NO_NAME.fullmatch(name)
    return None if nothing else (clip.source, name)


def _summary(
    clip_set: ClipSet, bad: dict[int, BadClip], short: set[int], examples: int
) -> dict[str, Any]:
    faults = list(clip_set.bad) + [(clip_set.clips[i].id, fault) for i, fault in bad.items()]
    named = [{"id": where, "why": str(fault)} for where, fault in faults[:examples]]
    return {
        "name": clip_set.name,
        "clips": len(clip_set.clips),
        "hours": round(sum(clip.duration_s for clip in clip_set.clips) / 3600, 4),
        "unreadable": {"clips": len(faults), "examples": named},
        "too_short": len(short),
    }


def _same_names(train: ClipSet, clips: Sequence[Clip], name: Callable[[Clip], str]) -> _Found:
    found = _Found({}, set())
    wanted = _numbers_of(map(name, clips))
    for number, clip in enumerate(train.clips):
        if (own := name(clip)) in wanted and not _NO_NAME.fullmatch(own):
            found.train.add(number)
            for i in wanted[own]:
                found.tests.setdefault(i, {"train": clip.id, "name": own})
    return found


def _numbers_of(keys: Iterator[str]) -> dict[str, list[int]]:
    numbers = defaultdict(list)
    for number, key in enumerate(keys):
        numbers[key].append(number)
    return numbers


def _same_texts(train: ClipSet, clips: Sequence[Clip]) -> dict[str, _Found]:
    kinds = {kind: _Found({}, set()) for kind in ("text", "phrase", "short_text")}
    texts = [normalize_ivrit(clip.text).split() for clip in clips]
    whole = _numbers_of(" ".join(words) for words in texts)
    grams = defaultdict(list)
    for i, words in enumerate(texts):
        for at, gram in enumerate(_grams(words)):
            grams[gram].append((i, at))
    held = {i: np.zeros(len(words), bool) for i, words in enumerate(texts)}
    sharers: dict[int, dict[int, str]] = defaultdict(dict)  # by test clip: training clips, a gram
    for number, clip in enumerate(train.clips):
        words = normalize_ivrit(clip.text).split()
        for gram in _grams(words):
            for i, at in grams.get(gram, ()):
                held[i][at : at + GRAM_WORDS] = True
                sharers[i].setdefault(number, gram)
        text = " ".join(words)
        if words and len(words) < GRAM_WORDS and text in whole:
            kind = kinds["text" if len(words) >= SHORT_WORDS else "short_text"]
            kind.train.add(number)
            for i in whole[text]:
                kind.tests.setdefault(i, {"train": clip.id, "text": text, "score": 1.0})
    for i, numbers in sharers.items():
        share = float(held[i].mean())
        kind = kinds["text" if share >= HELD_SHARE else "phrase"]
        first, gram = next(iter(numbers.items()))
        told = {"train": train.clips[first].id, "text": gram, "score": round(share, 4)}
        kind.tests[i] = told | {"train_clips": len(numbers)}
        kind.train.update(numbers)
    return kinds


def _grams(words: Sequence[str]) -> Iterator[str]:
    for at in range(len(words) - GRAM_WORDS + 1):
        yield " ".join(words[at : at + GRAM_WORDS])


def _same_sound(
    train: ClipSet,
    tests: Sequence[ClipSet],
    *,
    threads: int,
    progress: Callable[[int, int], None],
) -> _Sound:
    places = [(test, number) for test in tests for number in range(len(test.clips))]
    total = len(places) + len(train.clips)
    sound = _Sound(_Found({}, set()), {}, set(), {}, set())
    prints = []
    with ThreadPoolExecutor(threads) as pool:
        for i, made in _in_order(pool, lambda place: _listen(*place), places):
            if isinstance(made, BadClip):
                sound.bad[i] = made
                made = fingerprint(np.zeros(0, np.int16))
            elif made.too_short:
                sound.short.add(i)
            prints.append(made)
            progress(i + 1, total)
        index = build_index(prints)

        def search(number: int) -> tuple[bool, list[Match]] | BadClip:
            made = _listen(train, number)
            if isinstance(made, BadClip):
                return made
            return made.too_short, find_copies(index, made)

        for number, given in _in_order(pool, search, range(len(train.clips))):
            progress(len(places) + number + 1, total)
            if isinstance(given, BadClip):
                sound.bad_train[number] = given
                continue
            if given[0]:
                sound.short_train.add(number)
            for match in given[1]:
                sound.found.train.add(number)
                _keep_best(sound.found.tests, match, train.clips[number].id)
    return sound


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Given], Made], given: Sequence[Given]
) -> Iterator[tuple[int, Made]]:
    """Numbered results; few are made ahead of the one that is asked for."""
    for start in range(0, len(given), _AT_ONCE):
        made = pool.map(function, given[start : start + _AT_ONCE])
        yield from enumerate(made, start)


def _listen(clip_set: ClipSet, number: int) -> Fingerprint | BadClip:
    try:
        return fingerprint(clip_set.read(number))
    except BadClip as fault:
        return fault


def _keep_best(tests: dict[int, dict[str, Any]], match: Match, train_id: str) -> None:
    before = tests.get(match.clip, {"score": 0.0, "train_clips": 0})
    found = {
        "train": train_id,
        "score": match.score,
        "test_s": [match.start_s, match.end_s],
        "train_s": [match.other_start_s, match.other_end_s],
    }
    best = max(before, found, key=lambda row: row["score"])
    tests[match.clip] = best | {"train_clips": before["train_clips"] + 1}

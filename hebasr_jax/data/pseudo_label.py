"""Texts for sound that has none: two systems hear it, and what they agree on is kept.

FOLDER/labels/ holds pieces.jsonl (where each clip is cut, at pauses, and what of it is silent) and
first.jsonl, second.jsonl (what each system wrote of each piece), each with a .json that says what
made it. Lines are only added, some pieces at a time: a run that was stopped goes on where it was,
and has the bytes of one that was not. FOLDER/labels.json tells what was kept, and why not.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hebasr_jax.data.adapt import normalized
from hebasr_jax.data.adapters import filled
from hebasr_jax.data.audit import cer
from hebasr_jax.data.clips import Clip, ClipSet, Removed
from hebasr_jax.data.label_log import append, json_lines, resume, write_json
from hebasr_jax.data.label_pieces import Part, cut_all, piece_reader, waves_of
from hebasr_jax.data.prepare import Progress
from hebasr_jax.data.quality import top_reasons
from hebasr_jax.data.shard_work import writing
from hebasr_jax.data.shards import (
    ORIGIN_FILE,
    REMOVED_FILE,
    SUFFIX,
    file_digest,
    read_origin,
    write_synced,
)
from hebasr_jax.errors import UserError
from hebasr_jax.hypotheses import read_texts
from hebasr_jax.identity import key_of
from hebasr_jax.metrics import normalize_ivrit
from hebasr_jax.run_config import Source

if TYPE_CHECKING:
    from hebasr_jax.evaluate import System

CONTROL = "faster-whisper:"
"""Before the folder or hub id of a model in CTranslate2's form."""

LABELS_FOLDER, LABELS_FILE = "labels", "labels.json"
_CALL_S = (300.0, 3600.0)  # of audio between two writes, on a CPU and on a GPU
_BINS = 20  # of the histogram of CER


@dataclass(frozen=True)
class Labelling:
    """How texts are made.

    first: whose texts are kept: a model folder in either layout, a hub id or a run, or
      `faster-whisper:` and a folder or hub id of CTranslate2.
    second: what must agree: the same, or a .jsonl file of `id` and `text`.
    max_cer: above it a piece is left out: character errors over the longer of the two texts, both
      normalised as the benchmark does.
    piece_s: the most that a piece lasts, in seconds.
    """

    first: str
    second: str
    max_cer: float = 0.1
    piece_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.max_cer < 1:
            raise UserError(f"--max-cer {self.max_cer:g} is no error rate", "it is 0 to below 1")
        if self.first == self.second:
            why = "One system always agrees with itself."
            raise UserError(f"--second is {self.second} again", why, "Name another system.")


class _Transcript(NamedTuple):
    """A system whose texts were made elsewhere."""

    texts: Mapping[str, str]
    about: Mapping[str, Any]


def load_system(given: str) -> "System | _Transcript":
    """A model of ours, a control, or a transcript. Raises UserError where it cannot be had."""
    if given.endswith(".jsonl"):
        path = Path(given).expanduser()
        texts = read_texts(path)
        return _Transcript(texts, {"name": path.name, "fingerprint": file_digest(path)})
    if given.startswith(CONTROL):
        from hebasr_jax.control import load_control

        return load_control(given.removeprefix(CONTROL))
    from hebasr_jax.evaluate import system_of
    from hebasr_jax.program_cache import keep_programs
    from hebasr_jax.transcribe import load_recognizer

    keep_programs()
    return system_of(load_recognizer(given))


def label_set(
    clip_set: ClipSet,
    source: Source,
    folder: Path,
    labelling: Labelling,
    *,
    max_bad_share: float,
    check: Callable[[ClipSet], None],
    progress: Progress,
    say: Callable[[str], None],
) -> ClipSet:
    """The pieces that two systems agree on as a set with texts, to be prepared in `folder`.

    Texts of the given set count for nothing. Writes labels/, labels.json, origin.json, and
    removed.jsonl with each piece that is left out, why, and its CER. Raises UserError for systems
    that cannot be had, for labels in the folder that something else made, for too many clips that
    cannot be read, and when nothing is kept.

    Args:
      check: raises UserError where shards in the folder are of another set than what was made.
    """
    _refuse_other_sound(folder, clip_set)
    labels = folder / LABELS_FOLDER
    first, second = _load_both(labelling)
    with writing(folder):
        labels.mkdir(parents=True, exist_ok=True)
    say(f"{clip_set.name}: looking for pauses")
    parts, bad = cut_all(clip_set, labels, labelling.piece_s, progress)
    bad = [*((where, fault.reason) for where, fault in clip_set.bad), *bad]
    if len(bad) > max_bad_share * (len(clip_set.clips) + len(clip_set.bad)):
        raise UserError(
            f"{clip_set.name}: {len(bad)} recordings cannot be read",
            top_reasons(reason for _, reason in bad),
            "Mend them, or raise --max-bad-share.",
        )
    if isinstance(second, _Transcript):
        _refuse_others(second, parts, labels)
    systems = {"first": first, "second": second}
    told = []
    for name, system in systems.items():
        say(f"{clip_set.name}: {system.about['name']} listens")
        told.append(_written(system, clip_set, parts, labels / name, progress))
    kept, removed = _judged(clip_set, parts, told, labelling.max_cer, source.normalizer)
    about = {name: _named(system) for name, system in systems.items()}
    summary = _summary(clip_set, labelling, about, parts, kept, removed)
    lost = [*clip_set.removed, *bad]
    rows = [*removed, *({"id": where, "reason": reason} for where, reason in lost)]
    made = _kept_set(clip_set, kept, rows)
    check(made)
    with writing(folder):
        write_json(folder / LABELS_FILE, summary)
        write_synced(folder / REMOVED_FILE, json_lines(rows))
        write_json(folder / ORIGIN_FILE, _origin(source, clip_set, labelling, about, kept))
    if not kept:
        reasons = top_reasons(row["reason"] for row in rows)
        do = f"See {folder / LABELS_FILE} for how far apart the systems are."
        raise UserError(f"{clip_set.name}: no piece of {len(parts)} is kept", reasons, do)
    return made


def _load_both(labelling: Labelling) -> "tuple[System, System | _Transcript]":
    first, second = load_system(labelling.first), load_system(labelling.second)
    if isinstance(first, _Transcript):
        raise UserError(f"--pseudo-label {labelling.first} is no model", "", "Use it as --second.")
    if not isinstance(second, _Transcript) and second.key == first.key:
        why = "One system always agrees with itself."
        raise UserError(f"{labelling.second} is the same model as {labelling.first}", why)
    return first, second


def _refuse_other_sound(folder: Path, clip_set: ClipSet) -> None:
    """Refuses a folder with shards of another sound, before hours of listening."""
    then = read_origin(folder).get("source_fingerprint")
    if any(folder.glob(f"*{SUFFIX}")) and then != clip_set.fingerprint:
        raise UserError(
            f"{folder}: its shards were begun with another source or other settings",
            "They are not pseudo-labelled shards of this sound.",
            "Give a new --out or --name.",
        )


def _written(
    system: "System | _Transcript",
    clip_set: ClipSet,
    parts: Sequence[Part],
    file: Path,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """What a system wrote of each piece that is not silent, by id."""
    if isinstance(system, _Transcript):
        return {part: {"text": text} for part, text in system.texts.items()}
    from hebasr_jax.transcribe import goes_round

    heard = [part for part in parts if not part.silent]
    gpu = {"gpu", "cuda"} & {system.about.get("platform"), system.about.get("device")}
    calls = [*_calls(heard, _CALL_S[bool(gpu)])]
    made_by = {
        "set": clip_set.fingerprint,
        "pieces": key_of([[part.id, part.start_s, part.end_s] for part in heard]),
        "system": system.key,
        **_named(system),
    }
    ends = [0, *itertools.accumulate(map(len, calls))]
    rows = resume(file, made_by, ends)
    left = calls[ends.index(len(rows)) :]
    with progress(sum((p.end_s - p.start_s for call in left for p in call), start=0.0)) as advance:
        for call, waves in zip(left, waves_of(clip_set, left), strict=True):
            found = system.decode(waves, [""] * len(waves))
            made = [
                {
                    "id": part.id,
                    "text": result.transcript.text,
                    "logprob": round(result.logprob, 4) or None,  # a control tells none
                    "finished": result.finished,
                    "loop": goes_round(result.tokens),
                }
                for part, result in zip(call, found, strict=True)
            ]
            append(file, made)
            rows += made
            advance(sum(part.end_s - part.start_s for part in call))
    return {row["id"]: row for row in rows}


def _calls(parts: Iterable[Part], call_s: float) -> Iterator[list[Part]]:
    """Pieces that are decoded and written down together; the same in every run."""
    call, seconds = list[Part](), 0.0
    for part in parts:
        call.append(part)
        seconds += part.end_s - part.start_s
        if seconds >= call_s:
            yield call
            call, seconds = [], 0.0
    if call:
        yield call


def _refuse_others(second: _Transcript, parts: Sequence[Part], labels: Path) -> None:
    if not any(part.id in second.texts for part in parts):
        raise UserError(
            f"{second.about['name']}: has none of the pieces",
            f"The first piece is {parts[0].id if parts else None!r}, its first id "
            f"{next(iter(second.texts))!r}.",
            f"{labels / 'pieces.jsonl'} has the ids and times that it must have.",
        )


def _judged(
    clip_set: ClipSet,
    parts: Sequence[Part],
    told: Sequence[Mapping[str, dict[str, Any]]],
    max_cer: float,
    normalizer: str,
) -> tuple[list[tuple[Part, Clip, float]], list[dict[str, Any]]]:
    """Pieces as clips with their text and CER; and rows of those that are left out."""
    kept: list[tuple[Part, Clip, float]] = []
    removed: list[dict[str, Any]] = []
    for part in parts:
        first, second = (rows.get(part.id) for rows in told)
        reason, rate = _fault(part, first, second, max_cer)
        if first and rate is not None and not reason:
            try:
                clip = _clip(clip_set.clips[part.clip], part, first["text"])
                kept.append((part, normalized(clip) if normalizer else clip, rate))
                continue
            except Removed as fault:
                reason = fault.reason
        seconds = {"start_s": part.start_s, "end_s": part.end_s}
        cut_from = {"clip": clip_set.clips[part.clip].id, **seconds}
        rounded = None if rate is None else round(rate, 4)
        removed.append({"id": part.id, "reason": reason, "cer": rounded, **cut_from})
    return kept, removed


def _fault(
    part: Part, first: dict[str, Any] | None, second: dict[str, Any] | None, max_cer: float
) -> tuple[str, float | None]:
    """Why a piece is left out, "" where it is kept, and its CER; None where there is none.

    Two empty texts agree, but on what is no speech may be none that both miss: it is left out.
    """
    if part.silent:
        return "is silent", None
    if first is None or second is None:
        return "has no second text", None
    if first.get("loop") or second.get("loop"):
        return "looks like a loop", None
    if not first.get("finished", True) or not second.get("finished", True):
        return "ran out of tokens", None
    if not normalize_ivrit(first["text"]) and not normalize_ivrit(second["text"]):
        return "empty", None
    rate = cer(first["text"], second["text"])
    return "systems disagree" * (rate > max_cer), rate


def _clip(clip: Clip, part: Part, text: str) -> Clip:
    return replace(
        clip,
        id=part.id,
        text=" ".join(text.split()),
        duration_s=part.end_s - part.start_s,
        recording=clip.recording or clip.id,
        context="",
        segments=(),
        quality=None,
        pseudo_label=True,
    )


def _kept_set(
    clip_set: ClipSet,
    kept: Sequence[tuple[Part, Clip, float]],
    rows: Sequence[Mapping[str, Any]],
) -> ClipSet:
    read = piece_reader(clip_set)
    parts, clips = [part for part, _, _ in kept], tuple(clip for _, clip, _ in kept)
    made_of = [clip_set.fingerprint, [[*part] for part in parts], [clip.text for clip in clips]]
    return ClipSet(
        name=clip_set.name,
        clips=clips,
        read=lambda index: read(parts[index]),
        fingerprint=hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
        removed=tuple((row["id"], row["reason"]) for row in rows),
    )


def _named(system: "System | _Transcript") -> dict[str, Any]:
    names = ("name", "revision", "fingerprint", "dtype", "device", "options", "beams", "versions")
    return {name: system.about[name] for name in names if name in system.about}


def _summary(
    clip_set: ClipSet,
    labelling: Labelling,
    systems: Mapping[str, Any],
    parts: Sequence[Part],
    kept: Sequence[tuple[Part, Clip, float]],
    removed: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What labels.json holds; hours of audio, and CER in twenty steps of 0.05 from 0 to 1."""
    out: dict[str, dict[str, float]] = {}
    for row in removed:
        entry = out.setdefault(row["reason"], {"pieces": 0, "hours": 0.0})
        entry["pieces"] += 1
        entry["hours"] += (row["end_s"] - row["start_s"]) / 3600
    rates = [rate for _, _, rate in kept] + [r["cer"] for r in removed if r["cer"] is not None]
    counts, edges = np.histogram(rates, bins=_BINS, range=(0.0, 1.0))
    return {
        "format": 1,
        "set": clip_set.name,
        "fingerprint": clip_set.fingerprint,
        "systems": dict(systems),
        "max_cer": labelling.max_cer,
        "piece_s": labelling.piece_s,
        "pieces": len(parts),
        "hours": sum(part.end_s - part.start_s for part in parts) / 3600,
        "kept": {
            "pieces": len(kept),
            "hours": sum(part.end_s - part.start_s for part, _, _ in kept) / 3600,
        },
        "left_out": dict(sorted(out.items())),
        "cer": {"from": [round(float(edge), 2) for edge in edges[:-1]], "pieces": counts.tolist()},
    }


def _origin(
    source: Source,
    clip_set: ClipSet,
    labelling: Labelling,
    systems: Mapping[str, Any],
    kept: Sequence[tuple[Part, Clip, float]],
) -> dict[str, Any]:
    """What origin.json holds, for the cards."""
    whole, before = filled(source), read_origin(Path(source.path).expanduser())
    named = [f"{entry['name']}" for entry in systems.values()]
    return {
        "hub": whole.hub or before.get("hub"),
        "licence": whole.licence or before.get("licence"),
        "source_fingerprint": clip_set.fingerprint,
        "pseudo_labels": {"by": named, "max_cer": labelling.max_cer, "systems": dict(systems)},
        "clips": len(kept),
    }

"""Recognises test sets and scores them, so that every figure can be made again from its folder.

OUT/results.json holds the scores; OUT/SET/ the texts as they were written (hypotheses.jsonl), the
clips that could not be read (missing.jsonl), and what all that was made with (decoding.json,
written last). Decoding is done once for each model, way of decoding and state of the data;
scoring is done each time, from the texts.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hebasr_jax.average import finite, in_percent
from hebasr_jax.benchmark_sets import BENCHMARK_SETS, published_rates
from hebasr_jax.data.clips import BadClip, ClipSet
from hebasr_jax.data.shard_work import writing
from hebasr_jax.data.sources import describe
from hebasr_jax.errors import UserError
from hebasr_jax.eval_sets import EvalSet
from hebasr_jax.hub import NoAccess
from hebasr_jax.hypotheses import Hypothesis, read_hypotheses, write_hypotheses
from hebasr_jax.identity import code_version, imports_of, key_of, weights_key
from hebasr_jax.longform import Cutting, Decode, Failure, Sound, recognize_long
from hebasr_jax.run_folder import environment, read_json, write_json, write_text
from hebasr_jax.scoring import macro_mean, score_rows
from hebasr_jax.sound_level import estimate_snr_db, is_silent
from hebasr_jax.transcribe import Recognition, Recognizer, transcribe

MAX_MISSING_SHARE = 0.01
"""Of a set with more clips than this that could not be read, no rate is given."""

_LANGUAGE = "Hebrew"  # of the prompt; no clip is given its context either: the sets have none
_RATES = re.compile("wer|cer|wil|ci95|raw|slices")  # what is not given then

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class System:
    """A recogniser to evaluate.

    about: JSON for results.json: name revision fingerprint dtype device batch versions and more.
    key: changes with anything that its texts depend on: weights, tokenizer, options, code.
    """

    decode: Decode
    about: Mapping[str, Any]
    key: str


@dataclass(frozen=True)
class Settings:
    """How sets are evaluated.

    max_clips: the first clips of each set only, for a trial; the result says so.
    style: hypotheses are brought to the references' way of writing before they are scored.
    """

    cutting: Cutting = field(default_factory=Cutting)
    max_clips: int | None = None
    style: bool = True
    resamples: int = 1000
    seed: int = 0


def system_of(
    recognizer: Recognizer, *, beams: int = 1, batch_audio_s: float | None = None
) -> System:
    """A loaded model that decodes as `transcribe` does."""

    def decode(waves: Sequence[np.ndarray], contexts: Sequence[str]) -> list[Recognition]:
        return transcribe(
            recognizer, waves, context=contexts, beams=beams, batch_audio_s=batch_audio_s
        )

    compute, about = recognizer.compute, environment()
    named = {
        "fingerprint": weights_key(recognizer.params),
        "tokenizer": hashlib.sha256(recognizer.tokenizer.full.to_str().encode()).hexdigest(),
        "dtype": np.dtype(compute.dtype).name,
        "platform": recognizer.mesh.devices.flat[0].platform,
        "attention": str(compute.kernel),
        "beams": beams,
        "versions": about["packages"],
        "code": code_version(imports_of("transcribe", "longform", "data.decode")),
    }
    more = {
        "name": recognizer.folder.source,
        "revision": recognizer.folder.revision,
        "description": recognizer.description,
        "device": about["devices"],
        "batch": batch_audio_s,
        "commit": about["commit"],
    }
    return System(decode, {**more, **named}, key_of(named))


def run_sets(
    system: System,
    sets: Sequence[EvalSet],
    out: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    say: Say,
) -> tuple[dict[str, Any], list[str]]:
    """Evaluates sets one after the other and keeps OUT/results.json up to date.

    A set that cannot be opened goes under `skipped` with its reason, and the others go on. Texts
    that are there are used again if nothing they depend on has changed; `overwrite` has them
    made anew. Sets that the folder holds from before, by the same system, stay in the results.

    Returns:
      the content of results.json, and the names of the sets that failed or of which no rate can
      be given. A gated set that the hub does not give is skipped and is no failure.
    """
    key = key_of([system.key, asdict(settings.cutting), settings.max_clips])
    results: dict[str, Any] = {
        "format": 1,
        "model": {**system.about, "cutting": asdict(settings.cutting), "key": key},
        "sets": {n: _score(out / n, settings) for n in _kept(out, key, {s.name for s in sets})},
        "macro": {},
        "skipped": {},
        "published": published_rates(),
    }
    failed = []
    same = read_json(out / "results.json").get("model", {}).get("key") == key
    if not same or read_json(out / "compare.json").get("style") != settings.style:
        (out / "compare.json").unlink(missing_ok=True)  # of another system, or of other texts
    if not same:
        (out / "overlap.json").unlink(missing_ok=True)  # with what another model was trained on
    for one in sets:
        try:
            _decode_once(system, one, out / one.name, settings, key, overwrite, say)
            entry = _score(out / one.name, settings)
        except UserError as error:
            results["skipped"][one.name] = str(error)
            say(f"{one.name}: skipped: {error}")
            if not (isinstance(error, NoAccess) and one.may_refuse):
                failed.append(one.name)
        else:
            results["sets"][one.name] = entry
            say(f"{one.name}: {_told(entry)}")
            if entry["withheld"]:
                failed.append(one.name)
        macro = finite(macro_mean(results["sets"], [s.name for s in BENCHMARK_SETS]))
        trial = settings.max_clips is not None
        results["macro"] = {**macro, "trial": trial, "complete": macro["complete"] and not trial}
        write_json(out / "results.json", results)
    if results["macro"].get("sets"):
        say(_told_mean(results["macro"]))
    return results, failed


def _kept(out: Path, key: str, anew: Iterable[str]) -> list[str]:
    """Sets of results.json whose texts are still those of the same system: another may have made
    them anew since, and been stopped before it wrote results.json."""
    names = [name for name in read_json(out / "results.json").get("sets", {}) if name not in anew]
    return [n for n in names if read_json(out / n / "decoding.json").get("system") == key]


def _decode_once(
    system: System,
    one: EvalSet,
    folder: Path,
    settings: Settings,
    system_key: str,
    overwrite: bool,
    say: Say,
) -> None:
    """Writes a set's texts, unless those that are there were made in just this way."""
    opened = one.open()
    clips = _first(opened.clips, settings.max_clips)
    # A commit of the hub stands for the sound; of local files only their sizes are known yet.
    sound = opened.revision or _sound_digest(clips)
    key = key_of([system_key, clips.fingerprint, sound])
    done = read_json(folder / "decoding.json")
    if done.get("key") == key and not overwrite:
        say(f"{one.name}: nothing changed since it was decoded, {done['time']}")
        return
    say(describe(clips))
    others = sum(clip.language not in ("", _LANGUAGE) for clip in clips.clips)
    if others:
        say(f"{one.name}: {others} clips say another language; all are decoded as {_LANGUAGE}")
    with writing(folder, "Then run the same command again."):
        folder.mkdir(parents=True, exist_ok=True)
        of_the_set = ("overlap.json", f"{folder.name}/decoding.json") if done else ()
        for old in ("compare.json", *of_the_set):  # of what the folder held
            (folder.parent / old).unlink(missing_ok=True)
    rows, missing, facts = _recognise(system, clips, opened.draws, settings.cutting)
    write_hypotheses(folder / "hypotheses.jsonl", rows)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in missing]
    write_text(folder / "missing.jsonl", "".join(lines))
    about = {
        "key": key,
        "system": system_key,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "set": opened.source,
        "revision": opened.revision,
        "fingerprint": clips.fingerprint,
        "licence": opened.licence,
        "draws": opened.draws,
        "max_clips": settings.max_clips,
        "missing": len(missing),
        **facts,
        "model": system.about["name"],
        **{name: system.about[name] for name in ("dtype", "device", "batch", "versions")},
    }
    write_json(folder / "decoding.json", about)


def _recognise(
    system: System, clips: ClipSet, draws: str, cutting: Cutting
) -> tuple[list[Hypothesis], list[dict[str, str]], dict[str, Any]]:
    """Rows, clips that cannot be read, and how long it took."""
    levels: dict[int, tuple[float | None, bool]] = {}

    def blocks(index: int) -> Iterator[np.ndarray]:
        try:
            wave_S = clips.read(index)
        except BadClip as fault:
            raise UserError(fault.reason, fault.detail) from fault
        levels[index] = estimate_snr_db(wave_S), is_silent(wave_S)
        yield wave_S.astype(np.float32) / 32768

    sounds = (Sound(clip.id, partial(blocks, i)) for i, clip in enumerate(clips.clips))
    started = time.perf_counter()
    with compile_seconds() as compiling:
        found = {each.name: each for each in recognize_long(system.decode, sounds, cutting)}
    seconds = time.perf_counter() - started - sum(compiling)
    rows = []
    missing = [{"id": where, "reason": str(fault)} for where, fault in clips.bad]
    for index, clip in enumerate(clips.clips):
        result = found[clip.id]
        if isinstance(result, Failure):
            missing.append({"id": clip.id, "reason": " ".join(str(result.error).splitlines())})
            continue
        snr_db, silent = levels[index]
        row = Hypothesis(
            id=clip.id,
            reference=clip.text,
            hypothesis=result.text,
            duration_s=result.duration_s,
            group="" if draws == "clips" else getattr(clip, draws.removesuffix("s")),
            source=clip.source,
            speaker=clip.speaker,
            recording=clip.recording,
            snr_db=snr_db,
            silent=silent,
            loops=result.loops,
            finished=result.finished,
            pieces=result.pieces,
            audio=clips.files[index],
        )
        rows.append(row)
    audio_s = sum(row.duration_s for row in rows)
    speed = {"audio_s": audio_s, "recognition_s": seconds, "compile_s": sum(compiling)}
    return rows, missing, {**speed, "rtfx": audio_s / seconds}


def _score(folder: Path, settings: Settings) -> dict[str, Any]:
    """What results.json holds of a set."""
    rows, facts = read_hypotheses(folder / "hypotheses.jsonl"), read_json(folder / "decoding.json")
    if not rows:
        raise UserError(f"{folder.name}: no clip of it could be read", f"See {folder}.")
    seeds = {"resamples": settings.resamples, "seed": settings.seed}
    found = finite(score_rows(rows, style=settings.style, **seeds))
    missing, total = facts["missing"], facts["missing"] + len(rows)
    withheld = None
    if missing > MAX_MISSING_SHARE * total:
        withheld = (
            f"{missing} of {total} clips could not be read (missing.jsonl): "
            f"above {MAX_MISSING_SHARE:.0%} no WER is given"
        )
        found = {name: None if _RATES.search(name) else value for name, value in found.items()}
    return {**found, **facts, "withheld": withheld}


def _told_mean(macro: Mapping[str, Any]) -> str:
    named = "the six sets" if macro["complete"] else f"only {', '.join(macro['sets'])}"
    trial = ", a trial on their first clips" if macro["trial"] else ""
    return f"mean WER {100 * macro['wer']:.1f} % of {named}{trial}"


def _told(entry: Mapping[str, Any]) -> str:
    if entry["withheld"]:
        return entry["withheld"]
    if not entry["words"]:
        return f"no WER: no reference of its {entry['clips']} clips has a word"
    trial = f"; a trial on the first {entry['max_clips']} clips" if entry["max_clips"] else ""
    return (
        f"WER {in_percent(entry['wer'], entry['ci95'])} on {entry['words']:,} words, "
        f"{entry['missing']} clips missing, {entry['rtfx']:.1f} times real time{trial}"
    )


def _first(clips: ClipSet, most: int | None) -> ClipSet:
    """The first clips, with their files; rows that are no clips do not count in a trial."""
    if most is None or most >= len(clips.clips):
        return clips
    return replace(clips, clips=clips.clips[:most], files=clips.files[:most], bad=())


def _sound_digest(clips: ClipSet) -> str:
    """sha256 of every sample of a set, so that a file changed in place is seen."""
    digest = hashlib.sha256()
    for index in range(len(clips.clips)):
        try:
            wave_S = clips.read(index)
        except BadClip as fault:
            digest.update(str(fault).encode())
        else:
            digest.update(len(wave_S).to_bytes(8, "little") + wave_S.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def compile_seconds() -> Iterator[list[float]]:
    """Collects the seconds that XLA compiles for: warm-up, not recognition."""
    spent: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            spent.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield spent
    finally:
        jax.monitoring.unregister_event_duration_listener(note)

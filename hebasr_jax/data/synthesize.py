"""Speech from texts, by a command for each: sounds and a manifest, prepared as any other set.

What is made of a text depends on it, its speaker or id, the voices and the seed alone. Each sound
has its own file, named after all of these, so that a run that was stopped goes on.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import BadClip, ClipSet
from hebasr_jax.data.decode import read_sound, sound_duration_s
from hebasr_jax.data.prepare import Progress
from hebasr_jax.data.quality import Quarantine, top_reasons
from hebasr_jax.data.shard_work import writing
from hebasr_jax.data.shards import (
    ORIGIN_FILE,
    SUFFIX,
    file_digest,
    is_whole,
    manifest_row,
    publish,
    read_origin,
    write_synced,
)
from hebasr_jax.data.sources import open_source
from hebasr_jax.data.speech_texts import Line, Speech, command_words, read_texts, voice_name
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source

SPEECH_FOLDER = ".speech"  # in the folder of the shards, until all of them are there
QUARANTINE_FILE = "quarantine.jsonl"
_MANIFEST = "manifest.jsonl"
_SILENT = 33  # of 32768: -60 dB of full scale
_SHORTEST_S = 0.1
_TOLD = 200  # characters of a command's last words
_POINTS = re.compile("[\u05b0-\u05bc\u05c7\u02c8]")  # vowel points, and the stress mark of IPA


@dataclass(frozen=True, eq=False)
class _Commands:
    """Runs commands and can end all of them at once. Thread-safe."""

    limit_s: float
    running: set[subprocess.Popen] = field(default_factory=set)
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self, words: list[str], text_file: Path) -> None:
        """Waits for a command that reads a text. Raises `BadClip` when it fails or takes too long.

        Its messages go to a file, so that it waits for no reader and no memory is filled.
        """
        messages = text_file.with_name("messages")
        with text_file.open("rb") as text, messages.open("wb") as told:
            try:
                child = subprocess.Popen(
                    words, stdin=text, stdout=told, stderr=told, start_new_session=True
                )
            except (OSError, ValueError) as error:
                raise BadClip("voice command cannot be run", str(error)[:_TOLD]) from error
        self.running.add(child)
        try:
            if self.ended.is_set():
                raise BadClip("voice command was ended")
            code = child.wait(self.limit_s)
        except subprocess.TimeoutExpired:
            raise BadClip("voice command took too long", f"over {self.limit_s:g} s") from None
        finally:
            _end(child)
            self.running.discard(child)
        if code:
            last = messages.read_bytes()[-4 * _TOLD :].decode(errors="replace").strip()
            raise BadClip("voice command failed", f"exit code {code}: {last[-_TOLD:]}")

    def end(self) -> None:
        self.ended.set()
        for child in [*self.running]:
            _end(child)


def request_of(speech: Speech, **settings: Any) -> dict[str, Any]:
    """All that decides what is made, for `origin.json`."""
    return {
        "synthetic": True,
        "texts": speech.texts.name,
        "sha256": file_digest(speech.texts),
        "columns": {k: v for k, v in asdict(speech.columns).items() if v != getattr(Columns, k)},
        "spoken": speech.spoken,
        "normalizer": speech.normalizer,
        "voice": voice_name(speech),
        "voices": list(speech.voices),
        "seed": speech.seed,
        "licence": speech.licence or None,
    } | settings


def is_made(folder: Path, request: Mapping[str, Any]) -> bool:
    """Whether all shards of just this are there; their licence is put down as now given.

    Raises a UserError where shards of something else were begun.
    """
    if not any(folder.glob(f"*{SUFFIX}")):
        return False
    then = read_origin(folder)
    made_of = [name for name in request if name != "licence"]
    if changed := [name for name in made_of if then.get(name) != request[name]]:
        raise UserError(
            f"{folder}: its shards were begun with other texts, voices or settings",
            "; ".join(f"{name} {then.get(name)} is now {request[name]}" for name in changed)[:400],
            "Give what was given then, or a new --out or --name.",
        )
    made = is_whole(folder)
    if made and then.get("licence") != request["licence"]:
        _put_down(folder, {**then, **request})
    return made


def synthesize(
    speech: Speech,
    name: str,
    folder: Path,
    request: Mapping[str, Any],
    *,
    threads: int,
    max_bad_share: float,
    progress: Progress,
    say: Callable[[str], None],
) -> ClipSet:
    """The texts as a set of clips whose sounds lie in a folder of `folder`, to be prepared.

    Sounds that are there from an earlier run stay. Texts that no speech came of are bad rows; more
    of them than `max_bad_share` are a UserError, before all are tried.

    Args:
      request: from `request_of`; it is put down in `folder`.
      threads: commands that run at the same time.
    """
    lines, bad, removed = read_texts(speech)
    if not lines:
        raise _no_speech(speech, bad, removed)
    if not speech.command and (bare := sum(not _POINTS.search(line.said) for line in lines)):
        say(
            f"warning: {bare:,} of {len(lines):,} texts have neither vowel points nor IPA, and "
            "eSpeak leaves out vowels that are not written: --spoken names a field that has them"
        )
    sounds = folder / SPEECH_FOLDER
    with writing(folder):
        sounds.mkdir(parents=True, exist_ok=True)
        (folder / QUARANTINE_FILE).unlink(missing_ok=True)
    quarantine = Quarantine(folder / QUARANTINE_FILE, max_bad_share, len(lines) + len(bad))
    for where, fault in bad:
        quarantine.add(name, where, fault.reason, fault.detail)
    rows = []
    with (
        progress(float(len(lines))) as advance,
        closing(_speak_all(speech, lines, sounds, threads)) as spoken,
    ):
        for line, made in spoken:
            if isinstance(made, BadClip):
                bad.append((line.clip.id, made))
                quarantine.add(name, line.clip.id, made.reason, made.detail)
            else:
                row = manifest_row(line.clip, made.name)
                rows.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            advance(1.0)
    if not rows:
        raise _no_speech(speech, bad, removed)
    with writing(folder):
        write_synced(sounds / _MANIFEST, b"".join(rows))
    found = open_source(Source(name, str(sounds / _MANIFEST)))
    told = dict(request) | {"clips": len(found.clips), "bad": len(bad), "removed": len(removed)}
    _put_down(folder, told)
    return replace(found, bad=(*bad, *found.bad), removed=tuple(removed))


def _no_speech(
    speech: Speech, bad: Sequence[tuple[str, BadClip]], removed: Sequence[tuple[str, str]]
) -> UserError:
    reasons = [*(fault.reason for _, fault in bad), *(reason for _, reason in removed)]
    why = top_reasons(reasons) or "it has no line"
    return UserError(f"{speech.texts}: no text became speech", why, "Check the texts, or --columns")


def _put_down(folder: Path, told: Mapping[str, Any]) -> None:
    with writing(folder):
        write_synced(folder / ORIGIN_FILE, json.dumps(told, ensure_ascii=False, indent=1).encode())


def _speak_all(
    speech: Speech, lines: list[Line], sounds: Path, threads: int
) -> Generator[tuple[Line, Path | BadClip], None, None]:
    """Each text with its sound, in order; when left early, commands that run are ended."""
    commands = _Commands(speech.limit_s)

    def make(line: Line) -> Path | BadClip:
        try:
            return _speak(speech, line, sounds, commands)
        except BadClip as fault:
            return fault

    pool = ThreadPoolExecutor(threads)
    try:
        yield from zip(lines, pool.map(make, lines), strict=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        commands.end()
        raise
    finally:
        pool.shutdown()


def _speak(speech: Speech, line: Line, sounds: Path, commands: _Commands) -> Path:
    """The file with a text's speech: 16 kHz FLAC. Raises `BadClip`."""
    made_of = [voice_name(speech), line.voice, line.seed, line.said]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    file = sounds / f"{name}.flac"
    if file.is_file():
        return file
    with writing(sounds), tempfile.TemporaryDirectory(dir=sounds) as work:
        text_file, out = Path(work) / "text.txt", Path(work) / "out.wav"
        text_file.write_text(line.said + "\n", encoding="utf-8")
        values = {"text": line.said, "text_file": str(text_file), "out": str(out)}
        values |= {"voice": line.voice, "seed": str(line.seed)}
        commands.run([_filled(word, values) for word in command_words(speech)], text_file)
        wave = _read_speech(out, line.clip.id)
        partial = Path(work) / file.name
        _write_flac(partial, wave)
        publish(partial, file)
    return file


def _filled(word: str, values: Mapping[str, str]) -> str:
    """A word of the command with its places filled; a text may have {out} in it, as text."""
    return re.sub(r"\{(\w+)\}", lambda place: values[place[1]], word)


def _read_speech(out: Path, where: str) -> np.ndarray:
    """int16 [S] at 16 kHz of what a voice wrote. Raises `BadClip` where it is no speech."""
    if not out.is_file() or not out.stat().st_size:
        raise BadClip("voice command wrote no sound", where)
    wave = read_sound(out, sound_duration_s(out, where), where)
    if len(wave) < _SHORTEST_S * SAMPLE_RATE:
        raise BadClip("voice made hardly any sound", f"{where}: {len(wave) / SAMPLE_RATE:.3f} s")
    if np.abs(wave.astype(np.int32)).max() < _SILENT:
        raise BadClip("voice made silence", f"{where}: {len(wave) / SAMPLE_RATE:.2f} s")
    return wave


def _write_flac(file: Path, wave: np.ndarray) -> None:
    import soundfile

    soundfile.write(file, wave, SAMPLE_RATE, subtype="PCM_16", format="FLAC")


def _end(child: subprocess.Popen) -> None:
    """Ends a command and all that it started, if it runs."""
    if child.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

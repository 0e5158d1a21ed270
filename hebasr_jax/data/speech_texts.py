"""Texts to be spoken: which clips they become, what the voice is given, and which voice it is."""

import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import sys
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from hebasr_jax.data import espeak
from hebasr_jax.data.adapt import normalized
from hebasr_jax.data.clips import BadClip, Clip, Removed
from hebasr_jax.data.draws import generator
from hebasr_jax.data.rows import parse_line, parse_row, value_of
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns

_CARRIED = ("id", "text", "speaker", "recording", "source", "language", "context")
_PLACES = ("text", "text_file", "out", "voice", "seed")
_ESPEAK_VOICES = tuple(f"he+{variant}" for variant in espeak.VARIANTS)


@dataclass(frozen=True)
class Speech:
    """What is said, and how.

    texts: JSONL (.jsonl or .json) with `columns.text`, or another text file, a sentence a line.
    spoken: field that the voice is given in place of the text; "": the text, as it is trained on.
    command: run for each text, without a shell; "": eSpeak NG. It reads the text from its standard
    input, {text} or {text_file}, and writes the wav file {out}; {voice} and {seed} are drawn by
    speaker, or by id where a row names none. A row's `voice` counts before `voices`.
    limit_s: seconds that the command may take for a text.
    """

    texts: Path
    columns: Columns = field(default_factory=Columns)
    spoken: str = ""
    normalizer: str = ""
    command: str = ""
    voices: tuple[str, ...] = ()
    seed: int = 0
    licence: str = ""
    limit_s: float = 60.0


class Line(NamedTuple):
    """A text: the clip to be, what the voice is given, and what draws or names the voice."""

    clip: Clip
    said: str
    voice: str
    seed: int


def check(speech: Speech) -> None:
    """Raises a UserError for what no text could be spoken with."""
    command = command_words(speech)
    places = set(re.findall(r"\{(\w+)\}", speech.command))
    if unknown := sorted(places - set(_PLACES)):
        known = ", ".join(f"{{{name}}}" for name in _PLACES)
        raise UserError(f"--voice-command: {{{unknown[0]}}} is not known", f"there are {known}")
    if speech.command and "out" not in places:
        do = '--voice-command "piper --model he.onnx --output_file {out}"'
        raise UserError("--voice-command has no {out}", "the wav file's path goes there", do)
    if speech.command and speech.voices and "voice" not in places:
        raise UserError("--voices is given, but --voice-command has no {voice}")
    if not speech.command and importlib.util.find_spec("espeakng_loader") is None:
        do = 'pip install "hebasr-jax[demo]", or give a --voice-command'
        raise UserError("eSpeak NG is not installed", "the package espeakng-loader is missing", do)
    if shutil.which(command[0]) is None:
        raise UserError(
            f"--voice-command: there is no program {command[0]}",
            "",
            "Install it, or give its path.",
        )
    if not 0 < speech.limit_s < float("inf"):
        raise UserError("--voice-limit-s must be positive")
    if not speech.texts.is_file():
        raise UserError(f"{speech.texts}: no such file", "", "check the path of the texts")
    if speech.texts.suffix.lower() == ".json":
        _refuse_no_rows(speech.texts)


def _refuse_no_rows(texts: Path) -> None:
    """A .json file may have a row a line; any other would be said as it is written."""
    with texts.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        parse_line(first)
    except BadClip as fault:
        raise UserError(
            f"{texts}: is not JSONL",
            f"Its first line {fault.reason}.",
            "Write one JSON object a line, or a .txt file with a sentence a line.",
        ) from None


def _has_rows(texts: Path) -> bool:
    return texts.suffix.lower() in (".jsonl", ".json")


def read_texts(
    speech: Speech,
) -> tuple[list[Line], list[tuple[str, BadClip]], list[tuple[str, str]]]:
    """Texts that can be spoken, rows that are none, and rows left out on purpose.

    An id is the row's, or made of the file's name and the line's number, from 1.
    """
    lines: dict[str, Line] = {}
    bad: list[tuple[str, BadClip]] = []
    removed: list[tuple[str, str]] = []
    for number, line in enumerate(speech.texts.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            made = _read_line(speech, line, f"{speech.texts.stem}-{number:06d}")
            if made.clip.id in lines:
                raise BadClip("has the id of another row", made.clip.id)
            lines[made.clip.id] = made
        except BadClip as fault:
            bad.append((f"{speech.texts.name}:{number}", fault))
        except Removed as fault:
            removed.append((fault.clip_id, fault.reason))
    return [*lines.values()], bad, removed


def _read_line(speech: Speech, line: bytes, fallback: str) -> Line:
    """A line of the texts. Raises `BadClip` or `Removed`."""
    of_rows = _has_rows(speech.texts)
    row = parse_line(line) if of_rows else {"text": _decoded(line)}
    columns = speech.columns if of_rows else Columns()
    taken = {name: value_of(row, getattr(columns, name)) for name in _CARRIED}
    if taken["text"] is None:
        raise BadClip(f"has no {columns.text!r}", f"its fields are {', '.join(row)}")
    given = {name: value for name, value in taken.items() if value is not None}
    clip, _ = parse_row({"audio": fallback} | given, Columns(), Path())
    clip = replace(clip, text=clip.text.strip(), synthetic=True)
    heard = _letters(clip.text)
    clip = normalized(clip) if speech.normalizer else clip
    said = value_of(row, speech.spoken) if speech.spoken else clip.text
    if speech.spoken and said is None:
        raise Removed(clip.id, f"has no {speech.spoken!r} for the voice")
    if speech.spoken and _letters(clip.text) != heard:
        raise Removed(clip.id, f"has words that {speech.normalizer} leaves out, and the voice not")
    if not isinstance(said, str) or not said.strip() or not clip.text:
        raise BadClip("has no text to say", repr(said)[:100])
    if "\0" in said or said != said.encode(errors="ignore").decode():  # a lone surrogate
        raise BadClip("has what no voice can be given", repr(said)[:100])
    rng = generator("voice", speech.seed, clip.speaker or clip.id)
    voices = speech.voices or (() if speech.command else _ESPEAK_VOICES)
    drawn = voices[int(rng.integers(len(voices)))] if voices else ""
    voice = value_of(row, "voice") or drawn
    if not isinstance(voice, str):
        raise BadClip("'voice' is not a string", repr(voice)[:100])
    if not voice and "{voice}" in speech.command:
        raise BadClip("has no voice", "give --voices, or a voice in each row")
    clip = replace(clip, speaker=clip.speaker or Path(voice).name)
    return Line(clip, " ".join(said.split()), voice, int(rng.integers(2**31)))


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text)))


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadClip("is not UTF-8", str(error)) from error


def voice_name(speech: Speech) -> str:
    if speech.command:
        return speech.command
    return f"eSpeak NG of espeakng-loader {importlib.metadata.version('espeakng-loader')}"


def command_words(speech: Speech) -> list[str]:
    """The command's words, with the places in them still to be filled."""
    if not speech.command:
        return [sys.executable, "-P", espeak.__file__, "{voice}", "{seed}", "{out}"]
    try:
        return shlex.split(speech.command) or [""]
    except ValueError as error:
        raise UserError(f"--voice-command: {error}", f"it is {speech.command}") from error

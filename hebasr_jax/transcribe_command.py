"""The command `transcribe`: its flags, what it writes, what it tells. Light to import."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hebasr_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from hebasr_jax.longform import Cutting, Decode, LongRecognition
    from hebasr_jax.text import PromptStyle
    from hebasr_jax.transcribe import Recognition, Recognizer

_TOLD_S = 600.0  # of audio between two lines of progress


@dataclass(frozen=True)
class Transcribe:
    """Audio files of any length to text and subtitles.

    Prints the text of each file, or writes it under --out-dir. A file that cannot be read does
    not stop the others: it is named at the end, and the exit code is 1.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """model folder in either layout, hub id such as Qwen/Qwen3-ASR-1.7B, or training run"""
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE...")]
    """files, folders or globs: wav flac mp3 ogg opus, and m4a mp4 webm with the extra 'av'"""
    format: tuple[Literal["txt", "json", "srt", "vtt", "tsv"], ...] = ("txt",)
    """what to write for each file"""
    out_dir: Path | None = None
    """folder to write to; folders among the inputs are kept below it"""
    timestamps: bool = False
    """ask for time stamps (of a model trained with them); else times are those of the cuts"""
    context: str = ""
    """text that came before, or words to expect; of a long one the last 224 tokens"""
    carry_text: bool = False
    """give each piece the text before it, after --context; errors may be carried along"""
    language: str = "Hebrew"
    """English name of the language; auto lets the model say it"""
    piece_s: float = 30.0
    """longer audio is cut at pauses into pieces of at most this many seconds"""
    search_s: float | None = None
    """a cut lies in the last so many seconds of a piece; by default a third of it"""
    vad: Literal["energy", "silero"] = "energy"
    """what finds the pauses: the level, or also Silero VAD (extra 'vad')"""
    max_line_width: int | None = None
    """srt and vtt: characters in a line"""
    max_line_count: int | None = None
    """srt and vtt: lines in a subtitle, which then runs over segments; needs --max-line-width"""
    max_new_tokens: int | None = None
    """token budget of each piece; by default 8 a second plus 16"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """by default bfloat16 on a GPU, else float32"""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """attention kernel; one that cannot be had is an error"""
    beams: int = 1
    """hypotheses of a beam search; 1 takes the best token each time"""
    batch_audio_s: float | None = None
    """seconds of audio decoded together on each device; by default 240, and 4096 on a GPU"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""

    def run(self) -> int:
        from hebasr_jax.audio import expand_inputs, stream_audio
        from hebasr_jax.longform import Failure, Sound, recognize_long
        from hebasr_jax.program_cache import keep_programs
        from hebasr_jax.text import PromptStyle, build_prompt
        from hebasr_jax.transcribe import load_recognizer
        from hebasr_jax.writers import check_folder, output_stems

        cutting = self._checked()
        if self.out_dir:
            check_folder(self.out_dir)
        paths = expand_inputs(self.inputs)
        named = None if self.language == "auto" else self.language
        style = PromptStyle(named, language_in_prompt=named is not None, stamps=self.timestamps)
        stems = output_stems(paths, self.out_dir) if self.out_dir else {}
        keep_programs()
        recognizer = load_recognizer(
            self.model, revision=self.revision, dtype=self.dtype, kernel=self.attention
        )
        build_prompt(recognizer.tokenizer, style)  # a model without stamps is refused here
        _say(f"{self.model}: {recognizer.description}")
        failed: list[str] = []
        sounds = (Sound(str(path), partial(stream_audio, path)) for path in paths)
        with _progress(len(paths)) as (heard, ended):
            decode = self._decode(recognizer, style, heard)
            for path, result in zip(paths, recognize_long(decode, sounds, cutting), strict=True):
                if isinstance(result, Failure):
                    failed.append(str(result.error))
                else:
                    self._put(result, stems.get(path), several=len(paths) > 1)
                    ended(path.name)
        for line in failed:
            _say(f"not transcribed: {line}")
        return 1 if failed else 0

    def _checked(self) -> "Cutting":
        """Refuses flags that cannot be followed, before a model is loaded."""
        from hebasr_jax.longform import Cutting
        from hebasr_jax.timestamps import MAX_STAMP_S

        _require(bool(self.inputs), "no audio files given", "name files, folders or globs")
        _require(bool(self.format), "--format names nothing to write", "name txt, json, srt, ...")
        for flag in ("max_new_tokens", "max_line_width", "max_line_count", "beams"):
            value = getattr(self, flag)
            name = flag.replace("_", "-")
            _require(value is None or value > 0, f"--{name} must be at least 1")
        _require(
            self.batch_audio_s is None or self.batch_audio_s > 0, "--batch-audio-s must be positive"
        )
        _require(
            self.max_line_count is None or self.max_line_width is not None,
            "--max-line-count breaks nothing by itself",
            "add --max-line-width, such as 42",
        )
        _require(
            not self.timestamps or self.piece_s <= MAX_STAMP_S,
            f"time stamps reach to {MAX_STAMP_S:.0f} s within a piece",
            "lower --piece-s",
        )
        search_s = self.piece_s / 3 if self.search_s is None else self.search_s
        return Cutting(self.piece_s, search_s, self.vad, self.carry_text)

    def _decode(
        self, recognizer: "Recognizer", style: "PromptStyle", heard: Callable[[float], None]
    ) -> "Decode":
        from hebasr_jax.audio import SAMPLE_RATE
        from hebasr_jax.transcribe import transcribe

        def decode(waves: "Sequence[np.ndarray]", before: Sequence[str]) -> "list[Recognition]":
            results = transcribe(
                recognizer,
                waves,
                style=style,
                context=[f"{self.context} {text}" for text in before],
                max_new_tokens=self.max_new_tokens,
                batch_audio_s=self.batch_audio_s,
                beams=self.beams,
            )
            heard(sum(map(len, waves)) / SAMPLE_RATE)
            return results

        return decode

    def _put(self, result: "LongRecognition", stem: Path | None, several: bool) -> None:
        """Writes or prints one result; text that may be missing is never passed over in silence."""
        from hebasr_jax.subtitles import Lines
        from hebasr_jax.writers import render, write_whole

        for start_s, end_s in result.unfinished_s:
            _say(
                f"warning: {result.name}: the budget of tokens ran out between "
                f"{start_s:.1f} and {end_s:.1f} s: text may be missing; raise --max-new-tokens"
            )
        if result.loops:
            _say(f"warning: {result.name}: text went round in circles {result.loops} times")
        for kind in self.format:
            text = render(kind, result, Lines(self.max_line_width, self.max_line_count))
            if stem:
                write_whole(Path(f"{stem}.{kind}"), text)
            else:
                if several and kind == "txt":  # one line for each file
                    text = f"{result.name}\t{' '.join(text.split())}\n"
                print(text, end="", flush=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[float], None], Callable[[str], None]]]:
    """What to call with seconds of audio that were decoded, and with a file that is done.

    A bar on a terminal; elsewhere a line for each of several files, and every ten minutes of audio.
    """
    done_s = told_s = 0.0
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        # Left alone, rich takes stdout along to stderr, also where stdout is a file.
        same = sys.stdout.isatty()
        with Progress(console=Console(stderr=True), redirect_stdout=same) as bar:
            task = bar.add_task("transcribing", total=total)

            def show(seconds: float) -> None:
                nonlocal done_s
                done_s += seconds
                bar.update(task, description=f"{done_s:,.0f} s of audio")

            yield show, lambda name: bar.update(task, advance=1)
        return
    names: list[str] = []

    def heard(seconds: float) -> None:
        nonlocal done_s, told_s
        done_s += seconds
        if done_s - told_s >= _TOLD_S:
            told_s = done_s
            _say(f"{done_s:,.0f} s of audio done")

    def ended(name: str) -> None:
        names.append(name)
        if total > 1:
            _say(f"{len(names)}/{total} {name}")

    yield heard, ended


def _require(condition: bool, what: str, do: str = "") -> None:
    if not condition:
        raise UserError(what, do=do)


def _say(line: str) -> None:
    """Everything that is not a result goes to stderr."""
    print(line, file=sys.stderr, flush=True)

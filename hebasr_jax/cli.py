"""Commands and their flags. Heavy imports wait until a command runs: --help answers at once."""

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro

from hebasr_jax import __version__
from hebasr_jax.average_command import Average
from hebasr_jax.config import Layout
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.errors import UserError
from hebasr_jax.evaluate_command import Evaluate

if TYPE_CHECKING:
    import numpy as np

    from hebasr_jax.config_file import LoadedConfig
    from hebasr_jax.transcribe import Recognition

_WINDOW_S = 3600.0  # audio read ahead, so that clips of like length share a batch
_INTERRUPTED, _READER_GONE = 130, 141  # as shells count signals: 128 + SIGINT, + SIGPIPE
_ABOUT = "Hebrew speech recognition with Qwen3-ASR in JAX"


@dataclasses.dataclass(frozen=True)
class Transcribe:
    """Audio files to text.

    Prints the text of each file, or writes it under --out-dir. A file that cannot be read does
    not stop the others: it is named at the end, and the exit code is 1.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """model folder in either layout, hub id such as Qwen/Qwen3-ASR-1.7B, or training run"""
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE...")]
    """files, folders or globs: wav flac mp3 ogg opus, and m4a mp4 webm with the extra 'av'"""
    format: tuple[Literal["txt", "json"], ...] = ("txt",)
    """what to write for each file"""
    out_dir: Path | None = None
    """folder to write to; folders among the inputs are kept below it"""
    timestamps: bool = False
    """ask for time stamps (of a model trained with them)"""
    context: str = ""
    """text that came before, or words to expect; of a long one the last 224 tokens"""
    language: str = "Hebrew"
    """English name of the language; auto lets the model say it"""
    max_new_tokens: int | None = None
    """token budget of each file; by default 8 a second plus 16"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """by default bfloat16 on a GPU, else float32"""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """attention kernel; one that cannot be had is an error"""
    batch_audio_s: float = 240.0
    """seconds of padded audio decoded together; raise it on a large GPU"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""

    def run(self) -> int:
        from hebasr_jax.audio import expand_inputs
        from hebasr_jax.text import PromptStyle, build_prompt
        from hebasr_jax.transcribe import load_recognizer, transcribe
        from hebasr_jax.writers import check_folder, output_stems

        _require(bool(self.inputs), "no audio files given", "name files, folders or globs")
        _require(bool(self.format), "--format names nothing to write", "name txt, json or both")
        _require(
            self.max_new_tokens is None or self.max_new_tokens > 0,
            "--max-new-tokens must be at least 1",
        )
        _require(self.batch_audio_s > 0, "--batch-audio-s must be positive")
        if self.out_dir:
            check_folder(self.out_dir)
        paths = expand_inputs(self.inputs)
        named = None if self.language == "auto" else self.language
        style = PromptStyle(named, language_in_prompt=named is not None, stamps=self.timestamps)
        stems = output_stems(paths, self.out_dir) if self.out_dir else {}
        recognizer = load_recognizer(
            self.model, revision=self.revision, dtype=self.dtype, kernel=self.attention
        )
        build_prompt(recognizer.tokenizer, style)  # a model without stamps is refused here
        _say(f"{self.model}: {recognizer.description}")
        failed: list[str] = []
        with _progress(len(paths)) as advance:
            for window in _windows(paths, failed):
                results = transcribe(
                    recognizer,
                    [wave for _, wave in window],
                    style=style,
                    context=self.context,
                    max_new_tokens=self.max_new_tokens,
                    batch_audio_s=self.batch_audio_s,
                )
                for (path, _), result in zip(window, results, strict=True):
                    self._put(path, result, stems, several=len(paths) > 1)
                    advance(path.name)
        for line in failed:
            _say(f"not transcribed: {line}")
        return 1 if failed else 0

    def _put(
        self, path: Path, result: "Recognition", stems: dict[Path, Path], several: bool
    ) -> None:
        """Writes or prints one result; text that may be cut is never passed over in silence."""
        from hebasr_jax.writers import render, write_whole

        if not result.finished:
            _say(
                f"warning: {path}: the budget of tokens ran out after {len(result.tokens)}: "
                "text may be missing; raise --max-new-tokens"
            )
        for kind in self.format:
            text = render(kind, path, result)
            if self.out_dir:
                write_whole(Path(f"{stems[path]}.{kind}"), text)
            else:
                if several and kind == "txt":  # one line for each file
                    text = f"{path}\t{' '.join(text.split())}\n"
                print(text, end="", flush=True)


@dataclasses.dataclass(frozen=True)
class Convert:
    """A model to a complete folder in either Hugging Face layout.

    original is for qwen-asr and vLLM, transformers for transformers 5.13 and later. Weights are
    not touched unless --dtype says so; nothing is written unless all of it is.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """model folder in either layout, hub id, training run (its best checkpoint) or checkpoint"""
    destination: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DESTINATION")]
    """new folder"""
    layout: Layout
    """layout to write"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """store the weights so; by default as they are"""
    shard_gb: float | None = None
    """split the weights into files of at most this many GB; by default one file"""
    add_timestamps: bool = False
    """add the 135 time-stamp tokens to the tokenizer (for fine-tuning with them)"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""

    def run(self) -> int:
        import jax.numpy as jnp
        import numpy as np

        from hebasr_jax.export import refuse_taken, write_model
        from hebasr_jax.transcribe import load_weights, open_model

        _require(
            self.shard_gb is None or 1e-9 <= self.shard_gb < 1e9,
            "--shard-gb must be positive and finite",
        )
        refuse_taken(self.destination)  # before gigabytes are read
        folder, config, layout, _ = open_model(self.source, revision=self.revision)
        _say(f"reading {folder.source} ({layout} layout)")
        params = load_weights(self.source, folder, config, layout, place=np.asarray)
        write_model(
            params,
            config,
            folder.path,
            self.destination,
            self.layout,
            dtype=self.dtype and jnp.dtype(self.dtype),
            shard_bytes=int(self.shard_gb * 1e9) if self.shard_gb else None,
            stamps=self.add_timestamps,
        )
        at = f" at {folder.revision}" if folder.revision else ""
        _say(f"wrote {self.destination} ({self.layout} layout) from {folder.source}{at}")
        return 0


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains a model as a config file says, or goes on with a run that was stopped.

    Stopped by SIGTERM, SIGINT or SIGUSR1 it saves within one step and exits with code 75; the
    same command goes on from there.
    """

    config: Path
    """Python file with get_config(), such as configs/finetune.py"""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="A.B=C")] = ()
    """change one value, such as train.steps=10; may be given again"""
    dry_run: bool = False
    """print the settings, learning rates, plan and memory, and train nothing"""
    ablate: bool = False
    """train it without each item of the recipe in turn, and compare: one table"""
    accept_changes: bool = False
    """go on with a run although its settings, data or tokenizer changed"""
    coordinator: str | None = None
    """host:port of the first host of several; under Slurm leave it and the next two out"""
    processes: int | None = None
    """how many hosts there are"""
    process: int | None = None
    """which of them this is, from 0"""

    def run(self) -> int:
        from hebasr_jax.config_file import load_config

        loaded = load_config(self.config, self.set)
        if self.dry_run:
            from hebasr_jax.dry_run import dry_run

            dry_run(loaded)
            return 0
        from hebasr_jax.run_folder import StopSignal

        with StopSignal():  # the imports take seconds; then `train` has one of its own
            return self._train(loaded)

    def _train(self, loaded: "LoadedConfig") -> int:
        from hebasr_jax.distributed import is_first, start
        from hebasr_jax.train import train

        start(self.coordinator, self.processes, self.process)
        say = _say if is_first() else _keep_quiet
        if self.ablate:
            from hebasr_jax.ablate import ablate

            return ablate(loaded, say, accept_changes=self.accept_changes)
        return train(loaded, say, accept_changes=self.accept_changes)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Everything on a CPU in minutes: made-up speech, training with a stop, WER, export."""

    config: Path = Path("configs/demo.py")
    """its config file, in the repository"""
    clips: int = 6000
    """clips to train on"""

    def run(self) -> int:
        from hebasr_jax.demo import run

        run(self.config, self.clips, _say)
        return 0


_COMMANDS: dict[str, Callable[..., Any]] = {
    "transcribe": Transcribe,
    "evaluate": Evaluate,
    "convert": Convert,
    "prepare": Prepare,
    "train": Train,
    "average": Average,
    "demo": Demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 1 comes with one to three lines on stderr.

    `--debug`, anywhere among the arguments, shows the trace of an error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _speak_utf8()
    # Else transformers remarks at each start that torch is absent, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    if words == ["--version"]:
        print(__version__)
        return 0
    try:
        command: Any = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS, prog="hebasr", description=f"{_ABOUT} (version {__version__})", args=words
        )
        return command.run()
    except KeyboardInterrupt:
        _end_interrupted()
    except BrokenPipeError:  # `| head`: what is left in the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, UserError):
            _say(f"error: {error}")
        else:
            _say(
                f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            _say(
                "this is a fault of hebasr or of the machine: run again with --debug and report it"
            )
        return 1


def _require(condition: bool, what: str, do: str = "") -> None:
    if not condition:
        raise UserError(what, do=do)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. Modules in C++ abort on an exception while they are imported: there it is the end."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame:
        _end_interrupted()
    raise KeyboardInterrupt


def _end_interrupted() -> NoReturn:
    """Ends the process at once: Python's own way out crashes while XLA still compiles."""
    _say("interrupted")
    os._exit(_INTERRUPTED)


def _speak_utf8() -> None:
    """UTF-8 whatever the locale; file names that are not UTF-8 go out as they came in."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def _say(line: str) -> None:
    """Everything that is not a result goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def _keep_quiet(line: str) -> None:
    """What the other hosts of a run say."""


def _windows(paths: Sequence[Path], failed: list[str]) -> "Iterator[list[tuple[Path, np.ndarray]]]":
    """Reads files about an hour of audio at a time; those that cannot be read go to `failed`."""
    from hebasr_jax.audio import SAMPLE_RATE, read_audio
    from hebasr_jax.transcribe import MAX_CLIP_S

    window: list[tuple[Path, np.ndarray]] = []
    seconds = 0.0
    for path in paths:
        try:
            wave = read_audio(path, max_seconds=MAX_CLIP_S)
        except UserError as error:
            failed.append(str(error))
            continue
        window.append((path, wave))
        seconds += len(wave) / SAMPLE_RATE
        if seconds >= _WINDOW_S:
            yield window
            window, seconds = [], 0.0
    if window:
        yield window


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, a line for each finished file elsewhere; nothing for one file."""
    if total < 2:
        yield lambda name: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        # Left alone, rich takes stdout along to stderr, also where stdout is a file.
        same = sys.stdout.isatty()
        with Progress(console=Console(stderr=True), redirect_stdout=same) as bar:
            task = bar.add_task("transcribing", total=total)
            yield lambda name: bar.update(task, advance=1, description=name)
    else:
        names: list[str] = []

        def advance(name: str) -> None:
            names.append(name)
            _say(f"{len(names)}/{total} {name}")

        yield advance

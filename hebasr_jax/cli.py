"""Commands and their flags. Heavy imports wait until a command runs: --help answers at once."""

import contextlib
import dataclasses
import errno
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro

from hebasr_jax import __version__
from hebasr_jax.audit_command import Audit
from hebasr_jax.average_command import Average
from hebasr_jax.bench_command import Bench
from hebasr_jax.config import Layout
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.errors import UserError
from hebasr_jax.evaluate_command import Evaluate
from hebasr_jax.panel_command import Panel
from hebasr_jax.split_command import Split
from hebasr_jax.transcribe_command import Transcribe

if TYPE_CHECKING:
    from hebasr_jax.config_file import LoadedConfig

_INTERRUPTED, _READER_GONE = 130, 141  # as shells count signals: 128 + SIGINT, + SIGPIPE
_LAST_WORDS_S = 1.0
_ABOUT = "Hebrew speech recognition with Qwen3-ASR in JAX"


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

        from hebasr_jax.data.workers import ended_as_by_ctrl_c
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
        with ended_as_by_ctrl_c():
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
    "split": Split,
    "panel": Panel,
    "prepare": Prepare,
    "audit": Audit,
    "train": Train,
    "average": Average,
    "bench": Bench,
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
    try:
        if words == ["--version"]:
            print(__version__, flush=True)
            return 0
        command: Any = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS, prog="hebasr", description=f"{_ABOUT} (version {__version__})", args=words
        )
        code = command.run()
        print(end="", flush=True)  # a disk that fills up only now must be told too
        return code
    except KeyboardInterrupt:
        _end_interrupted()
    except BrokenPipeError:  # `| head`
        _drop_output()
        return _READER_GONE
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, UserError):
            _say(f"error: {error}")
        elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _drop_output()
            _say(f"error: nothing more can be written: {error.strerror}")
            _say("what was written last may not be whole: free space, and run again")
        else:
            _say(
                f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            _say(
                "this is a fault of hebasr or of the machine: run again with --debug and report it"
            )
        _end_one_of_several()
        return 1


def _drop_output() -> None:
    """What is left in the buffer of standard output must not fail again at exit."""
    with contextlib.suppress(OSError):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def _end_one_of_several() -> None:
    """Ends a process that others wait for at once: JAX's way out waits five minutes for them.

    The first one's end is that of all, so it leaves the others a moment to tell a common error.
    """
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0 if jax.process_index() else _LAST_WORDS_S)
        os._exit(1)


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

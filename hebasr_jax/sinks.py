"""Copies of metrics.jsonl in wandb, trackio and TensorBoard, which can neither stop nor slow a run.

Each sink runs in a child process, since these packages start processes, change stdout and wait at
exit, for hours without a network. The training thread only puts a line in a queue; a thread of the
sink hands it to the child and awaits its answer. A child has no terminal and so can ask nothing.

Numbers alone are sent, under the run's step and names such as train/loss, train/rates/decoder and
validation/<set>/ci95_low; texts, clip ids, lists, null and NaN are not. wandb and trackio also get
the config, in the project `hebasr`. Keys and servers are theirs to find (WANDB_API_KEY,
WANDB_MODE, TRACKIO_SPACE_ID ...); WANDB_ variables win over what is set here.

A run that is resumed goes on as the same run: its random id is kept in wandb.id and trackio.id in
the run folder, and made anew when the run begins at step 0. Steps that are trained twice are
hidden by TensorBoard, ignored by wandb, and shown twice by trackio. wandb keeps its files in
<folder>/wandb, TensorBoard in <folder>/tensorboard.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from hebasr_jax.errors import UserError

SinkName = Literal["wandb", "trackio", "tensorboard"]
Line = Mapping[str, Any]
Log = Callable[[dict[str, float], int], Any]
"""Takes numbers by name, and their step."""

GRACE_S = 10.0
"""How long the end of a run waits for all sinks together."""
QUEUE_LINES = 1000
"""Lines that wait for a slow sink; further ones are dropped."""

_PACKAGES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboardX"}
_PROJECT = "hebasr"
_WANDB = {
    "WANDB_PROJECT": _PROJECT,
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    # Nothing of the machine or the code: wandb would send host, paths, git remote and packages.
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB__DISABLE_META": "true",
    "WANDB__DISABLE_STATS": "true",
    "WANDB__DISABLE_MACHINE_INFO": "true",
    "WANDB__SAVE_REQUIREMENTS": "false",
}


def check_sinks(names: Sequence[SinkName]) -> None:
    """Raises `UserError` for a sink whose package is not installed; imports none."""
    for name in names:
        spec = importlib.util.find_spec(_PACKAGES[name])
        if spec is None or spec.origin is None:  # a mere folder `wandb` has no origin
            raise UserError(
                f"the sink {name} cannot be used",
                f"the package {_PACKAGES[name]} is not installed",
                f"pip install 'hebasr-jax[{name}]', or take it out of the sinks",
            )


@contextlib.contextmanager
def open_sinks(
    names: Sequence[SinkName],
    folder: Path,
    run_name: str,
    config: Mapping[str, Any],
    resume_step: int | None,
    say: Callable[[str], None],
    *,
    grace_s: float = GRACE_S,
) -> Iterator[Callable[[Line], None]]:
    """Gives `send(line)` for the lines of metrics.jsonl, which returns at once and never raises.

    A sink that raises, ends or cannot keep up is one warning. At the end of the block it is
    waited for `grace_s` seconds at most, for all together; one that is not done by then is
    ended, with a warning. Lines must not be changed after they are sent.

    Args:
      folder: of the run; it exists.
      config: values by name, as JSON.
      resume_step: the step that the run goes on from, None where it begins.
      say: shows a line to the user; called from other threads, too.

    Raises:
      UserError: the package of a sink is not installed.
    """
    check_sinks(names)
    start = {
        "folder": str(folder.absolute()),
        "run_name": run_name,
        "config": dict(config),
        "resume_step": resume_step,
    }
    sinks = [_Sink(name, start, say) for name in dict.fromkeys(names)]

    def send(line: Line) -> None:
        for sink in sinks:
            sink.send(line)

    try:
        yield send
    finally:
        deadline = time.monotonic() + grace_s
        for sink in sinks:
            sink.end()
        for sink in sinks:
            sink.wait(deadline)


def numbers_of(line: Line) -> dict[str, float]:
    """What is sent of a line: its finite numbers, by names such as validation/<set>/wer."""
    names = {k: v for k, v in line.items() if k not in ("kind", "step", "time_s", "sets")}
    return dict(_flat(names | dict(line.get("sets", {})), str(line["kind"])))


def scrub(text: str) -> str:
    """The text's first line without what looks like a token, a key or a password."""
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    for pattern in _SECRETS:
        line = pattern.sub(r"\1***", line)
    return line[:300]


_SECRETS = (
    re.compile(r"(://)[^/@\s]+(?=@)"),
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)\S+"),
    re.compile(r"(?i)((?:key|token|secret|passw\w*|authorization)[\"']?\s*[:=]\s*)[^\s,;&]+"),
    re.compile(r"(?i)((?:key|token|secret|passw\w*)\s+)[\"'][^\"']+[\"']"),
    re.compile(r"()\b(?:hf|wandb|sk|ghp|gho|glpat)[_-]\w[\w-]{7,}"),
    re.compile(r"()(?=[\w+=-]*\d)[\w+=-]{20,}|()[\w+=-]{32,}"),
)


def _flat(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every finite number below, by the path to it; the pair of an interval as _low and _high."""
    if hasattr(value, "tolist"):  # numpy's and jax's scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flat(below, f"{name}/{key}")
    elif name.endswith("ci95") and isinstance(value, (list, tuple)) and len(value) == 2:
        yield from _flat(value[0], f"{name}_low")
        yield from _flat(value[1], f"{name}_high")
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield name, float(value)


class _Sink:
    """A queue, the thread that empties it, and the child process that the thread talks to."""

    def __init__(self, name: SinkName, start: Mapping[str, Any], say: Callable[[str], None]):
        self._name, self._say = name, say
        self._lines: SimpleQueue[Line | None] = SimpleQueue()
        self._first_warning = threading.Lock()
        self._given_up = False
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._follow, args=(start,), daemon=True)
        self._thread.start()

    def send(self, line: Line) -> None:
        if self._given_up:
            return
        if self._lines.qsize() < QUEUE_LINES:
            self._lines.put(line)
        else:
            self._warn("it is too slow, and misses lines")

    def end(self) -> None:
        self._lines.put(None)

    def wait(self, deadline: float) -> None:
        """Returns when all is sent or the monotonic clock reads `deadline`; ends the child."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn("it was not done at the end of the run, and was ended")
            self._given_up = True
            if self._child is not None:
                self._child.kill()
                self._thread.join(0.5)

    def _follow(self, start: Mapping[str, Any]) -> None:
        child = None
        try:
            child = self._child = _start_child()
            told = _ask(child, {"sink": self._name, **start})
            self._say(f"{self._name}: {told}")
            for line in iter(self._lines.get, None):
                if numbers := numbers_of(line):
                    _ask(child, {"step": int(line["step"]), "numbers": numbers})
            _ask(child, None)
        except (EOFError, BrokenPipeError):
            code = child.wait() if child else None
            self._warn(f"its process ended with code {code}; the run goes on without it")
        except Exception as error:
            reason = str(error) if isinstance(error, _SinkError) else _reason(error)
            self._warn(f"{scrub(reason)}; the run goes on without it")
        finally:
            self._given_up = True
            if child is not None:
                child.kill()
                child.wait()

    def _warn(self, text: str) -> None:
        if self._first_warning.acquire(blocking=False):  # never given back: one warning a sink
            self._say(f"warning: {self._name}: {text} (metrics.jsonl has every line)")


class _SinkError(Exception):
    """What failed in the child, in its words."""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"


def _start_child() -> subprocess.Popen[bytes]:
    """A Python that imports what this one does, in a session of its own: no terminal, no Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def _ask(child: subprocess.Popen[bytes], message: Any) -> str:
    """What the child says to a message. Raises _SinkError, or EOFError where it is gone."""
    assert child.stdin is not None
    assert child.stdout is not None
    raw = json.dumps(message, default=str).encode() + b"\n"
    while raw:
        raw = raw[child.stdin.write(raw) :]
    answer = child.stdout.readline()
    if not answer.endswith(b"\n"):
        raise EOFError
    said: dict[str, str] = json.loads(answer)
    if "failed" in said:
        raise _SinkError(said["failed"])
    return said["done"]


def serve() -> None:
    """The child process: the sink's start, then its lines, each answered; null ends it.

    It leaves without the hooks that wait at exit, and, some seconds after its parent is gone,
    from whatever it hangs in.
    """
    os.nice(10)
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # schedulers signal every process of a job
    threading.Thread(target=_leave_after, args=(os.getppid(),), daemon=True).start()

    def answer(**said: str) -> None:
        print(json.dumps(said), file=answers, flush=True)

    try:
        with _open(json.loads(asked.readline())) as (where, log):
            answer(done=where)
            for raw in itertools.takewhile(lambda raw: raw != b"null\n", asked):
                line = json.loads(raw)
                log(line["numbers"], line["step"])
                answer(done="")
        answer(done="")
    except BaseException as error:
        with contextlib.suppress(OSError):
            answer(failed=_reason(error))
    os._exit(0)


def _leave_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(GRACE_S)
    os._exit(1)


def _open(start: Mapping[str, Any]) -> contextlib.AbstractContextManager[tuple[str, Log]]:
    """A sink that is open, as where it can be seen and how it is written to."""
    folder, resume_step = Path(start["folder"]), start["resume_step"]
    if start["sink"] == "tensorboard":
        return _tensorboard(folder / "tensorboard", resume_step)
    run_id = _run_id(folder / f"{start['sink']}.id", new=resume_step is None)
    sink = _wandb if start["sink"] == "wandb" else _trackio
    return sink(folder, start["run_name"], run_id, start["config"])


def _run_id(path: Path, *, new: bool) -> str:
    """The id of this run at the sink, kept in the run folder."""
    if new or not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


@contextlib.contextmanager
def _wandb(
    folder: Path, name: str, run_id: str, config: dict[str, Any]
) -> Iterator[tuple[str, Log]]:
    for variable, value in _WANDB.items():
        os.environ.setdefault(variable, value)
    import wandb

    run = wandb.init(dir=folder, id=run_id, name=name, config=config, resume="allow")
    yield run.url or f"kept in {folder / 'wandb'}", lambda numbers, step: run.log(numbers, step)
    run.finish()


@contextlib.contextmanager
def _trackio(
    folder: Path, name: str, run_id: str, config: dict[str, Any]
) -> Iterator[tuple[str, Log]]:
    import trackio

    run = trackio.init(  # a name is all that trackio knows a run by
        _PROJECT,
        f"{name}-{run_id}",
        config=config,
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    yield f"{name}-{run_id} in project {_PROJECT}", lambda numbers, step: run.log(numbers, step)
    run.finish()


@contextlib.contextmanager
def _tensorboard(folder: Path, resume_step: int | None) -> Iterator[tuple[str, Log]]:
    sys.modules["torch"] = None  # type: ignore[assignment]  # else it loads torch, in seconds
    from tensorboardX import SummaryWriter

    first = 0 if resume_step is None else resume_step + 1
    writer = SummaryWriter(
        str(folder), purge_step=first, flush_secs=10, filename_suffix=f".{os.getpid()}"
    )

    def log(numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    yield f"tensorboard --logdir {folder}", log
    writer.close()

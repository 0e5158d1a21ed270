"""What a run tells of itself: metrics.jsonl, which is the truth, and what the terminal shows.

Each line of metrics.jsonl is one JSON object with `kind` and `step` first; `time_s` (Unix time)
is added here. Shares are 0 to 1. A number that is not known is null or left out; one that is NaN
or infinite is null, and `nonfinite` says which it was: {"sets/eval-d1/wer": "nan"}.

kind "train", every `log_steps` steps, about the steps since the line before:
  step, steps (of the whole run), epoch (passes over the data so far, 1.5 is half-way through the
  second), loss (per target token, mean of the finite ones), losses (of each step), grad_norm
  (before clipping, of the last), rates {group: learning rate},
  audio_s_per_s (of rows without padding; gaps between joined clips count), tflops (useful, per
  second and device),
  padding_audio, padding_text (shares of encoder frames and decoder positions), data_wait_share
  (of the time, of the process that waited most), skipped (steps without a finite gradient since
  the run began), memory_bytes (peak of one device, of the process with most).
kind "validation", with the weights after `step` steps (0: before training):
  step, sets {name: {loss, wer, ci95 [low, high], cer, cer_ci95, hits, substitutions, deletions,
  insertions, words, clips, empty, left_out, samples [{id, group, reference, hypothesis}]}}: what
  `metrics.score` gives, the loss per target token, the clips that were not scored, and texts as
  they are, before normalisation; scored_on (names the dev data: validations compare only where it
  is equal).
kind "skipped", for a step without a finite gradient, which changed nothing:
  step, loss, grad_norm, epoch, batch, clips [ids]. The report marks it on the loss curve.
Other kinds, and further keys, may be written; they are kept and not shown.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hebasr_jax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

Line = Mapping[str, Any]


class MetricsLog:
    """Appends to metrics.jsonl; every line is with the operating system before `append` returns.

    `resume_step`: the step whose checkpoint the run goes on from. Lines of later steps are
    dropped, so that the file holds each step once, as if the run had never stopped; None drops
    all (nothing to go on from). What does not fit on a full disk is kept and tried again, but
    `UserError` is raised where the file cannot even be taken up.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        self._unwritten = b""
        self._failing = False
        _keep_until(path, -1 if resume_step is None else resume_step)

    def append(self, line: Line) -> None:
        """Writes a line; scalars of numpy and jax are welcome. A full disk is one warning."""
        head = {"kind": line["kind"], "step": int(line["step"]), "time_s": round(time.time(), 3)}
        self._unwritten += _encode(head | dict(line))
        try:
            with self.path.open("ab", buffering=0) as file:
                while self._unwritten:  # a full disk may take half a line; the rest comes later
                    self._unwritten = self._unwritten[file.write(self._unwritten) :]
        except OSError as error:
            if not self._failing:
                _say(
                    f"warning: {self.path} cannot be written ({error.strerror}); training goes "
                    "on, and its lines are kept until they can be"
                )
        self._failing = bool(self._unwritten)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, none when there is no such file.

    A last line cut short is passed over: the run was killed while it wrote. Any other line that
    cannot be read is named in a warning.
    """
    return [line for _, line in _lines(path)]


def put_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Keeps the record of a run that left no checkpoint, and says that it begins anew."""
    if not any(line["kind"] == "train" for line in read_metrics(folder / "metrics.jsonl")):
        return
    say(f"{folder} was trained but has no checkpoint: it begins again at step 0")
    for name in ("best.json", "metrics.jsonl"):  # the latter says that this is to be done
        file = folder / name
        if file.exists():
            numbered = (folder / f"{name}.{n}" for n in range(1, 1000))
            kept = file.rename(next(path for path in numbered if not path.exists()))
            say(f"the old record is {kept}")


def latest_validations(lines: Sequence[Line]) -> list[Line]:
    """Of validations those that compare with the newest: after other dev data those of before do
    not."""
    told = [line for line in lines if line.get("kind") == "validation"]
    return [line for line in told if line.get("scored_on") == told[-1].get("scored_on")]


def describe(line: Line) -> str:
    """A line of kind train or validation as one line of text."""
    return "  ".join(_describe_sets(line) if "sets" in line else _describe_train(line))


@contextlib.contextmanager
def training_display(total_steps: int) -> Iterator[Callable[[Line], None]]:
    """Gives `show(line)`: on a terminal it redraws a panel, elsewhere it prints a line to stderr.

    Takes the lines of metrics.jsonl, and {"step": n} alone, which moves the bar only. The time
    left follows from the steps since the first that was shown. stdout is left alone; what others
    print to stderr appears above the panel.
    """
    clock = _Clock(total_steps)
    if not sys.stderr.isatty():
        yield lambda line: _print_line(line, clock)
        return
    from rich.console import Console
    from rich.live import Live

    # Left alone, rich takes stdout along to stderr, also where stdout is a file.
    latest: dict[str, str] = {}
    with Live(console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as live:

        def show(line: Line) -> None:
            if "kind" in line:
                latest[line["kind"]] = describe(line)
            live.update(_panel(clock.at(line["step"]), clock, latest))

        live.update(_panel("", clock, latest))
        yield show


class _Clock:
    """Where the run stands and how long it will take."""

    def __init__(self, total_steps: int) -> None:
        self.total, self.step = total_steps, 0
        self._first: tuple[int, float] | None = None

    def at(self, step: int) -> str:
        """`step 120/1,000  12 %  left 0:03:20`; the time left is known from the second step on."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        self.step = max(self.step, step)
        text = f"step {step:,}/{self.total:,}  {100 * step // max(self.total, 1)}%"
        done, taken_s = step - self._first[0], now - self._first[1]
        if done <= 0:
            return text
        left_s = taken_s / done * max(self.total - step, 0)
        return f"{text}  left {timedelta(seconds=round(left_s))}"


def _print_line(line: Line, clock: _Clock) -> None:
    where = clock.at(line["step"])
    if "kind" in line:
        _say(f"{where}  {describe(line)}")


def _panel(where: str, clock: _Clock, latest: Mapping[str, str]) -> "Table":
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    panel = Table.grid(expand=True)
    panel.add_row(Text(where or "starting"))
    panel.add_row(ProgressBar(max(clock.total, 1), clock.step, complete_style="cyan"))
    for text in latest.values():
        panel.add_row(Text(text))
    return panel


def _describe_train(line: Line) -> Iterator[str]:
    """Only what is there: name, the key it comes from, and how it is written."""
    formats: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("loss", "loss", lambda x: f"{x:.4f}"),
        ("gradient", "grad_norm", lambda x: f"{x:.3g}"),
        ("audio", "audio_s_per_s", lambda x: f"{x:,.4g} s/s" if x < 1000 else f"{x:,.0f} s/s"),
        ("useful", "tflops", lambda x: f"{x:.3g} TFLOP/s"),
        ("padding", "padding_audio", lambda x: f"{x:.1%}"),
        ("data wait", "data_wait_share", lambda x: f"{x:.1%}"),
        ("memory", "memory_bytes", lambda x: f"{x / 2**30:.3g} GiB"),
        ("skipped", "skipped", lambda x: f"{x:.0f}" if x else ""),
    )
    for name, key, render in formats:
        value = line.get(key)
        if value is not None and (text := render(float(value))):
            yield f"{name} {text}"


def _describe_sets(line: Line) -> Iterator[str]:
    for name, numbers in line["sets"].items():
        parts = [f"{name}:"]
        if "wer" in numbers:
            parts.append(f"WER {percent(numbers['wer'])} {interval(numbers.get('ci95'))}".rstrip())
        if "cer" in numbers:
            parts.append(f"CER {percent(numbers['cer'])}")
        if "loss" in numbers:
            parts.append(f"loss {float(numbers['loss']):.4f}")
        yield " ".join(parts)


def percent(share: float | int | None) -> str:
    """12.3 %, or a word where there is no such number."""
    return "undefined" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def interval(bounds: Sequence[float | int | None] | None) -> str:
    """[11.0, 13.5] in per cent, empty when it is not known."""
    low, high = bounds or (None, None)
    if low is None or high is None or not math.isfinite(low + high):
        return ""
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _encode(line: Line) -> bytes:
    """One line of strict JSON. Half a surrogate pair, which UTF-8 cannot hold, becomes \\udXXX."""
    nonfinite: dict[str, str] = {}
    plain = _plain(line, "", nonfinite)
    if nonfinite:
        plain["nonfinite"] = nonfinite
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def _plain(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    """The value in Python's own types; what is not finite becomes None and goes to `nonfinite`."""
    if hasattr(value, "tolist"):  # numpy's and jax's scalars and arrays
        value = value.tolist()
    below = f"{path}/" if path else ""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{below}{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{below}{i}", nonfinite) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[path] = str(value)
        return None
    return value


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line that can be read, as written and as read."""
    content = path.read_bytes() if path.is_file() else b""
    for number, raw in enumerate(content.splitlines(keepends=True), 1):
        try:
            line = json.loads(raw)
            int(line["step"])
        except (ValueError, TypeError, KeyError):
            if raw.endswith(b"\n"):
                _say(f"warning: {path}, line {number} is damaged and was passed over")
            continue
        yield raw.rstrip(b"\n") + b"\n", line


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of later steps, in a copy that then takes the file's place at once."""
    if not path.exists():
        return
    kept = b"".join(raw for raw, line in _lines(path) if line["step"] <= step)
    if kept == path.read_bytes():
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        why = error.strerror or str(error)
        raise UserError(f"{path} cannot be written", why, "free space on its disk") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

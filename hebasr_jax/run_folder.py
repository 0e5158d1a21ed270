"""The folder of a training run: who holds it, what it was started with, how it is stopped.

`runs/<name>/` holds config.json (every value and its origin), env.json (what must stay the same,
and one entry per start: versions, devices, commit, changes), plan.json, metrics.jsonl,
checkpoints/ and reports. Nothing here imports JAX until it is asked for the devices.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from hebasr_jax.errors import UserError

EXIT_RUN_AGAIN = 75
"""Exit code (EX_TEMPFAIL) of a run that a signal stopped: the same command goes on with it."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_UNRECORDED = ".unrecorded"  # is there from when a start makes files anew until its record


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as `write_text` writes text."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a machine that loses power, sees the old or the new one.

    Half a surrogate pair, as in a path that is not UTF-8, becomes \\udXXX. Raises `UserError` when
    the disk is full or may not be written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{path} cannot be written", why, "free space, or repair it") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that the run wrote; empty where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", str(error), "restore it from a copy") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read", "it holds no JSON object", "restore it")
    return content


@contextlib.contextmanager
def open_run(folder: Path) -> Iterator[None]:
    """Makes the folder, or opens it again, and holds it: no other run may, on any host.

    The system lets go of the lock when the process ends, however it ends. With several hosts the
    first one calls this.

    Raises:
      UserError: another run holds the folder, or it cannot be made.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        why = "its path is not UTF-8, and checkpoints cannot be saved below it"
        raise UserError(f"{folder} cannot hold a run", why, "set another runs_dir") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        do = "wait for that run or stop it, or set another name"
        handle = take_lock(folder / ".lock", "a run", do)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"{folder} cannot be written", why, "set another name or runs_dir"
        ) from None
    try:
        yield
    finally:
        os.close(handle)


def take_lock(lock: Path, holder: str, do: str) -> int:
    """Locks a file, made for it, on all hosts; who closes the handle that it returns lets go.

    Its holder may remove the file before it lets go. Raises UserError, with `do`, where another
    process holds it, and OSError.
    """
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(handle)
            what = f"{lock.parent} is in use"
            raise UserError(what, f"{holder} holds it: {owner}", do) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), lock.stat()):  # else it was removed meanwhile
                break
        os.close(handle)
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def was_trained(folder: Path) -> bool:
    """Whether the run ever finished a checkpoint, be it damaged by now."""
    names = [path.name for path in (folder / "checkpoints").glob("[0-9]*")]
    return any(".partial" not in name for name in names)


def prepare_layout(folder: Path, *, accept_changes: bool) -> bool:
    """Tells whether a start makes the run's own files anew: model files, list of bad clips.

    A first start does, one that accepts changes, and one after a start that ended before it was
    recorded: what that one made may be of other settings than the record's. So it is noted here
    until `record_start`.
    """
    unrecorded = folder / _UNRECORDED
    if not was_trained(folder):
        return True
    if accept_changes:
        write_text(unrecorded, "")
    return unrecorded.exists()


def record_start(
    folder: Path,
    config: Mapping[str, Mapping[str, Any]],
    fixed: Mapping[str, Any],
    changes: Sequence[str],
    *,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and env.json of a start that will go on; see `run_changes.changes_since`.

    Args:
      changes: since the last start.
      about: JSON to note with this start, such as revisions and licences of the data.
    """
    env, now = read_json(folder / "env.json"), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    start = {"time": now, **environment(), **(about or {}), "changes": list(changes)}
    write_json(folder / "config.json", config)
    write_json(folder / "env.json", {"fixed": fixed, "starts": [*env.get("starts", []), start]})
    (folder / _UNRECORDED).unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """What a start ran on. No environment variables, no command line: they may hold secrets."""
    import platform

    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": {name: _version(name) for name in ("hebasr-jax", *PACKAGES)},
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "driver": _driver(),
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return None


def commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the repository that tracks this package, "+dirty" when files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # a package installed below it is not of it
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into "save, then stop"; a second one ends at once.

        with StopSignal() as stop:
            ...                      # until here a signal ends the process with EXIT_RUN_AGAIN
            stop.worth_saving = True # after the first step; from now on the loop asks:
            if stop.requested: save and return EXIT_RUN_AGAIN
            stop.leave_at_once("why")  # when all that is worth saving is saved

    A thread acts on the signals, so that they count while the main thread compiles or waits for a
    device, when Python itself runs no handler. Every file of a run is written so that an end at
    any instant harms nothing. Outside the main thread it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.worth_saving = False
        self.parting = "nothing to save yet"
        self._lock = threading.Lock()

    def __enter__(self) -> "StopSignal":
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            descriptor = self._writer.fileno()
            self._previous_wakeup = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
            # A Python handler must exist for the wake-up; all is done by the thread.
            self._previous = {n: signal.signal(n, lambda *_: None) for n in SIGNALS}
            threading.Thread(target=self._watch, args=(self._reader,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        if self._installed:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_wakeup)
            self._writer.close()  # ends the thread
        return False

    def leave_at_once(self, parting: str) -> None:
        """From now on a signal ends the process with EXIT_RUN_AGAIN, saying `parting`.

        So does one that came when it was too late to be asked for.
        """
        with self._lock:
            self.worth_saving, self.parting = False, parting
            if self.requested:
                _leave(parting, EXIT_RUN_AGAIN)

    def _watch(self, reader: socket.socket) -> None:
        with reader:
            while data := reader.recv(1):
                if data[0] in SIGNALS:
                    with self._lock:
                        self._receive(data[0])

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.requested:
            _leave(f"{name} again: left at once, the last finished checkpoint counts", 128 + number)
        if not self.worth_saving:
            _leave(f"{name}: {self.parting}", EXIT_RUN_AGAIN)
        self.requested = True
        _tell(f"{name}: saving after this step; again to leave at once")


def _tell(line: str) -> None:
    """A line on standard error, past buffers and locks that another thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def _leave(line: str, code: int) -> None:
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar had hidden it
    _tell(show_cursor + line)
    os._exit(code)

"""Checkpoints: orbax writes the arrays in the background, a manifest of ours makes them count.

`checkpoints/<step>/` holds orbax's files, facts.json (every leaf's dtype and shape, and what the
caller adds, such as the place in the data) and manifest.json (size and sha256 of every file).
A save is made under another name and renamed when the manifest is on the disk: a folder named by
its step is whole, or was damaged later. Damaged ones are kept as `<step>.damaged` for study.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from hebasr_jax.distributed import any_host, is_first
from hebasr_jax.errors import UserError
from hebasr_jax.run_folder import read_json, sync_folder, write_json

_MANIFEST, _FACTS = "manifest.json", "facts.json"
_SPARE_BYTES = 64 << 20  # besides the arrays: index files, and room for logs
_HASH_THREADS = 8
_NONE, _ALL_DAMAGED = -1, -2


@dataclass(frozen=True)
class Restored:
    """A checkpoint, read."""

    step: int
    state: Any
    facts: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Saving never stops training: trouble is told by `warn` at once (from another thread), the step
    is given up, older ones stay, and the next save is tried. `wait` raises it; call it after the
    last save. With several hosts all of them call every method, at the same steps.

        with CheckpointStore(run, keep_last=2, keep_best=3, warn=print) as store:
            restored = store.restore(shapes)
            store.save(step, state, {"data": {"epoch": 0, "batch": 7}})
            store.record(step, loss=0.5, wer=0.2)
            store.wait()
    """

    def __init__(
        self, run: Path, *, keep_last: int, keep_best: int, warn: Callable[[str], None]
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise UserError(
                f"train.keep_last = {keep_last}, train.keep_best = {keep_best} cannot be had",
                "the newest checkpoint is always kept",
                "give at least 1 and 0",
            )
        self.folder = run.absolute() / "checkpoints"
        self.best = run.absolute() / "best.json"
        self.keep_last, self.keep_best, self.warn = keep_last, keep_best, warn
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None
        # Orbax logs a failure's trace from each of its threads; here it is told once, in a line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        self._join()
        return False

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, damaged or not, in order."""
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())

    def path(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / str(step)

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Starts a save. On return the arrays are copied: the caller may donate them.

        Waits for the save before it. A step that is there already is not saved again.

        Args:
          state: pytree of JAX arrays, sharded or not.
          facts: JSON to keep with it, such as the place in the data.
        """
        self._join()
        self._failure = None
        if any_host(is_first() and self.path(step).exists()):
            return
        leaves = _by_path(state)
        lack = self._lack_of_space(leaves) if is_first() else ""
        if any_host(bool(lack)):
            self._fail(step, lack or "the first host lacks space")
            return
        described = {"step": step, "leaves": _describe(leaves), **facts}
        partial = self.folder / f"{step}.partial"
        try:
            with _how_to_save():
                response = ocp.save_async(partial, leaves)
        except (OSError, ValueError) as error:
            self._fail(step, _reason(error))
            return
        arguments = (response, step, partial, described)
        self._thread = threading.Thread(target=self._finish, args=arguments)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          UserError: it failed, on this or another host.
        """
        self._join()
        failure, self._failure = self._failure, None
        if any_host(failure is not None):
            raise failure or UserError("a checkpoint could not be saved by another host")

    def restore(self, shapes: Callable[[Mapping[str, Any]], Any]) -> Restored | None:
        """The newest whole checkpoint; None when the run never finished one.

        Sizes and hashes are checked first. A damaged checkpoint is told, set aside, and the one
        before it is tried.

        Args:
          shapes: from a checkpoint's facts to a pytree of `jax.ShapeDtypeStruct` with the shardings
            to load onto: what is trained, and so has moments, differs between stages.

        Raises:
          UserError: all are damaged, or it is the checkpoint of another model.
        """
        self._join()
        step = self._newest_whole() if is_first() else 0
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == _ALL_DAMAGED:
            raise UserError(
                f"no checkpoint in {self.folder} is whole",
                "they are damaged, and kept for study as *.damaged",
                "copy a whole one back, or set another name to train from the start",
            )
        if step == _NONE:
            return None
        facts = read_json(self.path(step) / _FACTS)
        return Restored(step, *load(self.path(step), shapes(facts)))

    def record(
        self, step: int, loss: float | None = None, wer: float | None = None, scored_on: str = ""
    ) -> None:
        """Writes a step's validation into best.json, before or after the step is saved.

        Args:
          scored_on: names what it is of: only figures of the same are ranked together.
        """
        if not is_first():
            return
        given = {"loss": loss, "wer": wer}
        known = {k: v if v is not None and math.isfinite(v) else None for k, v in given.items()}
        row = {**known, "scored_on": scored_on}
        try:
            write_json(self.best, {**read_json(self.best), str(step): row})
        except UserError as error:
            self.warn(str(error))

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _finish(self, response: Any, step: int, partial: Path, facts: dict[str, Any]) -> None:
        """Waits for orbax, which has waited for all hosts; then the first host seals the save."""
        try:
            response.result()
            if not is_first():
                return
            seal(partial, facts)
            partial.rename(self.path(step))
            sync_folder(self.folder)
        except Exception as error:  # it must not die with the thread
            self._fail(step, _reason(error))
            return
        try:
            self._prune()
        except (OSError, UserError) as error:
            self.warn(f"old checkpoints could not be removed: {error}")

    def _fail(self, step: int, why: str) -> None:
        there = ", ".join(map(str, self.steps())) or "none"
        self._failure = UserError(
            f"the checkpoint of step {step} was not saved",
            why,
            f"free space or repair {self.folder}; finished checkpoints: {there}",
        )
        self.warn(str(self._failure))
        if is_first():
            self._sweep()

    def _lack_of_space(self, leaves: dict[str, Any]) -> str:
        """Why the disk cannot take a save of these arrays; empty when it can."""
        needed = sum(leaf.nbytes for leaf in leaves.values()) + _SPARE_BYTES
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return _reason(error)
        return "" if free >= needed else f"it needs {needed:,} bytes, and {free:,} are free"

    def _sweep(self) -> None:
        """Removes what interrupted saves and deletions left."""
        for pattern in ("*.partial*", "*.removed"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        """Removes the checkpoints that are neither among the last nor among the best."""
        steps = self.steps()
        for step in set(steps) - kept(steps, read_json(self.best), self.keep_last, self.keep_best):
            removed = self.path(step).rename(self.folder / f"{step}.removed")
            shutil.rmtree(removed)

    def _newest_whole(self) -> int:
        for step in reversed(self.steps()):
            fault = find_fault(self.path(step))
            if not fault:
                return step
            aside = _free_name(self.folder / f"{step}.damaged")
            self.path(step).rename(aside)
            self.warn(f"checkpoint {step} is damaged and passed over: {fault}; kept as {aside}")
        return _ALL_DAMAGED if any(self.folder.glob("*.damaged*")) else _NONE


def kept(
    steps: Iterable[int], table: Mapping[str, Mapping[str, Any]], keep_last: int, keep_best: int
) -> set[int]:
    """Of the saved steps those to keep: the last, the best by WER and the best by loss.

    Of equal ones the later is better. Figures of other dev data are ranked by themselves, and so
    outlive a change that is undone.
    """
    ordered = sorted(steps, reverse=True)
    keep = set(ordered[: max(keep_last, 1)])
    kinds = {row.get("scored_on") for row in table.values()}
    for metric, kind in itertools.product(("wer", "loss"), kinds):
        rows = {s: table.get(str(s), {}) for s in ordered}
        rated = [s for s, row in rows.items() if row.get("scored_on") == kind]
        known = [s for s in rated if rows[s].get(metric) is not None]
        keep |= set(sorted(known, key=lambda s: rows[s][metric])[:keep_best])
    return keep


def figures_of(run: Path) -> dict[str, dict[str, Any]]:
    """A run's best.json, step -> loss and wer, as far as it may be ranked together.

    Of checkpoints that are there, scored on the same dev data as the newest of them.
    """
    table = read_json(run / "best.json")
    there = {step: row for step, row in table.items() if (run / "checkpoints" / step).is_dir()}
    kind = there[max(there, key=int)].get("scored_on") if there else None
    return {step: row for step, row in there.items() if row.get("scored_on") == kind}


def load(folder: Path, like: Any, *, part: bool = False) -> tuple[Any, dict[str, Any]]:
    """The arrays of one checkpoint, bit for bit, laid out as `like` says, and its facts.

    Moments that were kept as another kind of float are made what `like` says (`optim.moments`).

    Args:
      like: pytree of `jax.ShapeDtypeStruct` with shardings, of the saved names and shapes.
      part: `like` may lack leaves of the checkpoint; they are not read.

    Raises:
      UserError: it is the checkpoint of another model.
    """
    facts = read_json(folder / _FACTS)
    there, wanted = facts.pop("leaves"), _by_path(like)
    stored = {name: _as_kept(name, leaf, there.get(name, "")) for name, leaf in wanted.items()}
    here = _describe(stored)
    names = here if part else {**here, **there}
    differing = [name for name in names if there.get(name) != here.get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder} is the checkpoint of another model",
            f"{name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
            f" ({len(differing)} of {len(names)} arrays differ)",
            "take the config that it was trained with, or set another name",
        )
    leaves = ocp.load(
        folder.absolute(), {name: stored.get(name, ocp.PLACEHOLDER) for name in there}
    )
    found = [
        x if x.dtype == leaf.dtype else x.astype(leaf.dtype)
        for x, leaf in ((leaves[name], leaf) for name, leaf in wanted.items())
    ]
    return jax.tree.unflatten(jax.tree.structure(like), found), facts


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes facts.json, brings every file to the disk, and writes the manifest last."""
    write_json(folder / _FACTS, facts)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = list(pool.map(_digest, files))
    for subfolder in {path.parent for path in files}:
        sync_folder(subfolder)
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    write_json(folder / _MANIFEST, {"files": entries})


def find_fault(folder: Path) -> str:
    """What is wrong with a checkpoint's files, by the manifest: a name and a fault, or nothing."""
    try:
        entries = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            digests = pool.map(_digest, [folder / name for name in entries])
        for (name, entry), digest in zip(entries.items(), digests, strict=True):
            if digest != entry["sha256"]:
                return f"{name} is not as it was saved (sha256 differs)"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror or error}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    return ""


def _digest(path: Path) -> str:
    """sha256 of a file whose bytes have reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path, of any pytree: files then depend on no class of optax or of ours."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _how_to_save() -> ocp.Context:
    context = ocp.Context()
    # Float32 weights shrink by 8 % only, and saving and loading take 1.5 times as long.
    context.array.saving.use_compression = False
    # Else a folder that cannot be made shows after minutes, as a timeout.
    context.async_options.create_directories_asynchronously = False
    return context


def _as_kept(name: str, leaf: Any, described: str) -> Any:
    """A leaf of the moments in the kind of float that the checkpoint has it in."""
    for kept in ("float32", "bfloat16"):
        if name.startswith("moments/") and described == f"{kept}{list(leaf.shape)}":
            return leaf.update(dtype=kept)
    return leaf


def _describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _reason(error: Exception) -> str:
    """The first line of an error, which for a system error is the sentence for its number."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 100))]
    return next(name for name in names if not name.exists())

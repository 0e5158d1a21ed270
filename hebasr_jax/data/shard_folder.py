"""The folder that shards are made in: held by one job for each part, tidied when all are there."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from hebasr_jax.data.hub_files import HUB_FOLDER
from hebasr_jax.data.label_log import json_lines
from hebasr_jax.data.shard_work import remove_partials, writing
from hebasr_jax.data.shards import ORIGIN_FILE, REMOVED_FILE, SET_FILE, write_synced
from hebasr_jax.data.synthesize import SPEECH_FOLDER
from hebasr_jax.run_folder import take_lock

_HOLDER, _DO = "hebasr prepare", "wait for it or stop it, or give another --out"


@contextlib.contextmanager
def alone(folder: Path, part: int, parts: int) -> Iterator[None]:
    """Makes the folder and holds this part of it: no other job may, on any host.

    Raises UserError where one does. Folders that were made for nothing are removed at the end.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / f".part-{part}-of-{parts}.lock"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = take_lock(lock, _HOLDER, _DO)
        try:
            _refuse_other_parts(folder, parts)
        except BaseException:
            lock.unlink(missing_ok=True)
            os.close(handle)
            raise
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _refuse_other_parts(folder: Path, parts: int) -> None:
    """Raises UserError where a job is at work that cuts the folder into another number of parts."""
    for lock in folder.glob(".part-*-of-*.lock"):
        if not lock.stem.endswith(f"-of-{parts}"):
            handle = take_lock(lock, _HOLDER, _DO)
            lock.unlink(missing_ok=True)  # of a job that was killed
            os.close(handle)


def clear(folder: Path) -> None:
    """Removes what only the making of shards needed, or a kill left; no part writes any more."""
    for made in (HUB_FOLDER, SPEECH_FOLDER):
        shutil.rmtree(folder / made, ignore_errors=True)
    for name in (ORIGIN_FILE, SET_FILE):
        remove_partials(folder, name)


def list_removed(folder: Path, removed: Iterable[tuple[str, str]]) -> None:
    """Writes `removed.jsonl`: rows left out on purpose, each with its reason."""
    remove_partials(folder, REMOVED_FILE)  # only one part writes it
    rows = [{"id": row, "reason": reason} for row, reason in removed]
    with writing(folder):
        write_synced(folder / REMOVED_FILE, json_lines(rows))

"""The command `prepare`: its flags, and what it tells. Light to import: see `prepare.py`."""

import contextlib
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source

if TYPE_CHECKING:
    from hebasr_jax.data.clips import ClipSet

_TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class Prepare:
    """Data sets to shards that training reads quickly at random.

    Run the same command again after any stop: finished shards are checked and kept. With --shard
    i/n, n jobs share the work in any order; a set can be read once every job is done.
    """

    out: Path
    """folder to write to: OUT/NAME, or OUT/train/NAME and OUT/dev/NAME of a config's sets"""
    config: Path | None = None
    """config file whose training and dev sets are prepared"""
    source: str | None = None
    """instead of a config: a manifest, a parquet file, or a folder or glob of them"""
    name: str | None = None
    """name of the set that --source gives"""
    split: str | None = None
    """only rows of --source whose split says so"""
    columns: Columns = field(default_factory=Columns)
    """names of the columns or fields of --source"""
    schema: str = ""
    """hub set that --source is a copy of, such as crowd-transcribe-v5; "": none"""
    normalizer: Literal["", "hebrew-v1"] = ""
    """what is done to the texts of --source"""
    without: tuple[str, ...] = ()
    """JSONL files with `id` and `reason` in each line: clips of --source to leave out"""
    accept_licence: bool = False
    """use --schema although its licence is non-commercial or not stated"""
    format: Literal["pcm", "flac"] = "flac"
    """flac is about two thirds as large, pcm is decoded 17 times as fast"""
    shard_mb: float = 512.0
    """MB of samples in a shard, before they are compressed"""
    shard: str = "1/1"
    """part i of n, counted from 1: this job makes every n-th shard"""
    threads: int = 8
    """clips decoded at a time"""
    max_bad_share: float = 0.01
    """stop when more of the clips are bad"""

    def run(self) -> int:
        from hebasr_jax.data.prepare import plan_set, prepare_set
        from hebasr_jax.data.sources import describe, open_source

        part, parts = _part(self.shard)
        if not self.shard_mb > 0 or self.threads < 1:
            raise UserError("--shard-mb and --threads must be positive")
        for folder, source in self._sources().items():
            clip_set = open_source(source)
            _say(describe(clip_set))
            plan = plan_set(clip_set, self.format, self.shard_mb)
            lacking = prepare_set(
                clip_set,
                folder,
                plan,
                part=part,
                parts=parts,
                threads=self.threads,
                max_bad_share=self.max_bad_share,
                progress=functools.partial(_progress, clip_set.name),
            )
            if part == 1:
                _list_removed(clip_set, folder)
            _say(f"{folder}: {_told(plan.shards, lacking)}")
        return 0

    def _sources(self) -> dict[Path, Source]:
        """Each set and the folder for its shards."""
        if (self.config is None) == (self.source is None):
            raise UserError("give --config, or --source and --name", "one of them is needed")
        if self.source is not None:
            source = Source(
                self.name or "",
                self.source,
                split=self.split,
                columns=self.columns,
                schema=self.schema,
                normalizer=self.normalizer,
                without=self.without,
                accept_licence=self.accept_licence,
            )
            sets: dict[str, tuple[Source, ...]] = {"": (source,)}
        else:
            from hebasr_jax.config_file import load_config

            assert self.config is not None
            data = load_config(self.config).config.data
            sets = {"train": data.train, "dev": data.dev}
        folders = {self.out / use / source.name: source for use in sets for source in sets[use]}
        for source in folders.values():
            if not re.fullmatch(r"[^\W.][^/\\\0]*", source.name):
                raise UserError(f"--name {source.name!r} cannot name a folder", do="--name crowd")
        if not folders:
            raise UserError(f"{self.config}: has no set in data.train or data.dev")
        return folders


def _list_removed(clip_set: "ClipSet", folder: Path) -> None:
    """Writes `removed.jsonl`: rows left out on purpose, each with its reason."""
    from hebasr_jax.data.shards import write_synced

    rows = [{"id": row, "reason": reason} for row, reason in clip_set.removed]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_synced(folder / "removed.jsonl", "".join(lines).encode("utf-8", "replace"))


def _part(shard: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--shard {shard} is no part", "parts count from 1", "--shard 1/8 to 8/8")
    return part, parts


def _told(shards: int, lacking: list[str]) -> str:
    if not lacking:
        return f"all {shards} shards are there; its path can stand in a config"
    return f"{shards - len(lacking)} of {shards} shards are there; other parts make the rest"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _progress(name: str, total_s: float) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; elsewhere a line every ten seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bar:
            task = bar.add_task(name, total=total_s)
            yield lambda audio_s: bar.advance(task, audio_s)
        return
    start = told = time.monotonic()
    done_s = 0.0

    def advance(audio_s: float) -> None:
        nonlocal done_s, told
        done_s += audio_s
        now = time.monotonic()
        if now - told > _TELL_EVERY_S:
            told = now
            hours = f"{done_s / 3600:.2f} of {total_s / 3600:.2f} h"
            _say(f"{name}: {hours}, {done_s / (now - start):,.0f} s of audio a second")

    yield advance

"""The command `prepare`: its flags, and what it tells. Light to import: see `prepare.py`."""

import contextlib
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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

    With --config and no --out, training sets that are not there are fetched from the hub by their
    schema, and their shards written where the config reads them.
    """

    out: Path | None = None
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
        from hebasr_jax.data.sources import describe

        part, parts = _part(self.shard)
        if not self.shard_mb > 0 or self.threads < 1:
            raise UserError("--shard-mb and --threads must be positive")
        for folder, source in self._sources().items():
            clip_set = self._open(source, folder)
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
                progress=functools.partial(progress, clip_set.name),
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
            if self.out is None:
                return _of_hub(self.config, data.train)
            sets = {"train": data.train, "dev": data.dev}
        if self.out is None:
            raise UserError("--out is not given", do="name a folder for the shards of --source")
        folders = {self.out / use / source.name: source for use in sets for source in sets[use]}
        for source in folders.values():
            if not re.fullmatch(r"[^\W.][^/\\\0]*", source.name):
                raise UserError(f"--name {source.name!r} cannot name a folder", do="--name crowd")
        if not folders:
            raise UserError(f"{self.config}: has no set in data.train or data.dev")
        return folders

    def _open(self, source: Source, folder: Path) -> "ClipSet":
        """A set that lies here, or else on the hub, whose commit is put down beside its shards."""
        from hebasr_jax.data.adapters import filled, find_adapter
        from hebasr_jax.data.shards import ORIGIN_FILE, read_origin, write_synced
        from hebasr_jax.data.sources import open_source
        from hebasr_jax.hub import find_dataset

        if self.out is not None:
            return open_source(source)
        adapter = find_adapter(source.schema)
        hub, split = source.hub or adapter.hub, source.split or adapter.splits[0]
        begun = read_origin(folder).get("revision")  # the other shards are of the same commit
        found = find_dataset(hub, adapter.config, split, revision=begun)
        clip_set = open_source(replace(source, split=None), files=found.paths)
        told = {
            "hub": hub,
            "config": adapter.config,
            "split": split,
            "revision": found.revision,
            "licence": filled(source).licence,
            "clips": len(clip_set.clips),
            "bad": len(clip_set.bad),
            "removed": len(clip_set.removed),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_synced(folder / ORIGIN_FILE, json.dumps(told, ensure_ascii=False, indent=1).encode())
        return clip_set


def _of_hub(config: Path, sources: Sequence[Source]) -> dict[Path, Source]:
    """The sets of the hub that a config wants shards of, by the folder that it reads.

    Shards hold all clips, texts as they came: lists, quality and normaliser count when they are
    read, so that several sets of a config can share them.
    """
    from hebasr_jax.data.shards import SET_FILE
    from hebasr_jax.data.sources import is_there

    folders: dict[Path, Source] = {}
    for source in sources:
        folder = Path(source.path).expanduser()
        if is_there(source) and not (folder / SET_FILE).is_file():
            _say(f"{source.name}: {source.path} is there, and is left as it is")
        elif source.schema:
            whole = replace(source, without=(), only=None, min_quality=None, normalizer="")
            folders.setdefault(folder, whole)
        else:
            raise UserError(
                f"{source.name}: {source.path} is not there",
                "the set has no schema, by which it could be fetched from the hub",
                "put a manifest, parquet files or shards there, or name a schema in the config",
            )
    if not folders:
        _say(f"{config}: nothing is to be fetched; with --out the sets that are here get shards")
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
def progress(name: str, total_s: float) -> Iterator[Callable[[float], None]]:
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

"""The command `prepare`: its flags, and what it tells. Light to import: see `prepare.py`."""

import contextlib
import functools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source

if TYPE_CHECKING:
    from hebasr_jax.data.clips import ClipSet
    from hebasr_jax.data.hub_files import HeldFiles
    from hebasr_jax.data.speech_texts import Speech
    from hebasr_jax.data.workers import Workers

_TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class Prepare:
    """Data sets to shards that training reads quickly at random.

    Run the same command again after any stop: finished shards are checked and kept. With --shard
    i/n, n jobs share the work in any order; a set can be read once every job is done.

    With --config and no --out, training sets that are not there are fetched from the hub by their
    schema, and their shards written where the config reads them.

    With --synthesize, speech is made of texts; every row of it is tagged as synthetic. With
    --pseudo-label, texts are made of speech: those that a second system agrees with.
    """

    out: Path | None = None
    """folder to write to: OUT/NAME, or OUT/train/NAME and OUT/dev/NAME of a config's sets"""
    config: Path | None = None
    """config file whose training and dev sets are prepared"""
    source: str | None = None
    """instead of a config: a manifest, a parquet file, or a folder or glob of them"""
    name: str | None = None
    """name of the set that --source or --synthesize gives"""
    split: str | None = None
    """only rows of --source whose split says so"""
    columns: Columns = field(default_factory=Columns)
    """names of the columns or fields of --source or --synthesize"""
    schema: str = ""
    """hub set that --source is a copy of, such as crowd-transcribe-v5; "": none"""
    normalizer: Literal["", "hebrew-v1"] = ""
    """what is done to the texts of --source or --synthesize"""
    without: tuple[str, ...] = ()
    """JSONL files with `id` and `reason` in each line: clips of --source to leave out"""
    accept_licence: bool = False
    """use --schema although its licence is non-commercial or not stated"""
    format: Literal["pcm", "flac"] = "flac"
    """flac is about two thirds as large, pcm is decoded 17 times as fast"""
    shard_mb: float = 512.0
    """MB of samples in a shard, before they are compressed"""
    shard: str = "1/1"
    """part i of n, counted from 1: this job makes the i-th n-th of the shards"""
    processes: int | None = None
    """that make shards at the same time; one for each core by default"""
    ray: str | None = None
    """instead of processes: a Ray cluster's address, auto (the running one) or local; its machines
    must see the same folders"""
    max_bad_share: float = 0.01
    """stop when more of the clips are bad"""
    synthesize: Path | None = None
    """instead of a source: texts to make speech of, JSONL (id, text, speaker, voice; all but text
    may be absent) or a text file with a sentence a line"""
    voice_command: str = ""
    """run for each text, such as "piper --model {voice} --output_file {out}": the text is on its
    standard input, and {text}, {text_file}, {voice}, {seed} are filled in; "": eSpeak NG"""
    voices: tuple[str, ...] = ()
    """{voice} is one of them, drawn by a row's speaker or else its id, where it names none"""
    spoken: str = ""
    """field of --synthesize that the voice is given in place of the text, such as IPA"""
    seed: int = 0
    """of the voices drawn"""
    voice_limit_s: float = 60.0
    """seconds that the command may take for a text"""
    licence: str = ""
    """of the texts and voices of --synthesize, for the model card"""
    pseudo_label: str = ""
    """writes the texts of --source: a model folder, hub id or run, or faster-whisper:MODEL"""
    second: str = ""
    """must agree with --pseudo-label: another such model, or a .jsonl file of `id` and `text`"""
    max_cer: float = 0.1
    """character error rate between the two, above which a piece is left out"""
    piece_s: float = 30.0
    """with --pseudo-label, longer sound is cut at pauses into pieces of at most so many seconds"""

    def run(self) -> int:
        from hebasr_jax.data.prepare import plan_set, prepare_set
        from hebasr_jax.data.sources import describe

        part, parts = _part(self.shard)
        if not self.shard_mb > 0 or (self.processes is not None and self.processes < 1):
            raise UserError("--shard-mb and --processes must be positive")
        if self.ray is not None and self.processes is not None:
            raise UserError("--processes is not for --ray", "Ray knows its cores", "leave one out")
        if bool(self.pseudo_label) != bool(self.second):
            raise UserError("--pseudo-label and --second belong together", "two systems must agree")
        if self.pseudo_label and (self.source is None or self.shard != "1/1"):
            raise UserError("--pseudo-label is for a whole --source, not for --config or --shard")
        for folder, source in self._sources().items():
            if self.synthesize is not None and self._is_synthesized(folder):
                _say(f"{folder}: all shards are there; its path can stand in a config")
                continue
            with self._opened(source, folder) as (clip_set, held):
                _say(describe(clip_set))
                plan = plan_set(clip_set, self.format, self.shard_mb)
                lacking = prepare_set(
                    clip_set,
                    folder,
                    plan,
                    part=part,
                    parts=parts,
                    workers=self._workers(),
                    held=held,
                    max_bad_share=self.max_bad_share,
                    progress=functools.partial(progress, clip_set.name),
                    say=_say,
                )
            if part == 1 and not self.pseudo_label:
                _list_removed(clip_set, folder)
            if not lacking:
                _clear(folder)
            _say(f"{folder}: {_told(plan.shards, lacking)}")
        return 0

    def _sources(self) -> dict[Path, Source]:
        """Each set and the folder for its shards."""
        given = self.source if self.synthesize is None else str(self.synthesize)
        if (self.config is None) == (given is None) or self.source not in (None, given):
            do = "give --config, or --source and --name, or --synthesize and --name"
            raise UserError(do, "one of them is needed")
        if given is not None:
            source = Source(
                self.name or "",
                given,
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
                return _of_hub(self.config, (*data.train, *(s for s in data.dev if s.schema)))
            sets = {"train": data.train, "dev": data.dev}
        if self.out is None:
            raise UserError("--out is not given", do="name a folder for the shards")
        folders = {self.out / use / source.name: source for use in sets for source in sets[use]}
        for source in folders.values():
            if not re.fullmatch(r"[^\W.][^/\\\0]*", source.name):
                raise UserError(f"--name {source.name!r} cannot name a folder", do="--name crowd")
        if not folders:
            raise UserError(f"{self.config}: has no set in data.train or data.dev")
        return folders

    def _speech(self) -> "tuple[Speech, dict[str, Any]]":
        """What is to be spoken, and all that decides what is made of it."""
        from hebasr_jax.data.speech_texts import Speech, check
        from hebasr_jax.data.synthesize import request_of

        if self.split or self.schema or self.without or self.shard != "1/1":
            raise UserError("--split, --schema, --without and --shard are not for --synthesize")
        assert self.synthesize is not None
        speech = Speech(
            self.synthesize,
            self.columns,
            self.spoken,
            self.normalizer,
            self.voice_command,
            self.voices,
            self.seed,
            self.licence,
            self.voice_limit_s,
        )
        check(speech)
        return speech, request_of(speech, format=self.format, shard_mb=self.shard_mb)

    def _is_synthesized(self, folder: Path) -> bool:
        from hebasr_jax.data.synthesize import is_made

        return is_made(folder, self._speech()[1])

    def _synthesized(self, name: str, folder: Path) -> "ClipSet":
        """A set whose sounds are made by a voice, in the folder of its shards."""
        from hebasr_jax.data.synthesize import synthesize
        from hebasr_jax.data.workers import cores

        speech, request = self._speech()
        return synthesize(
            speech,
            name,
            folder,
            request,
            threads=self.processes or cores(),
            max_bad_share=self.max_bad_share,
            progress=functools.partial(progress, name, tell=_texts),
            say=_say,
        )

    def _labelled(self, source: Source, folder: Path) -> "ClipSet":
        """What two systems agree on in a source, whose own texts count for nothing."""
        from hebasr_jax.data.pseudo_label import Labelling, label_set
        from hebasr_jax.data.sources import describe, open_source

        labelling = Labelling(self.pseudo_label, self.second, self.max_cer, self.piece_s)
        clip_set = open_source(replace(source, normalizer=""), unlabelled=True)
        _say(describe(clip_set))
        shown = functools.partial(progress, source.name)
        bad = self.max_bad_share
        return label_set(
            clip_set, source, folder, labelling, max_bad_share=bad, progress=shown, say=_say
        )

    def _workers(self) -> "Workers | None":
        from hebasr_jax.data.workers import cores, on_ray, processes

        if self.ray is not None:
            return on_ray(self.ray)
        count = self.processes or cores()
        return processes(count) if count > 1 else None

    @contextlib.contextmanager
    def _opened(self, source: Source, folder: Path) -> "Iterator[tuple[ClipSet, HeldFiles | None]]":
        """A set that lies here, or else on the hub, whose commit is put down beside its shards."""
        from hebasr_jax.data.adapters import filled, find_adapter
        from hebasr_jax.data.hub_files import held_files
        from hebasr_jax.data.shards import ORIGIN_FILE, read_origin, write_synced
        from hebasr_jax.data.sources import open_source
        from hebasr_jax.hub import list_dataset

        if self.synthesize is not None:
            yield self._synthesized(source.name, folder), None
            return
        if self.pseudo_label:
            yield self._labelled(source, folder), None
            return
        if self.out is not None:
            yield open_source(source), None
            return
        adapter = find_adapter(source.schema)
        hub, split = source.hub or adapter.hub, source.split or adapter.splits[0]
        begun = read_origin(folder)  # the other shards are of the same commit
        found = list_dataset(hub, adapter.config, split, revision=begun.get("revision"))
        columns = source.columns
        audio = columns.audio if columns.audio != Columns.audio else adapter.columns.audio
        size = sum(file.size for file in found.files) / 1e9
        _say(f"{source.name}: {len(found.files)} files of {hub}, {size:.1f} GB; reading the texts")
        with held_files(found, audio, folder, self.shard) as (files, held):
            of_dev = None if split == adapter.splits[0] else split  # else rows may tell none
            clip_set = open_source(replace(source, split=of_dev), files=files, held=held)
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
            if told != begun:
                content = json.dumps(told, ensure_ascii=False, indent=1).encode()
                write_synced(folder / ORIGIN_FILE, content)
            yield clip_set, held


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
        if is_there(source) and not (source.schema and (folder / SET_FILE).is_file()):
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


def _clear(folder: Path) -> None:
    """Removes what only the making of shards needed, or a kill left; no part writes any more."""
    from hebasr_jax.data.hub_files import HUB_FOLDER
    from hebasr_jax.data.shard_work import remove_partials
    from hebasr_jax.data.shards import ORIGIN_FILE, SET_FILE
    from hebasr_jax.data.synthesize import SPEECH_FOLDER

    for made in (HUB_FOLDER, SPEECH_FOLDER):
        shutil.rmtree(folder / made, ignore_errors=True)
    for name in (ORIGIN_FILE, SET_FILE):
        remove_partials(folder, name)


def _list_removed(clip_set: "ClipSet", folder: Path) -> None:
    """Writes `removed.jsonl`: rows left out on purpose, each with its reason."""
    from hebasr_jax.data.shard_work import remove_partials
    from hebasr_jax.data.shards import REMOVED_FILE, write_synced

    remove_partials(folder, REMOVED_FILE)  # only one part writes it
    rows = [{"id": row, "reason": reason} for row, reason in clip_set.removed]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_synced(folder / REMOVED_FILE, "".join(lines).encode("utf-8", "replace"))


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


def _hours(done_s: float, total_s: float, each_s: float) -> str:
    return f"{done_s / 3600:.2f} of {total_s / 3600:.2f} h, {each_s:,.0f} s of audio a second"


def _texts(done: float, total: float, each_s: float) -> str:
    return f"{done:,.0f} of {total:,.0f} texts, {each_s:,.1f} a second"


@contextlib.contextmanager
def progress(
    name: str, total: float, tell: Callable[[float, float, float], str] = _hours
) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal; elsewhere a line every ten seconds.

    tell: from what is done, the whole, and how much a second, to words; by default of audio.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bar:
            task = bar.add_task(name, total=total)
            yield lambda more: bar.advance(task, more)
        return
    start = told = time.monotonic()
    done = 0.0

    def advance(more: float) -> None:
        nonlocal done, told
        done += more
        now = time.monotonic()
        if now - told > _TELL_EVERY_S:
            told = now
            _say(f"{name}: {tell(done, total, done / (now - start))}")

    yield advance

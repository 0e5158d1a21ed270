"""The command `prepare`: its flags, and what it tells. Light to import: see `prepare.py`."""

import contextlib
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hebasr_jax.errors import UserError
from hebasr_jax.flags import refuse_unread
from hebasr_jax.run_config import Columns, Source

if TYPE_CHECKING:
    from hebasr_jax.data.clips import ClipSet
    from hebasr_jax.data.hub_files import HeldFiles
    from hebasr_jax.data.speech_texts import Speech
    from hebasr_jax.data.workers import Workers

    Opened = tuple[ClipSet, HeldFiles | None, dict[str, Any]]  # the last is its origin

_TELL_EVERY_S = 10.0
_ALWAYS = {"out", "format", "shard_mb", "max_bad_share"}
_OF_SOURCE = {
    "source", "name", "split", "columns", "schema", "normalizer", "without", "accept_licence",
}  # fmt: skip
_READ: dict[str, set[str]] = {  # flags that each mode reads besides
    "--config": {"config", "accept_licence", "shard", "ray", "processes"},
    "--source": {*_OF_SOURCE, "shard", "ray", "processes", "slice_s"},
    "--pseudo-label": {*_OF_SOURCE, "pseudo_label", "second", "max_cer", "piece_s"},
    "--synthesize": {
        "synthesize", "name", "columns", "normalizer", "voice_command", "voices", "spoken", "seed",
        "voice_limit_s", "licence", "processes",
    },
}  # fmt: skip


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
    """use sets, of --schema or a config, whose licence is non-commercial or not stated"""
    slice_s: float | None = None
    """cut longer clips of --source at their segments into slices of up to so many seconds, 120 at
    most; the slice before gives the context"""
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
        from hebasr_jax.data.shard_folder import alone
        from hebasr_jax.data.workers import ended_as_by_ctrl_c

        self._check()
        part, parts = _part(self.shard)
        with ended_as_by_ctrl_c():
            for folder, source in self._sources().items():
                with alone(folder, part, parts):
                    self._prepare(source, folder, part, parts)
        return 0

    def _check(self) -> None:
        """Refuses flags that do not go together."""
        if not self.shard_mb > 0 or (self.processes is not None and self.processes < 1):
            raise UserError("--shard-mb and --processes must be positive")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError("--max-bad-share is a share", "it lies in 0..1")
        if self.synthesize is not None and self.pseudo_label:
            why = "one makes speech of texts, the other texts of speech"
            raise UserError("--synthesize and --pseudo-label exclude each other", why, "choose one")
        if [self.config, self.source, self.synthesize].count(None) != 2:
            do = "give --config, or --source and --name, or --synthesize and --name"
            raise UserError(do, "one of them is needed")
        if bool(self.pseudo_label) != bool(self.second):
            raise UserError("--pseudo-label and --second belong together", "two systems must agree")
        mode = "--config" if self.config is not None else "--source"
        mode = "--synthesize" if self.synthesize is not None else mode
        if self.pseudo_label and self.config is None:
            mode = "--pseudo-label"
        refuse_unread(self, _READ[mode] | _ALWAYS, mode)
        if self.ray is not None and self.processes is not None:
            raise UserError("--processes is not for --ray", "Ray knows its cores", "leave one out")

    def _prepare(self, source: Source, folder: Path, part: int, parts: int) -> None:
        from hebasr_jax.data.prepare import plan_set, prepare_set
        from hebasr_jax.data.shard_folder import clear, list_removed
        from hebasr_jax.data.sources import describe

        if self._is_made(source, folder):
            clear(folder)
            _say(f"{folder}: all shards are there; its path can stand in a config")
            return
        with self._opened(source, folder) as (clip_set, held, origin):
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
                origin=origin,
                max_bad_share=self.max_bad_share,
                progress=functools.partial(progress, clip_set.name),
                say=_say,
            )
        if part == 1 and not self.pseudo_label:
            list_removed(folder, clip_set.removed)
        if not lacking:
            clear(folder)
        _say(f"{folder}: {_told(plan.shards, lacking)}")

    def _sources(self) -> dict[Path, Source]:
        """Each set and the folder for its shards."""
        given = self.source if self.synthesize is None else str(self.synthesize)
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
            from hebasr_jax.data.hub_sets import sets_of_hub

            assert self.config is not None
            data = load_config(self.config).config.data
            train, dev = (tuple(map(self._allowed, some)) for some in (data.train, data.dev))
            if self.out is None:
                return sets_of_hub(self.config, (*train, *(s for s in dev if s.schema)), _say)
            sets = {"train": train, "dev": dev}
        if self.out is None:
            raise UserError("--out is not given", do="name a folder for the shards")
        folders = {self.out / use / source.name: source for use in sets for source in sets[use]}
        for source in folders.values():
            if not re.fullmatch(r"[^\W.][^/\\\0]*", source.name):
                raise UserError(f"--name {source.name!r} cannot name a folder", do="--name crowd")
        if not folders:
            raise UserError(f"{self.config}: has no set in data.train or data.dev")
        return folders

    def _allowed(self, source: Source) -> Source:
        return replace(source, accept_licence=source.accept_licence or self.accept_licence)

    def _speech(self) -> "tuple[Speech, dict[str, Any]]":
        """What is to be spoken, and all that decides what is made of it."""
        from hebasr_jax.data.speech_texts import Speech, check
        from hebasr_jax.data.synthesize import request_of

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

    def _is_made(self, source: Source, folder: Path) -> bool:
        """Whether shards of just this are all there, where that can be told without the clips."""
        if self.synthesize is not None:
            from hebasr_jax.data.shard_folder import list_removed
            from hebasr_jax.data.shards import REMOVED_FILE
            from hebasr_jax.data.speech_texts import read_texts
            from hebasr_jax.data.synthesize import is_made

            speech, request = self._speech()
            made = is_made(folder, request)
            if made and not (folder / REMOVED_FILE).is_file():  # a kill came between
                list_removed(folder, read_texts(speech)[2])
            return made
        if self.config is None or self.out is not None:
            return False
        from hebasr_jax.data.adapters import refuse_licence
        from hebasr_jax.data.hub_sets import is_finished

        refuse_licence(source)
        return is_finished(folder, self._hub_request(source), self.max_bad_share)

    def _hub_request(self, source: Source) -> dict[str, Any]:
        from hebasr_jax.data.hub_sets import request_of

        return request_of(source, format=self.format, shard_mb=self.shard_mb)

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
        from hebasr_jax.data.prepare import plan_set, refuse_others
        from hebasr_jax.data.pseudo_label import Labelling, label_set
        from hebasr_jax.data.sources import describe, open_source

        labelling = Labelling(self.pseudo_label, self.second, self.max_cer, self.piece_s)
        clip_set = open_source(replace(source, normalizer=""), unlabelled=True)
        _say(describe(clip_set))

        def check(made: "ClipSet") -> None:
            refuse_others(folder, plan_set(made, self.format, self.shard_mb))

        return label_set(
            clip_set,
            source,
            folder,
            labelling,
            max_bad_share=self.max_bad_share,
            check=check,
            progress=functools.partial(progress, source.name),
            say=_say,
        )

    def _workers(self) -> "Workers | None":
        from hebasr_jax.data.workers import cores, on_ray, processes

        if self.ray is not None:
            return on_ray(self.ray)
        count = self.processes or cores()
        return processes(count) if count > 1 else None

    @contextlib.contextmanager
    def _opened(self, source: Source, folder: Path) -> "Iterator[Opened]":
        """A set that lies here, is made here, or lies on the hub."""
        from hebasr_jax.data.hub_sets import opened_of_hub, origin_here
        from hebasr_jax.data.shards import read_origin
        from hebasr_jax.data.sources import open_source

        if self.synthesize is not None:
            yield self._synthesized(source.name, folder), None, read_origin(folder)
        elif self.pseudo_label:
            yield self._labelled(source, folder), None, read_origin(folder)
        elif self.out is not None:
            clip_set = open_source(source)
            if self.slice_s is not None:
                from hebasr_jax.data.slices import sliced

                clip_set = sliced(clip_set, self.slice_s)
            yield clip_set, None, origin_here(source, clip_set)
        else:
            request = self._hub_request(source)
            with opened_of_hub(source, folder, request, self.shard, _say) as opened:
                yield opened


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

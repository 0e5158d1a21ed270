"""Opens the sets that are evaluated: the six of the benchmark, and data of one's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hebasr_jax.benchmark_sets import BENCHMARK_SETS, benchmark_set
from hebasr_jax.data.clips import ClipSet, group_field
from hebasr_jax.data.sources import open_source
from hebasr_jax.errors import UserError
from hebasr_jax.hub import find_dataset
from hebasr_jax.run_config import Columns, Source

CONTROL = "control"  # a folder beside those of the sets


@dataclass(frozen=True, eq=False)
class OpenSet:
    """A set's clips and where they are from; revision: hub commit, None for local files.

    draws: what a bootstrap draws, in words; by_clip: that is a row of the set.
    """

    clips: ClipSet
    source: str
    revision: str | None
    draws: str
    licence: str | None = None


@dataclass(frozen=True, eq=False)
class EvalSet:
    """A set by name, not opened yet: that may fetch it, and fail.

    may_refuse: it is gated, so that a hub which gives no access is no fault.
    """

    name: str
    open: Callable[[], OpenSet]
    may_refuse: bool = False


def choose_sets(sets: Sequence[str], manifests: Sequence[str]) -> list[EvalSet]:
    """What --sets and --manifest name. Raises `UserError` before anything is opened."""
    chosen = [_benchmark(given) for given in sets] + [_own(path) for path in manifests]
    names = [one.name for one in chosen]
    for path in manifests:
        if (name := _name_of(path)) in {row.name for row in BENCHMARK_SETS}:
            why = "Its rate would go into the benchmark's mean, and beside published ones of it."
            do = f"Rename the file; a copy of the set itself is --sets {name}={path}."
            raise UserError(f"{path}: has the name of a benchmark set", why, do)
    for name in names:
        if names.count(name) > 1 or name == CONTROL or name.startswith("."):
            why = "Results lie in a folder of the set's name, and `control` is taken."
            raise UserError(f"{name}: cannot be the name of a set here", why, "Rename the file.")
    if not chosen:
        raise UserError("no set given", do="name sets (--sets eval-d1 ...) or data (--manifest)")
    return chosen


def _benchmark(given: str) -> EvalSet:
    """`NAME`, `NAME@REVISION` of its hub data set, or `NAME=PATH` of a copy."""
    head, _, path = given.partition("=")
    name, _, revision = head.partition("@")
    row = benchmark_set(name)

    def open_it() -> OpenSet:
        found = find_dataset(path or row.hub, row.config, row.split, revision=revision or None)
        # Of like names in these sets one never knows what they mean: FLEURS repeats its ids.
        named = "id duration_s speaker recording language context segments quality"
        nothing = dict.fromkeys(named.split(), "")
        columns = Columns(text=row.text, **nothing)
        source = Source(name, path or row.hub, columns=columns)
        try:
            clips = open_source(source, files=found.paths, null_is_empty=True)
        except UserError as error:
            what, why = [*str(error).splitlines(), ""][:2]
            do = f"Fetch it anew; give a commit, {name}@COMMIT, or a copy, {name}=FOLDER."
            raise UserError(what, why, do) from error
        return OpenSet(clips, path or row.hub, found.revision, row.rows, row.licence)

    return EvalSet(name, open_it, may_refuse=row.gated)


def _own(path: str) -> EvalSet:
    """A manifest, parquet files, or a prepared set."""
    name = _name_of(path)

    def open_it() -> OpenSet:
        clips = open_source(Source(name, path))
        return OpenSet(clips, path, None, draws=f"{group_field(clips.clips) or 'clip'}s")

    return EvalSet(name, open_it)


def _name_of(path: str) -> str:
    return Path(path).stem or Path(path).absolute().name

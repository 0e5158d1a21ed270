"""The sets of a config that are made of the hub's: which, whether they are made, and opened."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hebasr_jax.data.adapters import filled, find_adapter
from hebasr_jax.data.clips import ClipSet
from hebasr_jax.data.hub_files import HeldFiles, held_files
from hebasr_jax.data.prepare import told_bytes
from hebasr_jax.data.shards import REMOVED_FILE, SET_FILE, is_whole, read_origin, seals
from hebasr_jax.data.sources import is_there, open_source
from hebasr_jax.errors import UserError
from hebasr_jax.hub import list_dataset
from hebasr_jax.run_config import Columns, Source

_OF_MAKING = ("format", "shard_mb", "columns")  # of a request, and not of where clips are from


def sets_of_hub(
    config: Path, sources: Sequence[Source], say: Callable[[str], None]
) -> dict[Path, Source]:
    """The sets of the hub that a config wants shards of, by the folder that it reads.

    Shards hold all clips, texts as they came: lists, quality and normaliser count when they are
    read, so that several sets of a config can share them. Raises a UserError for two that cannot.
    """
    folders: dict[Path, Source] = {}
    for source in sources:
        folder = Path(source.path).expanduser()
        if is_there(source) and not (source.schema and (folder / SET_FILE).is_file()):
            say(f"{source.name}: {source.path} is there, and is left as it is")
        elif source.schema:
            whole = replace(source, without=(), only=None, min_quality=None, normalizer="")
            first = folders.setdefault(folder, whole)
            then, now = request_of(first), request_of(whole)
            if changed := [name for name in now if then[name] != now[name]]:
                raise UserError(
                    f"{source.name}: {source.path} is the path of {first.name} as well",
                    "; ".join(f"{name} {then[name]} is not {now[name]}" for name in changed),
                    "Give each a path of its own.",
                )
        else:
            raise UserError(
                f"{source.name}: {source.path} is not there",
                "the set has no schema, by which it could be fetched from the hub",
                "put a manifest, parquet files or shards there, or name a schema in the config",
            )
    if not folders:
        say(f"{config}: nothing is to be fetched; with --out the sets that are here get shards")
    return folders


def request_of(source: Source, **settings: Any) -> dict[str, Any]:
    """What is asked of the hub, and how shards are made of it, for `origin.json`."""
    adapter = find_adapter(source.schema)
    columns = {k: v for k, v in asdict(source.columns).items() if v != getattr(Columns, k)}
    return {
        "hub": source.hub or adapter.hub,
        "config": adapter.config,
        "split": source.split or adapter.splits[0],
        "columns": columns,
    } | settings


def is_finished(folder: Path, request: Mapping[str, Any], max_bad_share: float) -> bool:
    """Whether all that is asked for is there, whole, and good enough: the hub need not be asked."""
    origin = read_origin(folder)
    if not (_is_of(origin, request) and (folder / REMOVED_FILE).is_file() and is_whole(folder)):
        return False
    bad = origin["bad"] + sum(len(seal["bad"]) for seal in seals(folder))
    return bool(bad <= max_bad_share * (origin["clips"] + origin["bad"]))


def _is_of(origin: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    return all(name in origin and origin[name] == request[name] for name in request)


@contextlib.contextmanager
def opened_of_hub(
    source: Source, folder: Path, request: Mapping[str, Any], job: str, say: Callable[[str], None]
) -> Iterator[tuple[ClipSet, HeldFiles, dict[str, Any]]]:
    """A set of the hub, what holds its files, and its origin: which set at which commit."""
    adapter = find_adapter(source.schema)
    asked = {name: request[name] for name in ("hub", "config", "split")}
    hub, split = request["hub"], request["split"]
    begun = read_origin(folder)  # the other shards are of the same commit
    revision = begun.get("revision") if _is_of(begun, asked) else None
    found = list_dataset(hub, request["config"], split, revision=revision)
    columns = source.columns
    audio = columns.audio if columns.audio != Columns.audio else adapter.columns.audio
    size = told_bytes(sum(file.size for file in found.files))
    say(f"{source.name}: {len(found.files)} files of {hub}, {size}; reading the texts")
    with held_files(found, audio, folder, job) as (files, held):
        of_dev = None if split == adapter.splits[0] else split  # else rows may tell none
        clip_set = open_source(replace(source, split=of_dev), files=files, held=held)
        origin = asked | {"revision": found.revision, "licence": filled(source).licence}
        made = {name: value for name, value in request.items() if name not in asked}
        yield clip_set, held, origin | counts(clip_set) | made


def origin_here(source: Source, clip_set: ClipSet) -> dict[str, Any]:
    """What is known of where a set that lies here is from; {} where nothing is.

    Shards carry what was put down with them on, with what is done to it now.
    """
    told: dict[str, Any] = {}
    if source.schema:
        whole = filled(source)
        split = source.split or find_adapter(source.schema).splits[0]
        told = {"schema": source.schema, "hub": whole.hub, "licence": whole.licence, "split": split}
    before = read_origin(Path(source.path).expanduser())
    told |= {name: value for name, value in before.items() if name not in _OF_MAKING}
    now = {
        "licence": source.licence,
        "split": source.split,
        "normalizer": source.normalizer,
        "without": [Path(name).name for name in source.without],
    }
    told |= {name: value for name, value in now.items() if value}
    return told | counts(clip_set) if told else {}


def counts(clip_set: ClipSet) -> dict[str, int]:
    return {
        "clips": len(clip_set.clips),
        "bad": len(clip_set.bad),
        "removed": len(clip_set.removed),
    }

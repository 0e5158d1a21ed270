"""Which clips of a set are wanted: lists of ids to leave out or to keep, and a least quality."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hebasr_jax.data.clips import Clip, Removed, quality_fault
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Source

_MOST_ABSENT = 0.1  # of the ids of `only`


@dataclass(frozen=True)
class Selection:
    """without: the reason for each id that is left out. only: ids that alone stay; None: all.

    lists: the ids of each file that was read. met: ids of all clips that were checked so far.
    """

    without: dict[str, str] = field(default_factory=dict)
    only: frozenset[str] | None = None
    min_quality: float | None = None
    lists: dict[str, frozenset[str]] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, source: Source) -> "Selection":
        """Reads the lists that a source names. Raises UserError for a file that is no such list."""
        without: dict[str, str] = {}
        lists: dict[str, frozenset[str]] = {}
        for name in source.without:
            reasons = dict(_list(name))
            lists[name] = frozenset(reasons)
            for clip_id, reason in reasons.items():
                without.setdefault(clip_id, reason or "is on a list of clips to leave out")
        only = None
        if source.only is not None:
            only = lists[source.only] = frozenset(clip_id for clip_id, _ in _list(source.only))
        return cls(without, only, source.min_quality, lists)

    def check(self, clip: Clip) -> None:
        """Raises `Removed` for a clip that is not wanted."""
        self.met.add(clip.id)
        if clip.id in self.without:
            raise Removed(clip.id, self.without[clip.id])
        if self.only is not None and clip.id not in self.only:
            raise Removed(clip.id, "is not on the list of clips to keep")
        if self.min_quality is not None and (fault := quality_fault(clip, self.min_quality)):
            raise Removed(clip.id, fault)

    def absent(self, bad: int, gone: frozenset[str] = frozenset()) -> list[str]:
        """A line for each list with ids that no clip has, once all clips of a set were checked.

        Raises UserError where a tenth of the ids of `only` are absent, or all of one of `without`,
        which may be of several sets; besides so many as there are bad rows, whose ids may not be
        known: then it is a list of another set, or of rows that have gone since.

        Args:
          gone: ids that shards lack because they were made without them.
        """
        told = []
        for name, ids in self.lists.items():
            keeps = ids is self.only
            lacking = ids - self.met - (frozenset() if keeps else gone)
            foreign = len(lacking) - bad > _MOST_ABSENT * len(ids) if keeps else lacking == ids
            if foreign and len(ids) > bad:
                raise UserError(
                    f"{name}: {len(lacking):,} of its {len(ids):,} ids are not in the set",
                    f"such as {min(lacking)!r}",
                    "Name the list that was made of this set, make it anew (`hebasr panel`, "
                    "`hebasr split`), or take it out where the set was prepared without them.",
                )
            if lacking:
                told.append(f"{len(lacking):,} of {len(ids):,} ids of {name} are not in the set")
        return told


def _list(name: str) -> Iterator[tuple[str, str]]:
    """The id and the reason ("" where there is none) in each line of a JSONL file.

    A line with `row` in place of `id` is of a row that is no clip anyway, and is passed over.
    """
    do = 'Each line is a JSON object such as {"id": "7", "reason": "noise"}.'
    try:
        lines = Path(name).expanduser().read_bytes().splitlines()
    except OSError as error:
        do = "If it is a list of the dev panel, `hebasr panel --config FILE` makes it. " + do
        raise UserError(f"{name}: cannot be read", error.strerror or "", do) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "row" in row and "id" not in row:
                continue
            clip_id, reason = row["id"], row.get("reason") or ""
            if not isinstance(clip_id, str | int) or not isinstance(reason, str):
                raise ValueError("id or reason is no string")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{name}:{number}: is no clip of a list", repr(error)[:100], do
            ) from error
        yield str(clip_id), reason

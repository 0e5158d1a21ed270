"""Which clips of a set are wanted: lists of ids to leave out or to keep, and a least quality."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hebasr_jax.data.clips import Clip, Removed
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Source

_ROUNDING = 1e-6  # scores may be stored as float32


@dataclass(frozen=True)
class Selection:
    """without: the reason for each id that is left out. only: ids that alone stay; None: all."""

    without: dict[str, str] = field(default_factory=dict)
    only: frozenset[str] | None = None
    min_quality: float | None = None

    @classmethod
    def of(cls, source: Source) -> "Selection":
        """Reads the lists that a source names. Raises UserError for a file that is no such list."""
        without: dict[str, str] = {}
        for name in source.without:
            for clip_id, reason in _list(name):
                without.setdefault(clip_id, reason or "is on a list of clips to leave out")
        only = None
        if source.only is not None:
            only = frozenset(clip_id for clip_id, _ in _list(source.only))
        return cls(without, only, source.min_quality)

    def check(self, clip: Clip) -> None:
        """Raises `Removed` for a clip that is not wanted."""
        if clip.id in self.without:
            raise Removed(clip.id, self.without[clip.id])
        if self.only is not None and clip.id not in self.only:
            raise Removed(clip.id, "is not on the list of clips to keep")
        if self.min_quality is None:
            return
        if clip.quality is None:
            raise Removed(clip.id, "has no quality score")
        if clip.quality < self.min_quality - _ROUNDING:
            raise Removed(clip.id, f"has a quality below {self.min_quality:g}")


def _list(name: str) -> Iterator[tuple[str, str]]:
    """The id and the reason ("" where there is none) in each line of a JSONL file."""
    do = 'Each line is a JSON object such as {"id": "7", "reason": "noise"}.'
    try:
        lines = Path(name).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{name}: cannot be read", error.strerror or "", do) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            clip_id, reason = row["id"], row.get("reason") or ""
            if not isinstance(clip_id, str | int) or not isinstance(reason, str):
                raise ValueError("id or reason is no string")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{name}:{number}: is no clip of a list", repr(error)[:100], do
            ) from error
        yield str(clip_id), reason

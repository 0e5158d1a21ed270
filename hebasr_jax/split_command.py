"""The command `split`: its flags, and what it tells. Light to import: see `data/splits.py`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source


@dataclass(frozen=True)
class Split:
    """Holds whole recordings, speakers or sources out of a set, as lists of ids for a config.

    Writes OUT/dev.jsonl, to be named in `only` of the dev set, and OUT/not_for_training.jsonl, in
    `without` of the training set. The same command gives the same lists.
    """

    source: str
    """a manifest, parquet files or shards"""
    out: Path
    """folder for the lists"""
    hours: float
    """of audio to hold out"""
    by: tuple[Literal["recording", "speaker", "source"], ...] = ("recording",)
    """what must not be on both sides; several: neither of them"""
    overlap: tuple[Path, ...] = ()
    """overlap.json of `hebasr evaluate`: those clips are on neither side"""
    long_s: float | None = None
    """also write held-out clips of a recording stitched to such lengths: OUT/dev_long.jsonl"""
    seed: int = 0
    split: str | None = None
    """only rows whose `split` says so"""
    schema: str = ""
    """known hub set that --source is a copy of, as for `prepare`"""
    accept_licence: bool = False
    """use the schema's set although its licence is non-commercial or not stated"""
    columns: Columns = field(default_factory=Columns)
    """names of the columns or fields of --source"""

    def run(self) -> int:
        from hebasr_jax.data.sources import describe, open_source
        from hebasr_jax.data.splits import hold_out, overlapping, write_long, write_split

        if not self.hours > 0 or not (self.long_s is None or self.long_s > 0):
            raise UserError("--hours and --long-s must be positive")
        source = Source(
            Path(self.source).stem,
            self.source,
            split=self.split,
            columns=self.columns,
            schema=self.schema,
            accept_licence=self.accept_licence,
        )
        clip_set = open_source(source)
        _say(describe(clip_set))
        barred = overlapping(self.overlap)
        split = hold_out(clip_set.clips, self.by, self.hours, seed=self.seed, barred=barred)
        told = write_split(self.out, clip_set, split, self.by, barred)
        for side in ("dev", "train"):
            counts = ", ".join(
                f"{told[side][name]:,} {name}s"
                for name in ("recording", "speaker", "source")
                if told[side][name]
            )
            _say(f"{side}: {told[side]['clips']:,} clips, {told[side]['hours']:,.2f} h, {counts}")
        if told["barred"]:
            _say(f"{told['barred']:,} clips overlap a test set and are on neither side")
        if told["unnamed"]:
            _say(f"{told['unnamed']:,} clips name no {' or '.join(self.by)}: all are in training")
        if self.long_s is not None:
            rows = write_long(self.out, clip_set, split.held_out, self.long_s)
            hours = sum(row["duration_s"] for row in rows) / 3600
            _say(f"{self.out}/dev_long.jsonl: {len(rows):,} long recordings, {hours:.2f} h")
        return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

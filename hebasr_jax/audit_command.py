"""The command `audit`: its flags, and what it tells. Light to import: see `data/audit.py`."""

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from hebasr_jax.data.prepare_command import progress
from hebasr_jax.errors import UserError
from hebasr_jax.flags import given, refuse_unread
from hebasr_jax.hypotheses import read_texts
from hebasr_jax.run_config import Columns, Source

_STOP = 3
_OF_SOURCE = {"source", "name", "split", "columns", "schema"}  # flags that --config does not read


@dataclass(frozen=True)
class Audit:
    """Decodes every clip of a set, lists what to leave out, and says whether to go on.

    Writes removed.jsonl (for `without` of a set), audit.json and card.html. Exit code 3: more
    than 15 % of the sampled texts do not fit their sound.
    """

    out: Path
    """folder to write to; with --config OUT/train/NAME and OUT/dev/NAME"""
    config: Path | None = None
    """config file whose training and dev sets are audited"""
    source: str | None = None
    """instead of a config: a manifest, a parquet file, a folder or glob of them, or shards"""
    name: str | None = None
    """name of the set that --source gives"""
    split: str | None = None
    """only rows of --source whose split says so"""
    columns: Columns = field(default_factory=Columns)
    """names of the columns or fields of --source"""
    schema: str = ""
    """hub set that --source is a copy of, such as crowd-transcribe-v5; "": none"""
    accept_licence: bool = False
    """read sets, of --schema or a config, whose licence is non-commercial or not stated"""
    second: Path | None = None
    """another transcript: JSONL with `id` and `text` in each line. The verdict is by it where it
    has at least half of a set's texts"""
    min_quality: float | None = None
    """remove clips with a lower quality score, or none"""
    sample: int = 400
    """clips whose text is compared with the sound for the verdict"""
    seed: int = 0
    """of that sample"""
    threads: int = 4
    """clips decoded at a time"""

    def run(self) -> int:
        from hebasr_jax.data.adapters import filled
        from hebasr_jax.data.audit import Limits, audit_set
        from hebasr_jax.data.audit_card import refuse_set, told, told_change, write_audit
        from hebasr_jax.data.normalize import effect
        from hebasr_jax.data.sources import describe, open_source
        from hebasr_jax.writers import check_folder

        if self.sample < 1 or self.threads < 1 or self.seed < 0:
            raise UserError("--sample and --threads must be positive, --seed not negative")
        second = read_texts(self.second) if self.second else None
        sources, stop = self._sources(), False
        for folder in sources:
            refuse_set(folder)
            check_folder(folder)
        for folder, source in sources.items():
            clip_set = open_source(source)
            _say(describe(clip_set))
            known = second
            if self.config and second and not any(c.id in second for c in clip_set.clips):
                _say(f"{source.name}: {self.second} has none of its clips: judged without it")
                known = None
            total_s = sum(clip.duration_s for clip in clip_set.clips)
            with progress(clip_set.name, total_s) as advance:
                audit = audit_set(
                    clip_set,
                    Limits(min_quality=self.min_quality),
                    second=known,
                    sample=self.sample,
                    seed=self.seed,
                    threads=self.threads,
                    advance=advance,
                )
            came = open_source(replace(source, normalizer="")) if source.normalizer else clip_set
            change = effect({clip.id: clip.text for clip in came.clips})
            write_audit(audit, filled(source), folder, change)
            for line in [*told_change(source.name, change), *told(audit)]:
                _say(line)
            stop |= audit.verdict.decision == "stop"
        return _STOP if stop else 0

    def _sources(self) -> dict[Path, Source]:
        """Each set and the folder for its files."""
        if (self.config is None) == (self.source is None):
            raise UserError("give --config, or --source and --name", "one of them is needed")
        if self.source is not None:
            if not self.name:
                raise UserError("--source needs --name", do="--name crowd")
            source = Source(
                self.name,
                self.source,
                split=self.split,
                columns=self.columns,
                schema=self.schema,
                accept_licence=self.accept_licence,
            )
            return {self.out: source}
        from hebasr_jax.config_file import load_config

        assert self.config is not None
        refuse_unread(self, given(self).keys() - _OF_SOURCE, "--config")
        data = load_config(self.config).config.data
        sets = {"train": data.train, "dev": data.dev}
        folders = {
            self.out / use / source.name: replace(
                source, accept_licence=source.accept_licence or self.accept_licence
            )
            for use in sets
            for source in sets[use]
        }
        for source in folders.values():
            if not re.fullmatch(r"[^\W.][^/\\\0]*", source.name):
                raise UserError(f"set {source.name!r} cannot name a folder")
        if not folders:
            raise UserError(f"{self.config}: has no set in data.train or data.dev")
        return folders


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""The command `panel`: its flags, and what it tells. Light to import: see `data/panel.py`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Source

if TYPE_CHECKING:
    from hebasr_jax.data.panel import Part

Row = dict[str, object]


@dataclass(frozen=True)
class Panel:
    """Makes the dev panel, by which checkpoints, mixes and decoding are chosen: one dev set for
    each kind of test set, held out of the training sets by source, recording or speaker.

    Reads sets that `hebasr prepare` made. Writes dev sets, and for each training set the list of
    what must not be trained on, where the recipes of configs/ look for them. The same command
    gives the same bytes. A set of the config that is not there is left out, and told; but a panel
    that has it is not replaced by one without.
    """

    config: Path | None = None
    """config file whose training and dev sets the panel is made of, known by their schema"""
    sets: tuple[str, ...] = ()
    """instead of a config: SCHEMA=PATH, such as crowd-transcribe-v5=data/crowd"""
    out: Path = Path("data/panel")
    """folder of the panel; one that is there is replaced"""
    by: tuple[str, ...] = ()
    """SCHEMA=FIELD: hold out by recording, speaker, source, or block (100 neighbouring rows, for
    a set that names none of them)"""
    overlap: tuple[Path, ...] = ()
    """overlap.json of `hebasr evaluate`: those clips are on neither side"""
    accept_licence: bool = False
    """use sets whose licence is non-commercial or not stated"""
    seed: int = 0
    """of what is held out"""

    def run(self) -> int:
        from hebasr_jax.data.panel import MEMBERS, build, is_barred, request_of, rows_of, schemas_of
        from hebasr_jax.data.prepare_command import progress
        from hebasr_jax.data.splits import overlapping

        barred, by = overlapping(self.overlap), self._by()
        train, dev = self._given()
        parts: dict[str, Part] = {}
        for schema in dict.fromkeys(member.schema for member in MEMBERS):
            part = self._part(schema, train, dev, by, barred)
            if part is not None:
                parts[schema] = part
        if not parts:
            raise UserError(
                "no set of the panel is there",
                "it is made of " + ", ".join(dict.fromkeys(m.schema for m in MEMBERS)),
                "First `hebasr prepare --config FILE`, or give --sets SCHEMA=PATH.",
            )
        rows = rows_of(self.out, request_of(parts, barred))
        if rows is None:
            if not barred and is_barred(self.out):
                raise UserError(
                    f"{self.out}: the panel there was made with --overlap, which is not given",
                    "clips that overlap the test sets would be trained on again",
                    "Give --overlap as then, another --out, or remove the panel first.",
                )
            if lost := schemas_of(self.out) - set(parts):
                raise UserError(
                    f"{self.out}: the panel there has {', '.join(sorted(lost))}, this one has not",
                    "a partial panel does not replace a fuller one",
                    "Give that set as well, another --out, or remove the panel first.",
                )
            stitched = [
                (part.clip_set.clips, indices)
                for part in parts.values()
                for member, indices in part.members
                if member.length_s is not None
            ]
            total_s = sum(clips[i].duration_s for clips, indices in stitched for i in indices)
            with progress("panel", total_s) as advance:
                rows = build(self.out, parts, barred, advance)
        else:
            _say(f"{self.out}: is there, of the same sets, and is left as it is")
        self._tell(rows, train)
        return 0

    def _given(self) -> tuple[list[Source], list[Source]]:
        """Training and dev sets, as they are before any list of this panel."""
        from hebasr_jax.data.adapters import find_adapter

        if (self.config is None) == (not self.sets):
            raise UserError("give --config, or --sets SCHEMA=PATH", "one of them is needed")
        if self.config is None:
            pairs = [_pair("--sets", word) for word in self.sets]
            sources = [Source(find_adapter(name).name, path, schema=name) for name, path in pairs]
            return sources, []
        from hebasr_jax.config_file import load_config

        data = load_config(self.config).config.data
        return list(data.train), list(data.dev)

    def _by(self) -> dict[str, tuple[str, ...]]:
        from hebasr_jax.data.panel import BLOCK, MEMBERS
        from hebasr_jax.data.splits import FIELDS

        pairs = dict(_pair("--by", word) for word in self.by)
        fields, schemas = (*FIELDS, BLOCK), {m.schema for m in MEMBERS if m.hours is not None}
        for schema, field in pairs.items():
            if field not in fields or schema not in schemas:
                raise UserError(
                    f"--by {schema}={field} is not known",
                    f"sets are {', '.join(sorted(schemas))}; fields are {', '.join(fields)}",
                )
        return {schema: (field,) for schema, field in pairs.items()}

    def _part(
        self,
        schema: str,
        train: Sequence[Source],
        dev: Sequence[Source],
        by: dict[str, tuple[str, ...]],
        barred: Sequence[str],
    ) -> "Part | None":
        """What the panel takes of the set of a schema; None, and told, where it is not there."""
        from hebasr_jax.data.adapters import find_adapter
        from hebasr_jax.data.panel import MEMBERS, choose
        from hebasr_jax.data.sources import describe, is_there, open_source

        members = [member for member in MEMBERS if member.schema == schema]
        split = find_adapter(schema).splits[1 if members[0].hours is None else 0]
        source = _source_of(schema, split, train, dev, any_split=not self.config)
        # A path that --sets gives is opened, or is an error.
        if source is None or (self.config and not is_there(source)):
            names = " and ".join(f"{member.name} ({member.stands_for})" for member in members)
            asked = "the config has no such set" if self.config else "no --sets names it"
            path = f"{source.path} is not there" if source else asked
            _say(f"left out of the panel: {names}: made of {schema}, and {path}")
            return None
        inside = self.out.absolute()
        others = [
            w for w in source.without if inside not in Path(w).expanduser().absolute().parents
        ]
        plain = replace(
            source,
            only=None,
            without=tuple(others),
            min_quality=None,
            normalizer="",
            accept_licence=source.accept_licence or self.accept_licence,
        )
        if plain.split is None and split != find_adapter(schema).splits[0]:
            plain = replace(plain, split=split)
        clip_set = open_source(plain)
        _say(describe(clip_set))
        return choose(clip_set, schema, by.get(schema, ()), barred, self.seed)

    def _tell(self, rows: Sequence[Row], train: Sequence[Source]) -> None:
        from hebasr_jax.data.panel import MEMBERS, TRAIN_LIST

        _print_table(rows)
        lacking = [m for m in MEMBERS if m.name not in {row["member"] for row in rows}]
        if lacking:
            names = ", ".join(f"{member.name} ({member.stands_for})" for member in lacking)
            _say(f"the panel is partial: it has no {names}")
        for source in train if self.config else ():
            file = self.out / source.schema / TRAIN_LIST
            named = {Path(name).expanduser().absolute() for name in source.without}
            if source.schema and file.is_file() and file.absolute() not in named:
                _say(
                    f"warning: {self.config} trains on what the panel holds out of {source.name}: "
                    f"name {file} in its without"
                )


def _source_of(
    schema: str,
    split: str,
    train: Sequence[Source],
    dev: Sequence[Source],
    *,
    any_split: bool,
) -> Source | None:
    """The first set of a schema, of that split: where it says none, a dev set is of a dev part."""
    from hebasr_jax.data.adapters import find_adapter

    first = find_adapter(schema).splits[0]
    of_schema = [source for source in (*train, *dev) if source.schema == schema]
    named = [s for s in of_schema if any_split or (s.split or first) == split]
    return next(iter(named), None)


def _pair(flag: str, word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise UserError(f"{flag} {word}: is no pair", do=f"write {flag} crowd-transcribe-v5=...")
    return name, value


def _print_table(rows: Sequence[Row]) -> None:
    """Columns that hold something, in plain text."""
    names = [n for n in rows[0] if any(row[n] is not None for row in rows)]
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        pairs = zip(line, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in pairs).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

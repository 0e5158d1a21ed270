"""Files of one JSON object a line that only grow, so that long work goes on after any stop."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hebasr_jax.data.shard_work import writing
from hebasr_jax.data.shards import write_synced
from hebasr_jax.errors import UserError


def resume(file: Path, made_by: Mapping[str, Any], ends: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of FILE.jsonl that stay: whole groups of lines, which end at these numbers.

    What is after them, such as a torn line, is cut off. Raises UserError for what something else
    made; FILE.json says what did, and is written first.
    """
    lines, about = file.with_suffix(".jsonl"), file.with_suffix(".json")
    if not lines.exists():
        with writing(file.parent):
            write_json(about, made_by)
        return []
    then: dict[str, Any] = json.loads(about.read_bytes()) if about.is_file() else {}
    keys = [key for key in ("set", "cutting", "code", "pieces", "system") if key in made_by]
    if changed := [key for key in keys if then.get(key) != made_by[key]]:
        raise UserError(
            f"{lines}: was made by another model or of other sound ({', '.join(changed)} changed)",
            f"Then it was {then.get('name', 'not told what')}.",
            "Use what was used then, remove the file to have it made anew, or give a new --out.",
        )
    content = lines.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    stay = max(end for end in ends if end <= len(whole))
    if (size := sum(map(len, whole[:stay]))) < len(content):
        with writing(file.parent):
            os.truncate(lines, size)
    try:
        return [json.loads(line) for line in whole[:stay]]
    except ValueError as error:
        raise UserError(f"{lines}: is damaged", str(error), "Remove it.") from error


def append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines; they are on the disk when it returns."""
    with writing(file.parent), file.with_suffix(".jsonl").open("ab") as out:
        out.write(json_lines(rows))
        out.flush()
        os.fsync(out.fileno())


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return "".join(lines).encode("utf-8", "replace")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_synced(file, json.dumps(content, ensure_ascii=False, indent=1).encode())

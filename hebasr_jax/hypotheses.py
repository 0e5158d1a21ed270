"""What a recogniser wrote on a set, clip by clip: the lines of hypotheses.jsonl.

Texts are kept as they were written; every normalising step is done when they are scored.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hebasr_jax.errors import UserError
from hebasr_jax.run_folder import write_text


@dataclass(frozen=True)
class Hypothesis:
    """One clip of a set.

    reference, hypothesis: raw texts; either may be empty, and then it counts as empty.
    duration_s: of the audio, in seconds.
    group: what a bootstrap draws as a whole: the recording, or else the speaker; "" is the clip.
    snr_db: estimated from the audio, in dB; None where unknown.
    silent: the audio holds nothing that could be speech, so that any text is made up.
    loops: pieces whose text went round in circles and that were decoded again.
    finished: no piece met its budget of tokens; False: text may be missing.
    pieces: parts that the audio was cut into.
    audio: file that holds the clip's sound and no other, for the report's player; "" is none.
    """

    id: str
    reference: str
    hypothesis: str
    duration_s: float
    group: str = ""
    source: str = ""
    speaker: str = ""
    recording: str = ""
    snr_db: float | None = None
    silent: bool = False
    loops: int = 0
    finished: bool = True
    pieces: int = 1
    audio: str = ""


def write_hypotheses(path: Path, rows: Iterable[Hypothesis]) -> None:
    """Writes a file of one JSON object a line, whole or not at all. Raises `UserError`."""
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def read_hypotheses(path: Path) -> list[Hypothesis]:
    """The rows of a file, in its order. Unknown fields are passed over. Raises `UserError`."""
    known = {field.name for field in fields(Hypothesis)}
    rows: list[Hypothesis] = []
    try:
        for line in path.read_bytes().splitlines():
            content: dict[str, Any] = json.loads(line)
            rows.append(Hypothesis(**{key: content[key] for key in content.keys() & known}))
    except OSError as error:
        raise UserError(f"{path}: cannot be read", error.strerror or "") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}:{len(rows) + 1}: is no line of hypotheses", str(error)) from error
    return rows


def read_texts(path: Path) -> dict[str, str]:
    """A transcript by clip id, of JSONL lines {"id", "text"}. Raises UserError."""
    do = 'Each line is a JSON object such as {"id": "7", "text": "..."}.'
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read", error.strerror or "", do) from error
    texts: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            clip_id, text = row["id"], row["text"]
            if not isinstance(clip_id, str | int) or not isinstance(text, str):
                raise ValueError("id or text is no string")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: is no transcript", repr(error)[:100], do) from error
        texts[str(clip_id)] = text
    if not texts:
        raise UserError(f"{path}: has no transcript", "", do)
    return texts

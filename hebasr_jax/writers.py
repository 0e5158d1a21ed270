"""What `transcribe` writes for each file, and where."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hebasr_jax.errors import UserError
from hebasr_jax.transcribe import Recognition

Format = Literal["txt", "json"]


def render(kind: Format, path: Path, result: Recognition) -> str:
    """The content of one output file, ending with a newline."""
    if kind == "txt":
        return result.transcript.text + "\n"
    content = {
        "file": str(path),
        "duration_s": round(result.duration_s, 3),
        "language": result.transcript.language,
        "text": result.transcript.text,
        "tokens": list(result.tokens),
        "segments": [
            {
                "start_s": segment.start_s,
                "end_s": round(segment.end_s, 3),
                "text": segment.text,
                "tokens": list(segment.tokens),
            }
            for segment in result.transcript.segments
        ],
        "finished": result.finished,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def output_stems(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where each input's outputs go, without their suffix.

    Folders below the inputs' common one are kept. Inputs that differ in suffix alone keep it, so
    that a.wav and a.mp3 do not overwrite each other.
    """
    common = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    below = {path: path.absolute().relative_to(common) for path in paths}
    count = Counter(relative.with_suffix("") for relative in below.values())
    return {
        path: folder
        / (relative if count[relative.with_suffix("")] > 1 else relative.with_suffix(""))
        for path, relative in below.items()
    }


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it or nothing."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written", str(error), "free space or name another --out-dir"
        ) from None

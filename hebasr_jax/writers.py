"""What `transcribe` writes for each file, and where."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hebasr_jax.errors import UserError
from hebasr_jax.longform import LongRecognition
from hebasr_jax.subtitles import Lines, to_srt, to_tsv, to_vtt

Format = Literal["txt", "json", "srt", "vtt", "tsv"]


def render(kind: Format, result: LongRecognition, lines: Lines) -> str:
    """The content of one output file, ending with a newline."""
    if kind == "txt":
        return result.text + "\n"
    if kind == "srt":
        return to_srt(result.segments, lines)
    if kind == "vtt":
        return to_vtt(result.segments, lines)
    if kind == "tsv":
        return to_tsv(result.segments)
    content = {
        "file": os.fsencode(result.name).decode("utf-8", "replace"),
        "duration_s": round(result.duration_s, 3),
        "language": result.language,
        "text": result.text,
        "tokens": list(result.tokens),
        "segments": [
            {
                "start_s": round(segment.start_s, 3),
                "end_s": round(segment.end_s, 3),
                "text": segment.text,
                "tokens": list(segment.tokens),
            }
            for segment in result.segments
        ],
        "finished": result.finished,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def output_stems(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where each input's outputs go, without their suffix.

    Folders below the inputs' common one are kept. Inputs that differ in suffix alone keep it, so
    that a.wav and a.mp3 do not overwrite each other.
    """
    full = {path: Path(os.path.abspath(path)) for path in paths}
    common = os.path.commonpath([path.parent for path in full.values()])
    below = {path: place.relative_to(common) for path, place in full.items()}
    taken = Counter(relative.with_suffix("") for relative in below.values())
    taken.update(below.values())  # a.wav.flac must not write where a.wav does
    return {
        path: folder / (relative if taken[stem := relative.with_suffix("")] > 1 else stem)
        for path, relative in below.items()
    }


def check_folder(folder: Path) -> None:
    """Refuses a folder that cannot be written to, before hours of work are done for it."""
    why = ""
    try:
        paths = (folder, *folder.absolute().parents)
        there = next(path for path in paths if path.is_symlink() or path.exists())
        if not there.is_dir():
            why = f"{there} is no folder"
        elif not os.access(there, os.W_OK | os.X_OK):
            why = f"{there} may not be written to"
    except OSError as error:  # such as a name that is too long
        why = error.strerror or str(error)
    if why:
        raise UserError(f"{folder} cannot be written", why, "name another folder")


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it or nothing."""
    partial = path.with_name(f".partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"{path} cannot be written", why, "free space or name another --out-dir"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()

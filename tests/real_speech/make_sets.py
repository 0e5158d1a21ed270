"""The three sets of real speech as manifests with 16 kHz WAV files, from ../shared/data.

fsdd: strings of 2 to 6 digits of one speaker (in training also single ones, which are easier to
begin with), each recording once in every pass over them, with a segment for each digit.
chant: clips with a segment for each word; for training also `pieces`, runs of 1 to 4 words of
the same clips, since a small model finds no alignment in 75 minutes of whole clips.
words: clips as they are.
"""

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import soundfile
import soxr

RATE = 16000
_FOLDERS = {"fsdd": "fsdd", "chant": "he_torah_chant", "words": "he_words_aleph_with_beth"}
_DIGIT_PASSES = {"train": 6, "test": 1}  # strings are drawn anew in each pass
_PIECE_PASSES = 3
Row = dict[str, Any]


def make_sets(data: Path, folder: Path) -> dict[str, float]:
    """Writes `folder/NAME/{train,test,pieces}.jsonl` with their audio; hours of each manifest.

    Args:
      data: has the three folders of ../shared/data, each with its Parquet files.
    """
    rng = np.random.default_rng(0)
    hours = {}
    for name, source in _FOLDERS.items():
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            clips = _read(data / source / f"{split}.parquet")
            # The test part of fsdd is 250 words: the 250 of dev, used for nothing, join them.
            if name == "fsdd" and split == "test":
                clips += _read(data / source / "dev.parquet")
            if name == "fsdd":
                rows = _digit_strings(clips, _DIGIT_PASSES[split], rng, folder / name, split)
            else:
                rows = [_clip_row(clip, folder / name) for clip in clips]
            hours[f"{name}/{split}"] = _write(folder / name / f"{split}.jsonl", rows)
            if (name, split) == ("chant", "train"):
                pieces = [p for row in rows for _ in range(_PIECE_PASSES) for p in _cut(row, rng)]
                hours["chant/pieces"] = _write(folder / name / "pieces.jsonl", pieces)
    return hours


def _read(file: Path) -> list[Row]:
    """The rows of a Parquet file, each with `wave`, float32 at 16 kHz."""
    rows = pyarrow.parquet.read_table(file).to_pylist()

    def decode(row: Row) -> Row:
        wave, rate = soundfile.read(io.BytesIO(row.pop("audio")["bytes"]), dtype="float32")
        return row | {"wave": wave if rate == RATE else soxr.resample(wave, rate, RATE, "VHQ")}

    with ThreadPoolExecutor() as pool:
        return list(pool.map(decode, rows))


def _digit_strings(
    digits: Sequence[Row], passes: int, rng: np.random.Generator, folder: Path, split: str
) -> list[Row]:
    rows = []
    shortest = 2 if split == "test" else 1
    for speaker in sorted({digit["speaker"] for digit in digits}):
        mine = [digit for digit in digits if digit["speaker"] == speaker]
        for _ in range(passes):
            for string in _strings([mine[n] for n in rng.permutation(len(mine))], shortest, rng):
                row = {"id": f"{split}-{len(rows):05d}", "speaker": speaker, "language": "English"}
                row["text"] = " ".join(digit["text"] for digit in string)
                wave, starts_s = _joined(string, rng)
                row |= _save(wave, folder, row["id"])
                row["segments"] = _segments(row["text"], [*starts_s, row["duration_s"]])
                rows.append(row)
    return rows


def _strings(
    digits: Sequence[Row], shortest: int, rng: np.random.Generator
) -> Iterator[Sequence[Row]]:
    while digits:
        count = int(rng.integers(shortest, 7))
        if shortest == 2 and len(digits) - count == 1:  # no digit is left alone
            count += 1 if count < 6 else -1
        yield digits[:count]
        digits = digits[count:]


def _joined(string: Sequence[Row], rng: np.random.Generator) -> tuple[np.ndarray, list[float]]:
    """The digits with 50 to 250 ms of silence around each, and where each begins."""
    pieces, starts_s = [_silence(rng)], []
    for digit in string:
        starts_s.append(sum(map(len, pieces)) / RATE)
        pieces += [digit["wave"], _silence(rng)]
    return np.concatenate(pieces), starts_s


def _silence(rng: np.random.Generator) -> np.ndarray:
    return np.zeros(int(rng.uniform(0.05, 0.25) * RATE), np.float32)


def _clip_row(clip: Row, folder: Path) -> Row:
    """A Hebrew clip; with word times, one segment a word, each up to the next word's start."""
    row = {key: clip[key] for key in ("id", "speaker")} | {"language": "Hebrew"}
    row["text"] = clip.get("text_spoken", clip["text"])
    row |= _save(clip["wave"], folder, clip["id"])
    if "word_starts" in clip:
        row["segments"] = _segments(row["text"], [*clip["word_starts"], row["duration_s"]])
    return row


def _segments(text: str, times_s: Sequence[float]) -> list[Row]:
    """One segment a word, each up to the next word's start; the last time is the clip's end."""
    return [
        {"start_s": start_s, "end_s": end_s, "text": word}
        for word, (start_s, end_s) in zip(text.split(), pairwise(times_s), strict=True)
    ]


def _cut(row: Row, rng: np.random.Generator) -> Iterator[Row]:
    """A clip cut at random into runs of 1 to 4 words, as pieces of its audio file."""
    segments = row["segments"]
    first = 0
    while first < len(segments):
        part = segments[first : first + int(rng.integers(1, 5))]
        first += len(part)
        start_s, end_s = part[0]["start_s"], part[-1]["end_s"]
        moved = [
            {name: s[name] - start_s for name in ("start_s", "end_s")} | {"text": s["text"]}
            for s in part
        ]
        text = " ".join(segment["text"] for segment in part)
        kept = {key: row[key] for key in ("audio", "speaker", "language")}
        yield kept | {"start_s": start_s, "end_s": end_s, "text": text, "segments": moved}


def _save(wave: np.ndarray, folder: Path, name: str) -> Row:
    soundfile.write(folder / f"{name}.wav", wave, RATE, subtype="PCM_16")
    return {"audio": f"{name}.wav", "duration_s": len(wave) / RATE}


def _write(path: Path, rows: Sequence[Row]) -> float:
    """Hours of the rows, of which a piece drawn twice is one."""
    unique = {json.dumps(row, ensure_ascii=False): row for row in rows}
    path.write_text("".join(f"{line}\n" for line in unique), encoding="utf-8")
    lengths_s = [r.get("duration_s") or r["end_s"] - r["start_s"] for r in unique.values()]
    return sum(lengths_s) / 3600

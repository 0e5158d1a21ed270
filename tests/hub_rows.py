"""Local copies of known hub sets: parquet rows as documented, each with a tone of its own."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from hebasr_jax.data.clips import ClipSet
from hebasr_jax.run_config import Source

RATE = 16_000


def tone(number: int, seconds: float = 1.0) -> np.ndarray:
    """Another pitch for each number, so that no sound is taken for another."""
    time_s = np.arange(round(seconds * RATE)) / RATE
    return 0.3 * np.sin(2 * np.pi * (200 + 100 * number) * time_s)


def sound(number: int, seconds: float = 1.0, kind: str = "FLAC") -> dict:
    file = io.BytesIO()
    soundfile.write(file, tone(number, seconds), RATE, format=kind)
    return {"bytes": file.getvalue(), "path": f"{number}.{kind.lower()}"}


def pitch_hz(wave: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(wave)).argmax()) * RATE / len(wave)


def write(folder: Path, schema: str, rows: list[dict], split: str = "train", **of_sound) -> Source:
    """A parquet file with these rows and a tone for each; the source that reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"audio": sound(number, **of_sound)} | row for number, row in enumerate(rows)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", row_group_size=2)
    return Source("set", str(folder), schema=schema, accept_licence=True)


def check_sounds(clip_set: ClipSet, numbers: list[int], lengths_s: list[float]) -> None:
    """The clips sound like the tones of these rows, and are as long as they say."""
    for index, (number, length_s) in enumerate(zip(numbers, lengths_s, strict=True)):
        wave = clip_set.read(index)
        assert len(wave) == round(length_s * RATE)
        assert abs(pitch_hz(wave) - (200 + 100 * number)) < 3
        assert clip_set.clips[index].duration_s == pytest.approx(length_s)


FLAGS = {"noisy", "multiple_speakers", "foreign_language", "unintelligible", "too_long", "skipped"}


def crowd(number: int, text: str | None = None, *flags: str, **fields) -> dict:
    extra = {"duration": 1.0} | {flag: flag in flags for flag in sorted(FLAGS)}
    return {
        "uuid": f"u{number}",
        "sentence": f"משפט {number}" if text is None else text,
        "orig_sentence": "טיוטה",
        "is_retranscribe": False,
        "transcriber": "t1",
        "extra_data": extra,
    } | fields


def a_slice(seek_s: float, transcript: str | None, prev: str | None = None, **meta) -> dict:
    told = {"seek": seek_s, "duration": 6.0, "source": "plenum", "entry_id": "s1"}
    return {
        "transcript": transcript,
        "metadata": told | {"quality_score": 0.9} | meta,
        "has_prev": prev is not None,
        "prev_transcript": prev or "",
        "has_timestamps": True,
    }


FIRST = "<|0.00|>שלום לכולם<|2.00|><|2.50|>אני פותח<|4.00|>"

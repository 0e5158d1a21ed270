"""The sounds of a set's clips: where each lies, and how it is read, here or in another process."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.decode import as_file, read_piece, read_sound, sound_duration_s
from hebasr_jax.data.parquet import AudioColumn
from hebasr_jax.data.rows import Place
from hebasr_jax.data.shards import SUFFIX, shard_reader


@dataclass(frozen=True, eq=False)
class Sounds:
    """Called with a clip's index, gives its int16 samples at 16 kHz; raises `BadClip`.

    Thread-safe. `part` gives a small one of some clips, which another process can be sent.

    places: where each clip's audio lies. durations_s: seconds expected there.
    parquet: reads their column of audio in parquet files.
    """

    places: Sequence[Place]
    durations_s: Sequence[float]
    parquet: AudioColumn

    def __call__(self, index: SupportsIndex) -> np.ndarray:
        place, duration_s = self.places[at := operator.index(index)], self.durations_s[at]
        if place.row is None:
            return _read_file(place.file, place, duration_s)
        if place.file.suffix == SUFFIX:
            return self._record(place.file, place.row, place.name)
        with as_file(self.parquet.read(place.file, place.row, place.name)) as file:
            return _read_file(file, place, duration_s)

    def part(self, indices: Sequence[int]) -> "Sounds":
        places = [self.places[index] for index in indices]
        return Sounds(places, [self.durations_s[index] for index in indices], self.parquet)

    def moved(self, files: Mapping[Path, Path]) -> "Sounds":
        """The same sounds, where files of theirs lie elsewhere."""
        places = [replace(place, file=files.get(place.file, place.file)) for place in self.places]
        return Sounds(places, self.durations_s, self.parquet)

    def measure(self, index: int) -> float:
        """How many seconds are there. Raises `BadClip`."""
        place = self.places[index]
        if place.row is None:
            return sound_duration_s(place.file, place.name)
        if place.file.suffix == SUFFIX:
            return len(self(index)) / SAMPLE_RATE
        with as_file(self.parquet.read(place.file, place.row, place.name)) as file:
            return sound_duration_s(file, place.name)

    # Opened at the first use, so that a part not yet read holds nothing that cannot be sent.
    @functools.cached_property
    def _record(self) -> Callable[[Path, int, str], np.ndarray]:
        return shard_reader()


def _read_file(file: Path, place: Place, duration_s: float) -> np.ndarray:
    if place.piece:
        return read_piece(file, *place.piece, place.name)
    return read_sound(file, duration_s, place.name)

"""Mutated sound files through every reader: sound or a refusal in five seconds, nothing else.

`python tests/mutants.py FOLDER COUNT SEED`, with whole files named a.* in FOLDER. A reader that
takes longer ends the process by SIGALRM; any other fault by its own trace. Prints counts as JSON.
"""

import json
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.audio import read_audio
from hebasr_jax.data.clips import BadClip
from hebasr_jax.data.decode import read_piece, read_sound, sound_duration_s
from hebasr_jax.data.sources import open_source
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Source

LIMIT_S = 5
LENGTH_S = 0.7  # of the whole files
READERS: dict[str, Callable[[Path], Any]] = {
    "audio": lambda file: read_audio(file, max_seconds=20),
    "sound": lambda file: read_sound(file, LENGTH_S, "x"),
    "piece": lambda file: read_piece(file, 0.1, 0.4, "x"),
    "duration": lambda file: sound_duration_s(file, "x"),
}
HEAD = {".parquet": 3000}  # bytes of the part that describes the rest; parquet has it at the end


def read_set(file: Path) -> np.ndarray:
    """All clips of a parquet file that can be read; none is a refusal."""
    clips, waves = open_source(Source("mutant", str(file))), []
    for index in range(len(clips.clips)):
        try:
            waves.append(clips.read(index))
        except BadClip as error:
            refusal = error
    if not waves:
        raise refusal
    return np.concatenate(waves)


def mutant(data: np.ndarray, rng: np.random.Generator, head: int) -> np.ndarray:
    """Bytes changed, set to limits, put in, cut out or moved, in the head or anywhere."""
    span = min(len(data), head) if rng.integers(2) else len(data)
    count, how = int(rng.integers(1, 10)), rng.integers(5)
    at = rng.integers(0, span, count)
    first, last = sorted(rng.integers(0, len(data), 2))
    if how < 2:
        data = data.copy()
        data[at] = rng.choice([0, 127, 128, 255], count) if how else rng.integers(0, 256, count)
        return data
    if how == 2:
        put = rng.integers(0, 256, count, dtype=np.uint8)
        return np.concatenate([data[: at[0]], put, data[at[0] :]])
    if how == 3:
        return np.concatenate([data[:first], data[last:]])
    return np.concatenate([data[:last], data[first:]])


def check(made: Any) -> None:
    """What a reader gave is sound within its bounds, or a length."""
    if isinstance(made, float):
        assert made > 0
        return
    assert made.ndim == 1
    assert 0 < len(made) <= 20 * 16_000 + 1
    assert made.dtype == np.int16 or np.abs(made).max() <= 1


def main(folder: Path, count: int, seed: int) -> dict[str, Any]:
    sources = {file.suffix: file.read_bytes() for file in sorted(folder.glob("a.*"))}
    rng, slowest_s = np.random.default_rng(seed), 0.0
    told = {name: {"read": 0, "refused": 0} for name in [*READERS, "set"]}
    for turn in range(count):
        suffix = list(sources)[turn % len(sources)]
        file = folder / f"mutant{suffix}"
        data, at_end = np.frombuffer(sources[suffix], np.uint8), -1 if suffix in HEAD else 1
        changed = mutant(data[::at_end], rng, HEAD.get(suffix, 200))[::at_end]
        file.write_bytes(changed.tobytes())
        for name, reader in {"set": read_set}.items() if suffix in HEAD else READERS.items():
            start = time.perf_counter()
            signal.alarm(LIMIT_S)
            try:
                check(reader(file))
                told[name]["read"] += 1
            except (UserError, BadClip) as error:
                if len(str(error).splitlines()) > 3:
                    raise
                told[name]["refused"] += 1
            signal.alarm(0)
            slowest_s = max(slowest_s, time.perf_counter() - start)
    # Not ru_maxrss, which has the parent's as well.
    peak_kib = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak_kib
    peak_mib = int(peak_kib[1]) // 1024
    return {"readers": told, "slowest_s": round(slowest_s, 3), "peak_mib": peak_mib}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))

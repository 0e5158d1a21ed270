"""The mix of lengths as shards on disk, and the config of a run that reads them."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from hebasr_jax.bench import work
from hebasr_jax.data.prepare import plan_set, prepare_set
from hebasr_jax.run_config import Augment, Computation, Config, Data, Model, Source

_SHARD_MB = 256.0


def write_mix(folder: Path, audio_s: float, kind: Literal["pcm", "flac"] = "pcm") -> float:
    """Shards of the mix, at least so many seconds; returns how many they are."""
    seconds_C = work.ivrit_mix(int(audio_s / 8) + 64, seed=0)
    seconds_C = seconds_C[: int(np.searchsorted(np.cumsum(seconds_C), audio_s)) + 1]
    clips = work.made_up_set(seconds_C.tolist(), seed=0)
    prepare_set(clips, folder, plan_set(clips, kind, _SHARD_MB))
    return float(seconds_C.sum())


def drop_from_cache(folder: Path) -> None:
    """Lets the system forget what it holds of the files, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def mix_config(
    model: Path,
    shards: Path,
    step_audio_s: float,
    buckets: int,
    augment: Augment,
    compute: Computation,
) -> Config:
    """A run over the mix: batches by seconds of padded audio, no clips joined unless replaced."""
    data = Data(
        train=(Source("mix", str(shards)),),
        batch_clips=None,
        batch_audio_s=step_audio_s,
        buckets=buckets,
        threads=min(16, os.cpu_count() or 1),
    )
    return Config(model=Model(str(model)), data=data, augment=augment, compute=compute)

"""The data path alone: shards on disk to batches in memory, with no device behind it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.bench import work
from hebasr_jax.bench.figures import Row
from hebasr_jax.bench.shards import drop_from_cache, mix_config, write_mix
from hebasr_jax.config import ModelConfig
from hebasr_jax.data.pipeline import make_feed, stream
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.data.sources import open_sources
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Augment, Computation
from hebasr_jax.text import load_tokenizer

_STEP_S = 960.0
_WARM_UP = 4  # batches: threads and caches of the tokenizer are there then


def fed(
    model: ModelConfig, folder: Path, audio_s: float, threads: int, say: Callable[[str], None]
) -> Iterator[Row]:
    """Batches of the mix from shards of either kind, read from the disk, then from memory."""
    if audio_s < 2 * _WARM_UP * _STEP_S:
        raise UserError(f"--audio-s {audio_s:g} is too little to measure", do="give 10000 or more")
    work.write_model_files(model, folder)
    kinds: tuple[Literal["pcm", "flac"], ...] = ("pcm", "flac")
    for kind in kinds:
        start = time.perf_counter()
        written_s = write_mix(folder / kind, audio_s, kind)
        say(f"{written_s:,.0f} s of {kind} written in {time.perf_counter() - start:.1f} s")
        drop_from_cache(folder / kind)
        for cache in ("cold", "warm"):
            yield _read(folder, kind, cache, threads)


def _read(folder: Path, kind: str, cache: str, threads: int) -> Row:
    config = mix_config(folder, folder / kind, _STEP_S, 6, Augment(), Computation())
    config = replace(config, data=replace(config.data, threads=threads))
    quarantine = Quarantine(folder / "quarantine.jsonl", 0.01, 1 << 20)
    tokenizer = load_tokenizer(folder)
    feed = make_feed(open_sources(config.data.train), tokenizer, config, quarantine)
    with stream(feed, epochs=1) as batches:
        for _ in range(_WARM_UP):
            next(batches)
        start, samples, count = time.perf_counter(), 0, 0
        for item in batches:
            samples += int(item.data.samples_B.sum())
            count += 1
        taken_s = time.perf_counter() - start
    return {
        "shards": kind,
        "cache": cache,
        "threads": threads,
        "batches": count,
        "audio-s/s": samples / SAMPLE_RATE / taken_s,
    }

"""MP3 clips in parquet files to shards: what `hebasr prepare` does, by processes and format."""

import io
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE, expand_inputs, read_audio
from hebasr_jax.bench import work
from hebasr_jax.bench.figures import Row
from hebasr_jax.bench.shards import drop_from_cache
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.sources import open_source
from hebasr_jax.data.workers import cores
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source

_DISTINCT = 400  # clips; a longer set repeats them, which saves only the time to make it
_FILE_CLIPS = 2000
_GROUP_CLIPS = 100
_GAIN_DB = (-30.0, 0.0)
_LEAST_SHARDS = 8  # for each process, so that none waits long for the last
_SHARD_MB = 512.0  # as `hebasr prepare` has it
_LONGEST_S = 3600.0  # of a file of --source
RECIPE_H, RECIPE_CORES = 5050, 64  # of the recipe's audio; of a machine that is not here


def shards_made(
    folder: Path,
    audio_s: float,
    jobs: Sequence[int],
    source: Path | None,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """A row for each format and number of processes, from files that are not in memory.

    The hours are 5,050 h at 64 times the speed of a core: an extrapolation, which holds while the
    disks of that machine take what the last column says. Raises UserError for too little audio.
    """
    jobs = jobs or sorted({1, cores()})
    if audio_s < 600:
        raise UserError(f"--audio-s {audio_s:g} is too little to measure", do="give 600 or more")
    start = time.perf_counter()
    clips, total_s = write_clips(folder / "clips", audio_s, source)
    size = sum(file.stat().st_size for file in (folder / "clips").iterdir())
    told = f"{clips} MP3 clips of {total_s:,.0f} s, {size / 1e6:,.0f} MB"
    say(f"{told}, made in {time.perf_counter() - start:.0f} s")
    kinds: tuple[Literal["pcm", "flac"], ...] = ("pcm", "flac")
    for kind in kinds:
        for count in jobs:
            yield _made(folder, kind, count, clips, total_s)


def _made(
    folder: Path, kind: Literal["pcm", "flac"], processes: int, clips: int, total_s: float
) -> Row:
    drop_from_cache(folder / "clips")
    shard_mb = min(_SHARD_MB, total_s * 2 * SAMPLE_RATE / 1e6 / (_LEAST_SHARDS * processes))
    prepare = Prepare(
        folder / kind,
        source=str(folder / "clips"),
        name="mix",
        columns=Columns(duration_s="seconds"),
        format=kind,
        shard_mb=shard_mb,
        processes=processes,
    )
    start, start_cpu_s = time.perf_counter(), _cpu_s()
    prepare.run()
    taken_s, cpu_s = time.perf_counter() - start, _cpu_s() - start_cpu_s
    made = open_source(Source("mix", str(folder / kind / "mix")))
    if len(made.clips) != clips:
        raise UserError(f"{len(made.clips)} of {clips} clips are in the shards", "this is a fault")
    written = sum(file.stat().st_size for file in (folder / kind / "mix").iterdir())
    shutil.rmtree(folder / kind)
    of_a_core = total_s / taken_s / min(processes, cores())
    hours = RECIPE_H / (of_a_core * RECIPE_CORES)
    return {
        "shards": kind,
        "processes": processes,
        "audio-s/s": total_s / taken_s,
        "a core": of_a_core,
        "a cpu-s": total_s / cpu_s,
        "real time": taken_s / total_s,
        f"h for {RECIPE_H} h on {RECIPE_CORES}": hours,
        "GB/s written then": written / total_s * RECIPE_H * 3600 / (hours * 3600) / 1e9,
    }


def _cpu_s() -> float:
    """Seconds of all cores, of this process and of children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def write_clips(folder: Path, audio_s: float, source: Path | None) -> tuple[int, float]:
    """Parquet files of MP3 clips at 16 kHz; returns how many, and their seconds.

    Lengths are those of the mix, the level of each differs by up to 30 dB, texts are digits. The
    sound is noise, or that of the audio files of `source`, cut one behind the other. Seeded.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    clips = _clips(source)
    rows: list[dict[str, Any]] = []
    count, total_s = 0, 0.0
    while total_s < audio_s:
        sound, seconds = clips[count % len(clips)]
        text = "1" * (work.target_tokens(seconds) - 1)
        rows.append({"audio": {"bytes": sound, "path": f"{count}.mp3"}, "text": text})
        rows[-1] |= {"id": str(count), "seconds": seconds}
        count, total_s = count + 1, total_s + seconds
        if len(rows) == _FILE_CLIPS or total_s >= audio_s:
            file = folder / f"train-{count:08d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=_GROUP_CLIPS)
            rows.clear()
    return count, total_s


def _clips(source: Path | None) -> list[tuple[bytes, float]]:
    """MP3 bytes and seconds of the distinct clips."""
    import soundfile

    rng = np.random.default_rng(0)
    samples_C = np.round(work.ivrit_mix(_DISTINCT, seed=0) * SAMPLE_RATE).astype(int)
    wave_S = _speech(source, int(samples_C.sum())) if source else None
    made, at = [], 0
    for samples in samples_C:
        if wave_S is None:
            wave = work.noise(rng, int(samples)).astype(np.float32) / 32768
        else:
            wave = np.take(wave_S, np.arange(at, at + samples), mode="wrap")
            at += samples
        file = io.BytesIO()
        gain = 10 ** (rng.uniform(*_GAIN_DB) / 20)
        soundfile.write(file, gain * wave, SAMPLE_RATE, format="MP3")
        made.append((file.getvalue(), samples / SAMPLE_RATE))
    return made


def _speech(source: Path, samples: int) -> np.ndarray:
    waves, length = [], 0
    for file in expand_inputs([str(source)]):
        waves.append(read_audio(file, max_seconds=_LONGEST_S))
        length += len(waves[-1])
        if length >= samples:
            break
    return np.concatenate(waves)

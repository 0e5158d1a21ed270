"""How often copies are found, and how often what is none: the tables of docs/evaluation.md.

python -m tests.fingerprint_tables --data ../shared/data

False positives: every pair of different clips of a set. Detection: pieces cut anywhere out of a
set's clips joined to one recording, each altered, looked for in that recording.
"""

import argparse
import io
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soxr

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import ClipSet
from hebasr_jax.data.fingerprint import MIN_SHARE, build_index, find_copies, fingerprint
from hebasr_jax.data.sources import open_source
from hebasr_jax.run_config import Source

SETS = (
    "he_torah_chant",
    "he_synth_espeak",
    "he_words_aleph_with_beth",
    "he_words_gcompris",
    "fsdd",
)
LENGTHS_S = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


def to_int16(wave: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1], clipped there."""
    return np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)


def gain(wave: np.ndarray, gain_db: float) -> np.ndarray:
    return to_int16(wave / 32768 * 10 ** (gain_db / 20))


def through_rate(wave: np.ndarray, rate: int) -> np.ndarray:
    """Resampled to another rate and back."""
    there = soxr.resample(wave / 32768, SAMPLE_RATE, rate)
    return to_int16(soxr.resample(there, rate, SAMPLE_RATE))


def through_codec(wave: np.ndarray, codec: str, container: str, bits_per_s: int) -> np.ndarray:
    """Encoded and decoded by ffmpeg at a constant bit rate; Opus by way of 48 kHz."""
    import av

    rate = 48_000 if codec == "libopus" else SAMPLE_RATE
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, bit_rate=bits_per_s, layout="mono")
        given = to_int16(soxr.resample(wave / 32768, SAMPLE_RATE, rate))
        frame = av.AudioFrame.from_ndarray(given[None], format="s16", layout="mono")
        frame.sample_rate = rate
        for part in (frame, None):
            out.mux(stream.encode(part))
    with av.open(io.BytesIO(buffer.getvalue())) as back:
        to_mono = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        frames = [*back.decode(audio=0), None]
        parts = [part.to_ndarray()[0] for frame in frames for part in to_mono.resample(frame)]
    return np.concatenate(parts)


def add_noise(wave: np.ndarray, snr_db: float) -> np.ndarray:
    scale = np.sqrt(np.mean(np.square(wave / 32768)) / 10 ** (snr_db / 10))
    return to_int16(wave / 32768 + scale * np.random.default_rng(0).normal(size=len(wave)))


Alteration = Callable[[np.ndarray], np.ndarray]
ALTERATIONS: dict[str, Alteration] = {
    "MP3, 64 kbit/s": lambda wave: through_codec(wave, "libmp3lame", "mp3", 64_000),
    "Opus, 64 kbit/s": lambda wave: through_codec(wave, "libopus", "ogg", 64_000),
    "+6 dB": lambda wave: gain(wave, 6),
    "-6 dB": lambda wave: gain(wave, -6),
    "0.3 s later": lambda wave: np.pad(wave, (round(0.3 * SAMPLE_RATE), 0)),
    "8 kHz and back": lambda wave: through_rate(wave, 8000),
    "22.05 kHz and back": lambda wave: through_rate(wave, 22_050),
    "44.1 kHz and back": lambda wave: through_rate(wave, 44_100),
    "noise at 20 dB": lambda wave: add_noise(wave, 20),
    "Opus, 16 kbit/s": lambda wave: through_codec(wave, "libopus", "ogg", 16_000),
    "noise at 10 dB": lambda wave: add_noise(wave, 10),
}


def found(recording: np.ndarray, pieces: dict[float, np.ndarray], alter: Alteration) -> list[bool]:
    """Whether each piece of a recording, by its start in seconds, is found where it was cut."""
    index = build_index([fingerprint(recording)])
    answers = []
    for start_s, piece in pieces.items():
        matches = find_copies(index, fingerprint(alter(piece)))
        shifts_s = [match.start_s - match.other_start_s for match in matches]
        answers.append(any(abs(shift_s - start_s) < 0.4 for shift_s in shifts_s))
    return answers


def cut(wave: np.ndarray, length_s: float, count: int, seed: int) -> dict[float, np.ndarray]:
    """Pieces at places drawn to the sample, by their start in seconds."""
    samples = round(length_s * SAMPLE_RATE)
    starts = np.random.default_rng(seed).integers(len(wave) - samples, size=count)
    return {start / SAMPLE_RATE: wave[start : start + samples] for start in starts.tolist()}


def detection_table(recordings: list[np.ndarray], count: int) -> list[str]:
    lines = ["| alteration | " + " | ".join(f"{length:g} s" for length in LENGTHS_S) + " |"]
    lines.append("|---" * (len(LENGTHS_S) + 1) + "|")
    for name, alter in ALTERATIONS.items():
        cells = []
        for length_s in LENGTHS_S:
            answers = [
                answer
                for seed, wave in enumerate(recordings)
                for answer in found(wave, cut(wave, length_s, count, seed), alter)
            ]
            cells.append(f"{100 * np.mean(answers):.1f} %")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def false_positive_table(sets: list[ClipSet]) -> list[str]:
    """Pairs of different clips, of one set and of all, that are taken for copies of each other."""
    shares = (0.65, 0.70, MIN_SHARE, 0.80)
    lines = ["| set | clips | pairs | " + " | ".join(f"at {share:.2f}" for share in shares) + " |"]
    lines.append("|---" * (3 + len(shares)) + "|")
    prints = {s.name: [fingerprint(s.read(i)) for i in range(len(s.clips))] for s in sets}
    prints["all together"] = [part for parts in prints.values() for part in parts]
    for name, parts in prints.items():
        parts = [part for part in parts if not part.too_short]
        index = build_index(parts)
        scores: dict[tuple[int, int], float] = {}
        for number, part in enumerate(parts):
            for match in find_copies(index, part, shares[0]):
                if match.clip != number:
                    pair = min(match.clip, number), max(match.clip, number)
                    scores[pair] = max(scores.get(pair, 0.0), match.score)
        counts = [sum(score >= share for score in scores.values()) for share in shares]
        pairs = len(parts) * (len(parts) - 1) // 2
        lines.append(f"| {name} | {len(parts):,} | {pairs:,} | {' | '.join(map(str, counts))} |")
    return lines


def speed_lines(wave: np.ndarray) -> list[str]:
    """Sound looked for in an index of ten hours of other sound, by one core's processor time.

    Other sound: the same at other speeds, where no alignment holds for long.
    """
    hours = len(wave) / SAMPLE_RATE / 3600
    start = time.process_time()
    own = fingerprint(wave)
    made_s = time.process_time() - start
    speeds = itertools.takewhile(lambda k: k * hours < 10, itertools.count())
    others = [soxr.resample(wave, 100, 70 + 10 * k + 10 * (k > 2)) for k in speeds]
    index = build_index(fingerprint(other) for other in others)
    indexed_h = sum(map(len, others)) / SAMPLE_RATE / 3600
    size = sum(array.nbytes for array in vars(index).values())
    start = time.process_time()
    find_copies(index, own)
    found_s = time.process_time() - start
    return [
        f"fingerprint: {3600 * hours / made_s:,.0f} audio-s/s; search in {indexed_h:.1f} h: "
        f"{3600 * hours / found_s:,.0f} audio-s/s; index: {size / indexed_h / 1e6:.2f} MB an hour"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pieces", type=int, default=100, help="of each set, length, alteration")
    given = parser.parse_args()
    sets = [open_source(Source(name, str(given.data / name / "manifest.jsonl"))) for name in SETS]
    recordings = [
        np.concatenate([clip_set.read(i) for i in range(len(clip_set.clips))]) for clip_set in sets
    ]
    for table in (
        speed_lines(recordings[0]),
        false_positive_table(sets),
        detection_table([wave[: 600 * SAMPLE_RATE] for wave in recordings], given.pieces),
    ):
        print("\n".join(table), end="\n\n", flush=True)


if __name__ == "__main__":
    main()

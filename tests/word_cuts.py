"""How often cuts of joined recordings fall inside speech: `python tests/word_cuts.py`.

Chant: clips with human word onsets; eSpeak: sentences 0.1 to 0.6 s apart. A cut counts as inside
when it is 50 ms or more from both ends of a word (a sentence): the first and the last frame
within 12 dB of its loud ones, in 50-ms means.
"""

import argparse
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import soundfile

from hebasr_jax.audio import read_audio
from hebasr_jax.silence import FRAME, cut

RATE = 16_000
_EDGE = RATE // 20
Spans = list[tuple[int, int]]


def joined(
    folder: Path, splits: Sequence[str], gap_s: tuple[float, float]
) -> tuple[np.ndarray, Spans]:
    """The clips of a set, one after the other in a drawn order, and where its words lie."""
    rng = np.random.default_rng(0)
    rows = [
        row
        for s in splits
        for row in pyarrow.parquet.read_table(folder / f"{s}.parquet").to_pylist()
    ]
    parts: list[np.ndarray] = []
    spans: Spans = []
    at = 0
    for row in (rows[n] for n in rng.permutation(len(rows))):
        wave, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        starts = [round(s * RATE) for s in row.get("word_starts", [0.0])]
        spans += [(at + first, at + last) for first, last in _spoken(wave, [*starts, len(wave)])]
        gap = round(rng.uniform(*gap_s) * RATE)
        parts += [wave, np.zeros(gap, np.float32)]
        at += len(wave) + gap
    return np.concatenate(parts), spans


def _spoken(wave: np.ndarray, bounds: Sequence[int]) -> Spans:
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    level = np.convolve(10 * np.log10(frames.var(1) + 1e-10), np.ones(5) / 5, "same")
    found = []
    for first, last in itertools.pairwise(bounds):
        word = level[first // FRAME : last // FRAME]
        if len(word) > 2:
            loud = np.flatnonzero(word > np.quantile(word, 0.8) - 12) + first // FRAME
            found.append((int(loud[0]) * FRAME, int(loud[-1] + 1) * FRAME))
    return found


def ours(wave: np.ndarray, piece_s: float) -> list[int]:
    pieces = cut([wave], piece_s=piece_s, search_s=piece_s / 3)
    return [piece.start for piece in pieces][1:]


def fixed(wave: np.ndarray, piece_s: float) -> list[int]:
    return list(range(round(piece_s * RATE), len(wave), round(piece_s * RATE)))


def quietest_100_ms(wave: np.ndarray, piece_s: float) -> list[int]:
    """As qwen-asr cuts: within 5 s of the limit, the smallest |x| of the quietest 100 ms."""
    cuts = [0]
    while len(wave) - cuts[-1] > piece_s * RATE:
        first = cuts[-1] + round((piece_s - 5) * RATE)
        size = np.abs(wave[first : first + 10 * RATE])
        window = RATE // 10
        sums = np.convolve(size, np.ones(window), "valid")
        quiet = int(np.argmin(sums))
        cuts.append(first + quiet + int(np.argmin(size[quiet : quiet + window])))
    return cuts[1:]


def share_inside(cuts: Sequence[int], spans: Spans) -> float:
    first, last = np.array(spans).T
    at = np.asarray(cuts)
    span = np.searchsorted(first, at, "right") - 1
    return float(np.mean((at > first[span] + _EDGE) & (at < last[span] - _EDGE)))


def add_noise(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    noise = np.resize(noise, len(wave))
    power = np.mean(wave**2) / np.mean(noise**2) / 10 ** (snr_db / 10)
    return wave + noise * np.float32(power**0.5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    data = parser.parse_args().data
    noise = read_audio(data / "noise_rir/noise1.flac", max_seconds=600.0)
    splits = ("train", "dev", "test")
    sets = {
        "chant": (*joined(data / "he_torah_chant", splits, (0.0, 0.0)), 15.0),
        "eSpeak": (*joined(data / "he_synth_espeak", splits, (0.1, 0.6)), 10.0),
    }
    for name, (wave, spans, snr_db) in sets.items():
        noisy = add_noise(wave, noise, snr_db)
        for how, sound in (("", wave), (f", noise at {snr_db:g} dB", noisy)):
            for piece_s in (30.0, 15.0):
                shares = [
                    share_inside(rule(sound, piece_s), spans)
                    for rule in (fixed, quietest_100_ms, ours)
                ]
                cells = " | ".join(f"{100 * share:.0f} %" for share in shares)
                print(f"| {name}{how}, {piece_s:g} s | {cells} |", flush=True)


if __name__ == "__main__":
    main()

"""What is told of a set's hypotheses: its score, the same by kinds of clips, and made-up text."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from hebasr_jax.hypotheses import Hypothesis
from hebasr_jax.metrics import (
    ErrorCounts,
    align_words,
    bootstrap_interval,
    normalize_ivrit,
    score,
    word_errors,
)
from hebasr_jax.output_style import STYLE, to_reference_style

_DURATIONS_S = (5.0, 10.0, 20.0, 30.0, 60.0, 300.0)
_SNRS_DB = (0.0, 10.0, 20.0, 30.0)
_MOST_SLICES = 20
_MOST_IDS = 20
_LOOP_WORDS, _LOOP_TIMES = 10, 4
_BURST_WORDS = 5


def score_rows(
    rows: Sequence[Hypothesis], *, resamples: int, seed: int, style: bool
) -> dict[str, Any]:
    """The scores of a set, each from the raw texts.

    Args:
      style: the headline and all that follows it are of hypotheses in `to_reference_style`.

    Returns:
      what `score` gives, drawn by `row.group`; raw and raw_wer, the same of the texts as written;
      style, its name or None; audio_s, loops, unfinished, clips whose text may be cut; slices, by
      duration, source, speaker and SNR; hallucinations. What cannot be computed is NaN.
    """
    references, written = [row.reference for row in rows], [row.hypothesis for row in rows]
    groups = [row.group for row in rows]
    raw = score(references, written, groups, resamples=resamples, seed=seed)
    styled = [to_reference_style(text) for text in written] if style else written
    found = score(references, styled, groups, resamples=resamples, seed=seed) if style else raw
    ours, theirs = ([normalize_ivrit(text) for text in side] for side in (references, styled))
    counts = word_errors(ours, theirs)
    return {
        **found,
        "style": STYLE if style else None,
        "raw_wer": raw["wer"],
        "raw": raw,
        "audio_s": math.fsum(row.duration_s for row in rows),
        "loops": sum(row.loops for row in rows),
        "unfinished": sum(not row.finished for row in rows),
        "slices": _slices(rows, counts, resamples, seed),
        "hallucinations": _hallucinations(rows, ours, theirs, counts),
    }


def macro_mean(per_set: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Unweighted mean WER and CER over the sets that have both, and which of `names` do.

    Returns:
      wer, cer (NaN where no set has them), sets, missing, and complete: nothing is missing. A
      mean of a part of the benchmark is not the benchmark's and must be shown with its sets.
    """
    rates = {
        name: (found["wer"], found["cer"])
        for name in names
        if (found := per_set.get(name)) and _known(found.get("wer")) and _known(found.get("cer"))
    }
    wer, cer = (
        (math.fsum(column) / len(rates) for column in zip(*rates.values(), strict=True))
        if rates
        else (float("nan"), float("nan"))
    )
    missing = [name for name in names if name not in rates]
    complete = not missing
    return {"wer": wer, "cer": cer, "sets": list(rates), "missing": missing, "complete": complete}


def bin_names(edges: Sequence[float], unit: str) -> list[str]:
    """`under 5 s`, `5 to 10 s` (10 is in the next), ..., `300 s and more`."""
    inner = [f"{low:g} to {high:g} {unit}" for low, high in pairwise(edges)]
    return [f"under {edges[0]:g} {unit}", *inner, f"{edges[-1]:g} {unit} and more"]


def bin_name(value: float, edges: Sequence[float], unit: str) -> str:
    return bin_names(edges, unit)[bisect_right(edges, value)]


def repetitions(words: Sequence[str]) -> int:
    """How often the same 1 to 10 words follow each other at most: 3 in `yes yes yes`; 0 of none."""
    most = min(len(words), 1)
    for size in range(1, min(_LOOP_WORDS, len(words) // 2) + 1):
        same = (a == b for a, b in zip(words, words[size:], strict=False))
        longest = max((sum(1 for _ in run) for equal, run in groupby(same) if equal), default=0)
        most = max(most, longest // size + 1)
    return most


def _slices(
    rows: Sequence[Hypothesis], counts: ErrorCounts, resamples: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Scores of the rows that share a property; a set with one value of it has no such slices.

    Bins are in order, names by their words, the largest twenty; what is "" is not known.
    """
    sources, speakers = [row.source for row in rows], [row.speaker for row in rows]
    durations = [bin_name(row.duration_s, _DURATIONS_S, "s") for row in rows]
    snrs = ["" if row.snr_db is None else bin_name(row.snr_db, _SNRS_DB, "dB") for row in rows]
    kinds = {
        "duration": (durations, bin_names(_DURATIONS_S, "s")),
        "source": (sources, _largest(sources, counts)),
        "speaker": (speakers, _largest(speakers, counts)),
        "SNR": (snrs, bin_names(_SNRS_DB, "dB")),
    }
    slices = {}
    for kind, (names, wanted) in kinds.items():
        there = [name for name in wanted if name in names]
        if len(there) > 1:
            slices[kind] = [
                {"name": name, **_part(rows, counts, np.array(names) == name, resamples, seed)}
                for name in there
            ]
    return slices


def _largest(names: Sequence[str], counts: ErrorCounts) -> list[str]:
    words: Counter[str] = Counter()
    for name, length in zip(names, counts.length_N.tolist(), strict=True):
        words[name] += length
    return [name for name, _ in words.most_common() if name][:_MOST_SLICES]


def _part(
    rows: Sequence[Hypothesis], counts: ErrorCounts, chosen_N: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    errors_N, length_N = counts.errors_N[chosen_N], counts.length_N[chosen_N]
    groups = [row.group for row, chosen in zip(rows, chosen_N, strict=True) if chosen]
    words = int(length_N.sum())
    return {
        "wer": int(errors_N.sum()) / words if words else float("nan"),
        "ci95": bootstrap_interval(errors_N, length_N, groups, resamples=resamples, seed=seed),
        "words": words,
        "clips": len(groups),
    }


def _hallucinations(
    rows: Sequence[Hypothesis], ours: Sequence[str], theirs: Sequence[str], counts: ErrorCounts
) -> dict[str, dict[str, Any]]:
    """Clips with text that nobody said, by three signs; the first twenty by name.

    loops: up to ten words, four times or more in a row and more often than anything in the
    reference. insertion_bursts: five words or more inserted in a row. text_on_silence: a text
    though the clip is silent, which `silent` clips are.
    """
    loops, bursts, on_silence = [], [], []
    for row, ref, hyp, inserted in zip(rows, ours, theirs, counts.insertions_N, strict=True):
        times = repetitions(hyp.split())
        if times >= _LOOP_TIMES and times > repetitions(ref.split()):
            loops.append(row.id)
        if inserted >= _BURST_WORDS and _longest_insertion(ref, hyp) >= _BURST_WORDS:
            bursts.append(row.id)
        if row.silent and hyp:
            on_silence.append(row.id)
    return {
        "loops": _named(loops),
        "insertion_bursts": _named(bursts),
        "text_on_silence": {**_named(on_silence), "silent": sum(row.silent for row in rows)},
    }


def _longest_insertion(reference: str, hypothesis: str) -> int:
    runs = groupby(align_words(reference, hypothesis), lambda column: column.operation)
    return max(len(list(run)) for operation, run in runs if operation == "insert")


def _known(rate: float | None) -> bool:
    return rate is not None and math.isfinite(rate)


def _named(ids: Sequence[str]) -> dict[str, Any]:
    return {"count": len(ids), "ids": ids[:_MOST_IDS]}

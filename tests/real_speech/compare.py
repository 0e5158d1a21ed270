"""What the runs found, as JSON and as a Markdown table; a run cut short counts as far as it got."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from recipes import RUNS, Run

from hebasr_jax.metrics import (
    align_words,
    bootstrap_interval,
    character_errors,
    normalize_ivrit,
    word_errors,
)
from hebasr_jax.tracking import read_metrics

_RESAMPLES = 10_000
_WINDOW = 100  # steps
Result = dict[str, Any]


def collect(out: Path) -> Result:
    """All figures of the runs under `out`; what is not there yet is left out."""
    logs = {run: read_metrics(out / run.name / "metrics.jsonl") for run in RUNS}
    compared = {}
    for recipe in dict.fromkeys(run.recipe for run in RUNS if run.engine == "torch"):
        pairs = [
            (logs[run], logs[Run(recipe, "torch", run.seed)])
            for run in RUNS
            if run.recipe == recipe and run.engine == "ours"
        ]
        compared[recipe] = compare(pairs)
    reversed_run = Run("fsdd", "torch-reversed", 0)
    compared["fsdd: torch against itself"] = compare(
        [(logs[reversed_run], logs[Run("fsdd", "torch", 0)])]
    )
    scores = {
        f"{run.name} on {name}": {"step": step, **_last_scores(of_set)}
        for run, log in logs.items()
        if _validations(log)
        for step, sets in [max(_validations(log).items())]
        for name, of_set in sets.items()
    }
    checks = {run.name: out / run.name / "padded_error.json" for run in RUNS}
    step_s = {run.name: _step_s(log) for run, log in logs.items() if len(_losses(log)) > 2}
    stamped = {run.name: boundaries(out / run.name / "stamped.jsonl") for run in RUNS}
    return {
        "compared": {name: found for name, found in compared.items() if found},
        "scores": scores,
        "boundaries": {name: found for name, found in stamped.items() if found},
        "median_step_s": step_s,
        "padded_against_single_rows": {
            name: json.loads(file.read_text()) for name, file in checks.items() if file.exists()
        },
    }


def compare(pairs: list[tuple[list[dict], list[dict]]]) -> Result | None:
    """Losses and errors of runs against their twins, seed by seed; None before any pair has begun.

    loss_ratio: mean loss over all common steps, ours over theirs, per seed. windows: the same of
    each 100 steps. first_step_over_1_percent: where two batches' losses first part so far.
    gates: rung 13, loss within 1 % over the run for each seed, and WER (or CER) no worse: the
    interval of the difference does not lie above 0.
    """
    pairs = [pair for pair in pairs if all(_losses(log) for log in pair)]
    if not pairs:
        return None
    losses = [tuple(_losses(log) for log in pair) for pair in pairs]
    steps = min(min(map(len, pair)) for pair in losses)
    ours_NT, theirs_NT = (np.array([pair[side][:steps] for pair in losses]) for side in (0, 1))
    whole = max(steps // _WINDOW, 1)
    means = [
        x_NT[:, : whole * _WINDOW].reshape(len(pairs), whole, -1).mean(2)
        for x_NT in (ours_NT, theirs_NT)
    ]
    ratio_N = ours_NT.mean(1) / theirs_NT.mean(1)
    errors = _errors(pairs)
    return {
        "steps": steps,
        "seeds": len(pairs),
        "gates": {
            "loss": bool(np.all(np.abs(ratio_N - 1) <= 0.01)),
            **{rate: bool(errors[rate]["ci95"][0] <= 0) for rate in ("wer", "cer") if errors},
        },
        "loss_ratio": ratio_N.tolist(),
        "mean_loss": [ours_NT.mean(1).tolist(), theirs_NT.mean(1).tolist()],
        "windows": (means[0] / means[1]).round(5).tolist(),
        "window_losses": means[1].round(5).tolist(),
        "first_step_over_1_percent": [
            int(np.argmax(apart_T)) + 1 if apart_T.any() else None
            for apart_T in np.abs(ours_NT / theirs_NT - 1) > 0.01
        ],
        **errors,
    }


def _errors(pairs: list[tuple[list[dict], list[dict]]]) -> Result:
    """Errors at the last step at which all were validated, with a paired bootstrap.

    The difference is ours minus theirs; seeds and then clips are drawn with replacement, the same
    for both sides. p_worse: share of the draws in which ours has more errors.
    """
    common = set.intersection(*({*_validations(log)} for pair in pairs for log in pair))
    if not common:
        return {}
    step = max(common)
    found: Result = {"validated_step": step}
    for name, count in {"wer": word_errors, "cer": character_errors}.items():
        counts = [[_counts(_only_set(log, step), count) for log in pair] for pair in pairs]
        errors_2NC = np.array([[pair[side].errors_N for pair in counts] for side in (0, 1)])
        length_C = counts[0][0].length_N
        rng = np.random.default_rng(0)
        seeds, clips = errors_2NC.shape[1:]
        draws = []
        for _ in range(_RESAMPLES):
            seed_N, clip_C = rng.integers(seeds, size=seeds), rng.integers(clips, size=clips)
            difference_NC = (errors_2NC[0] - errors_2NC[1])[seed_N][:, clip_C]
            draws.append(difference_NC.sum() / (seeds * length_C[clip_C].sum()))
        rates = errors_2NC.sum(2) / length_C.sum()
        found[name] = {
            "ours": rates[0].tolist(),
            "torch": rates[1].tolist(),
            "difference": float(rates[0].mean() - rates[1].mean()),
            "ci95": np.quantile(draws, [0.025, 0.975]).tolist(),
            "p_worse": float(np.mean(np.array(draws) > 0)),
        }
    return found


def boundaries(stamped: Path) -> Result | None:
    """Errors of the start times of words that match the reference, without the clip's first word.

    That one starts at 0.0 in every clip. even: the same words with their starts spread over the
    clip in proportion to the letters before them; what a model without ears would reach.
    """
    if not stamped.exists():
        return None
    rows = [json.loads(line) for line in stamped.read_text(encoding="utf-8").splitlines()]
    errors_ms: list[float] = []
    even_ms: list[float] = []
    for row in rows:
        starts = _word_starts(row["hypothesis"])
        spoken = [word for word, _ in starts]
        letters = np.cumsum([0, *(len(word) for word in spoken)])
        ours = theirs = 0
        words = [text for _, text in row["reference"]]
        for column in align_words(" ".join(words), " ".join(spoken)):
            if column.operation == "equal" and ours and starts[theirs][1] is not None:
                true_s = row["reference"][ours][0]
                errors_ms.append(1000 * abs(starts[theirs][1] - true_s))
                even_s = row["duration_s"] * letters[theirs] / letters[-1]
                even_ms.append(1000 * abs(even_s - true_s))
            ours += column.reference is not None
            theirs += column.hypothesis is not None
    pairs = [[normalize_ivrit(" ".join(w for _, w in row["reference"])) for row in rows]]
    pairs.append([normalize_ivrit(row["text"]) for row in rows])
    return {
        "step": rows[0]["step"],
        "clips": len(rows),
        "words": sum(len(row["reference"]) - 1 for row in rows),
        "matched": len(errors_ms),
        **{f"{name}_ms": value for name, value in _spread(errors_ms).items()},
        **{f"even_{name}_ms": value for name, value in _spread(even_ms).items()},
        "within_80_ms": float(np.mean(np.array(errors_ms) <= 80)) if errors_ms else None,
        "within_240_ms": float(np.mean(np.array(errors_ms) <= 240)) if errors_ms else None,
        "wer": word_errors(*pairs).rate,
        "cer": character_errors(*pairs).rate,
    }


def _word_starts(segments: list) -> list[tuple[str, float | None]]:
    """Words of the stamped output; one that is not the first of its segment has no start."""
    return [
        (word, start_s if first else None)
        for start_s, text in segments
        for first, word in zip([True] + [False] * len(text.split()), text.split(), strict=False)
    ]


def _spread(values: list[float]) -> Result:
    if not values:
        return {"median": None, "mean": None}
    return {"median": float(np.median(values)), "mean": float(np.mean(values))}


def _step_s(log: list[dict]) -> float:
    """Median time from one step's line to the next."""
    times = [line["time_s"] for line in log if line["kind"] == "train"]
    return float(np.median(np.diff(times)))


def _losses(log: list[dict]) -> list[float]:
    return [line["loss"] for line in log if line["kind"] == "train"]


def _validations(log: list[dict]) -> dict[int, dict[str, Result]]:
    """The scores of each set, by step."""
    return {line["step"]: line["sets"] for line in log if line["kind"] == "validation"}


def _counts(scores: Result, count: Any) -> Any:
    samples = sorted(scores["samples"], key=lambda sample: sample["id"])
    sides = (
        [normalize_ivrit(sample[side]) for sample in samples]
        for side in ("reference", "hypothesis")
    )
    return count(*sides)


def _only_set(log: list[dict], step: int) -> Result:
    [scores] = _validations(log)[step].values()
    return scores


def _last_scores(scores: Result) -> Result:
    kept = {name: scores[name] for name in ("loss", "wer", "cer", "words", "clips", "empty")}
    for name, count in {"wer": word_errors, "cer": character_errors}.items():
        counts = _counts(scores, count)
        kept[f"{name}_ci95"] = bootstrap_interval(
            counts.errors_N, counts.length_N, resamples=1000, seed=0
        )
    return kept | {"samples": scores["samples"][:: max(1, len(scores["samples"]) // 4)][:4]}


def markdown(found: Result) -> str:
    """The tables for docs/training.md."""
    lines = [
        "| set | steps | mean loss ours / torch - 1 | first step over 1 % | ours | torch | "
        "difference, 95 % | P(worse) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["compared"].items():
        ratios = ", ".join(f"{100 * (ratio - 1):+.2f} %" for ratio in row["loss_ratio"])
        cells = [
            name,
            str(row["steps"]),
            ratios,
            ", ".join(map(str, row["first_step_over_1_percent"])),
        ]
        rate = "wer" if name.startswith("fsdd") else "cer"
        if rate in row:
            score = row[rate]
            ours, torch = (", ".join(f"{100 * x:.1f}" for x in score[k]) for k in ("ours", "torch"))
            low, high = score["ci95"]
            cells += [f"{rate.upper()} {ours} %", f"{torch} %"]
            cells += [f"{100 * score['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"]
            cells += [f"{score['p_worse']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| run | step | WER | CER | CER 95 % |", "|---|---|---|---|---|"]
    for name, row in found["scores"].items():
        low, high = row["cer_ci95"]
        cells = [name, str(row["step"]), f"{100 * row['wer']:.1f} %", f"{100 * row['cer']:.1f} %"]
        lines.append(f"| {' | '.join(cells)} | {100 * low:.1f} to {100 * high:.1f} |")
    for name, row in found["boundaries"].items():
        lines += ["", f"{name}, step {row['step']}: CER {100 * row['cer']:.1f} % with stamps; "]
        if row["matched"]:
            lines[-1] += (
                f"{row['matched']} of {row['words']} words match; start times off by "
                f"{row['median_ms']:.0f} ms (median), {row['mean_ms']:.0f} ms (mean), "
                f"within 80 ms {100 * row['within_80_ms']:.0f} %, "
                f"within 240 ms {100 * row['within_240_ms']:.0f} %; the same words spread evenly: "
                f"{row['even_median_ms']:.0f} and {row['even_mean_ms']:.0f} ms"
            )
    return "\n".join(lines)

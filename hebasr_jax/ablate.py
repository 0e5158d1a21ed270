"""What each item of a recipe is worth: the run without it, same seed and budget, paired intervals.

Every variant is a run of its own under `runs/<name>-ablation/`, trained and scored as any other,
so that a stop and the same command go on where it was.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hebasr_jax.config_file import LoadedConfig, checked, flatten
from hebasr_jax.errors import UserError
from hebasr_jax.finish import FINAL
from hebasr_jax.metrics import normalize_ivrit, paired_interval, word_errors
from hebasr_jax.optim import GROUP_NAMES
from hebasr_jax.run_changes import free_to_change
from hebasr_jax.run_config import Config, Group, Stage
from hebasr_jax.run_folder import read_json, was_trained, write_json
from hebasr_jax.tracking import interval, percent
from hebasr_jax.train import train

Say = Callable[[str], None]
Row = dict[str, Any]
WHOLE = "all"


def without_spec_augment(config: Config) -> Config:
    return replace(config, augment=replace(config.augment, time_masks=0, mel_masks=0))


def without_speed(config: Config) -> Config:
    return replace(config, augment=replace(config.augment, speed_factors=(1.0,)))


def without_noise(config: Config) -> Config:
    """Noise, gain and telephone band together."""
    off = replace(config.augment, noise_share=0.0, gain_share=0.0, band_share=0.0)
    return replace(config, augment=off)


def without_decay(config: Config) -> Config:
    """The rates stay at their peak after the warm-up."""
    return replace(config, optim=replace(config.optim, decay="none"))


def without_layer_rates(config: Config) -> Config:
    """Every group that is trained has the decoder's rate, in every layer."""
    stages = []
    for stage in config.stages:
        rate = stage.decoder.learning_rate or max(
            getattr(stage, name).learning_rate for name in GROUP_NAMES
        )
        even: dict[str, Any] = {}
        for name in GROUP_NAMES:
            group: Group = getattr(stage, name)
            own = rate if group.learning_rate else 0.0
            even[name] = replace(group, learning_rate=own, layer_decay=1.0)
        stages.append(replace(stage, **even))
    return replace(config, stages=tuple(stages))


def without_stages(config: Config) -> Config:
    """The last stage alone."""
    return replace(config, stages=config.stages[-1:])


def without_averaging(config: Config) -> Config:
    """The best checkpoint alone."""
    return replace(config, average=replace(config.average, best=1))


def without_stamps(config: Config) -> Config:
    return replace(config, text=replace(config.text, stamp_share=0.0))


def without_context(config: Config) -> Config:
    return replace(config, text=replace(config.text, context_share=0.0))


def without_joining(config: Config) -> Config:
    return replace(config, data=replace(config.data, join_share=0.0))


def without_mix(config: Config) -> Config:
    """Every set in proportion to its size."""

    def plain(stage: Stage) -> Stage:
        return replace(stage, mix=tuple(replace(part, share=None) for part in stage.mix))

    train_sets = tuple(replace(source, share=None) for source in config.data.train)
    data = replace(config.data, train=train_sets)
    return replace(config, data=data, stages=tuple(map(plain, config.stages)))


def without_muon(config: Config) -> Config:
    """AdamW for all tensors, at the same rates."""
    return replace(config, optim=replace(config.optim, matrices="adamw"))


ITEMS: tuple[tuple[str, Callable[[Config], Config]], ...] = (
    ("SpecAugment", without_spec_augment),
    ("speed perturbation", without_speed),
    ("noise, gain, band", without_noise),
    ("rate decay", without_decay),
    ("rates by group and layer", without_layer_rates),
    ("stages", without_stages),
    ("averaging", without_averaging),
    ("time stamps", without_stamps),
    ("previous text", without_context),
    ("joining", without_joining),
    ("balanced mix", without_mix),
    ("Muon", without_muon),
)


def variants(config: Config) -> dict[str, Config]:
    """The whole recipe, then the recipe without each item that it has."""
    found = {WHOLE: config}
    for name, without in ITEMS:
        changed = without(config)
        if changed != config:
            found[f"without {name}"] = checked(changed)
    return found


def ablate(loaded: LoadedConfig, say: Say, *, accept_changes: bool = False) -> int:
    """Trains and scores every variant, then writes the table; the exit code is `train`'s.

    Scored are the test sets, or where there is none the dev sets. Nothing is exported.

    Args:
      accept_changes: as of `train`, for each variant.
    """
    config = loaded.config
    if jax.process_count() > 1:
        raise UserError("an ablation runs on one host", do="start it on one, with all its devices")
    scored = config.data.test or config.data.dev
    if not scored:
        raise UserError("nothing to compare on", "data.test and data.dev are empty", "name a set")
    folder = Path(config.runs_dir) / f"{config.name}-ablation"
    base = replace(
        config,
        runs_dir=str(folder),
        data=replace(config.data, test=scored),
        export=replace(config.export, layouts=(), upload=False),
    )
    runs = variants(base)
    for number, (name, variant) in enumerate(runs.items(), start=1):
        say(f"ablation {number} of {len(runs)}: {name}")
        variant = replace(variant, name=folder_name(name))
        if name != WHOLE and not _take_over(folder, base, variant):
            steps = read_json(folder / WHOLE / FINAL)["step"]  # the same budget
            variant = replace(variant, train=replace(variant.train, steps=steps))
        origins = dict.fromkeys(flatten(variant), f"ablation: {name}")
        if code := train(LoadedConfig(variant, origins), say, accept_changes=accept_changes):
            return code
    sets = [source.name for source in scored]
    rows = compare_variants(folder, list(runs), sets, config.validation.bootstrap, config.seed)
    write_json(folder / "ablation.json", {"rows": rows})
    (folder / "ablation.md").write_text(table := markdown(rows), encoding="utf-8")
    say(table)
    say(f"the table is in {folder / 'ablation.md'}")
    return 0


def folder_name(variant: str) -> str:
    """`without rates by group` -> `without-rates-by-group`."""
    return "-".join(variant.replace(",", "").split())


def compare_variants(
    folder: Path, names: Sequence[str], sets: Sequence[str], resamples: int, seed: int
) -> list[Row]:
    """A row for each variant and set: its WER, and how much it is above that of the whole recipe.

    The interval is a paired bootstrap over the groups of the set (recordings, speakers or clips).
    """
    rows = []
    for name in names:
        for of_set in sets:
            texts, whole = (_texts(folder / run, of_set) for run in (folder_name(name), WHOLE))
            if [t["id"] for t in texts] != [t["id"] for t in whole]:
                raise UserError(f"{name} and {WHOLE} were not scored on the same clips of {of_set}")
            sides = [_errors(texts), _errors(whole)]
            found = paired_interval(
                np.array([errors for errors, _ in sides]),
                sides[0][1],
                [t["group"] for t in texts],
                resamples=resamples,
                seed=seed,
            )
            known = {key: _finite(value) for key, value in found.items()}
            rows.append({"variant": name, "set": of_set, **known})
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table; differences in points, positive where the item helps."""
    lines = [
        "| variant | set | WER | difference | 95 %, paired | P(worse without) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = row["variant"] == WHOLE
        points = "" if same or row["difference"] is None else f"{100 * row['difference']:+.2f}"
        bounds = "" if same else interval(row["ci95"])
        worse = "" if same or row["p_worse"] is None else f"{row['p_worse']:.2f}"
        cells = [row["variant"], row["set"], percent(row["wer"]), points, bounds, worse]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _take_over(folder: Path, base: Config, variant: Config) -> bool:
    """Whether only what follows the training differs: then the run is taken over by hard links."""
    target, whole = folder / variant.name, folder / WHOLE
    ours, theirs = flatten(variant), flatten(base)
    if not all(free_to_change(at) for at in ours | theirs if ours.get(at) != theirs.get(at)):
        return False
    if was_trained(target):
        return True
    shutil.rmtree(target, ignore_errors=True)
    partial = folder / f".{variant.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(whole / "checkpoints", partial / "checkpoints", copy_function=os.link)
    for path in whole.iterdir():  # files that a run appends to or replaces are its own
        if path.is_file() and path.suffix in (".json", ".jsonl"):
            shutil.copyfile(path, partial / path.name)
    shutil.copytree(whole / "model", partial / "model")
    partial.rename(target)
    return True


def _texts(run: Path, of_set: str) -> list[dict[str, str]]:
    """What a run wrote on a test set, clip by clip."""
    path = run / "eval" / "test" / of_set / "hypotheses.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _finite(value: Any) -> Any:
    """What JSON can hold: None for what is not a finite number."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _errors(texts: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Word errors and reference words of each clip."""
    references, hypotheses = (
        [normalize_ivrit(text[side]) for text in texts] for side in ("reference", "hypothesis")
    )
    counts = word_errors(references, hypotheses)
    return counts.errors_N, counts.length_N

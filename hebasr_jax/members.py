"""Which checkpoints are averaged, and with what weights."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hebasr_jax.checkpoint import figures_of, find_fault
from hebasr_jax.errors import UserError
from hebasr_jax.run_changes import differences
from hebasr_jax.run_folder import read_json

Say = Callable[[str], None]
Figure = Literal["loss", "wer"]

TEMPERATURE = 0.01
"""Of softmax, in nats. Neighbouring checkpoints differ by about 0.01 in dev loss: so much then
makes a factor of e between two weights, where a temperature of 1 would leave them equal."""


@dataclass(frozen=True)
class Member:
    """A checkpoint that may go into an average.

    name: "step 1200", or "runs/a step 1200" among several runs.
    loss, wer: means over the dev sets as the run measured them; None where it did not.
    """

    name: str
    checkpoint: Path
    loss: float | None = None
    wer: float | None = None


def best_members(sources: Sequence[Path], best: int, by: Figure, *, say: Say) -> list[Member]:
    """Checkpoints to average: those named, as they are, then the best of all runs together.

    Ties in one figure are broken by the other, then the later step comes first. A damaged
    checkpoint of a run is passed over, and told.

    Args:
      sources: run folders, and checkpoints such as RUN/checkpoints/STEP.
      best: how many to take from the runs, at most.

    Raises:
      UserError: nothing to average, a named checkpoint is damaged, or runs of different models.
    """
    if best < 1:
        raise UserError(f"--best {best} names no checkpoint", do="give at least 1")
    named = [path for path in sources if (path / "facts.json").is_file()]
    whole = [path for path in sources if path not in named]
    for path in whole:
        if not (path / "checkpoints").is_dir():
            why = "it is neither a run folder nor a checkpoint"
            raise UserError(f"{path} cannot be averaged", why, "name RUN or RUN/checkpoints/STEP")
    runs = _distinct([*map(run_of, named), *whole])
    _refuse_other_models(runs)
    found = [_member(path, len(runs) > 1) for path in _distinct(named)]
    for member in found:
        if fault := find_fault(member.checkpoint):
            raise UserError(f"{member.checkpoint} is damaged", fault, "leave it out")
    taken = {member.checkpoint.resolve() for member in found}
    steps = [p for run in _distinct(whole) for p in (run / "checkpoints").glob("*")]
    free = [p for p in steps if p.name.isdecimal() and p.resolve() not in taken]
    if len(whole) > 1:
        _refuse_other_dev_sets(whole)
    chosen = _best_whole([_member(p, len(runs) > 1) for p in free], best, by, say)
    if whole and len(chosen) < best:
        say(f"{len(chosen)} checkpoints instead of {best}: no more are whole and validated")
    if not found + chosen:
        raise UserError(
            f"no checkpoint of {', '.join(map(str, runs)) or 'nothing'} can be averaged",
            f"none is finished, whole and has a dev {by} in best.json",
            "train with data.dev and validation.every_steps, or name RUN/checkpoints/STEP",
        )
    return found + chosen


def member_weights(
    members: Sequence[Member],
    how: Literal["uniform", "softmax"] | Sequence[float],
    temperature: float = TEMPERATURE,
) -> list[float]:
    """The weight of each member; they sum to 1.

    Args:
      how: all alike, softmax of -loss / temperature, or the weights themselves.
      temperature: in nats, of softmax.

    Raises:
      UserError: weights that do not suit the members, or softmax where a loss is not known.
    """
    if how == "uniform":
        return [1 / len(members)] * len(members)
    if how == "softmax":
        if not 0 < temperature < math.inf:
            raise UserError(f"a temperature of {temperature} cannot be had", do="give 0.01 or so")
        losses = [math.nan if member.loss is None else member.loss for member in members]
        for member, loss in zip(members, losses, strict=True):
            if not math.isfinite(loss):
                why = "softmax weighs by the dev loss in best.json"
                raise UserError(f"{member.name} has no dev loss", why, "give --weights uniform")
        powers = [math.exp((min(losses) - loss) / temperature) for loss in losses]
        return [power / sum(powers) for power in powers]
    given = [float(weight) for weight in how]
    told = ",".join(f"{weight:g}" for weight in given)
    if len(given) != len(members):
        names = ", ".join(member.name for member in members)
        raise UserError(
            f"{len(given)} weights for {len(members)} checkpoints",
            f"the weights are {told}, for {names}",
            "give a weight for each, or other checkpoints",
        )
    if not all(0 < weight < math.inf for weight in given):
        why = "each member of a mean has a share above 0"
        raise UserError(f"the weights {told} cannot be had", why, "leave that checkpoint out")
    if abs(sum(given) - 1) > 1e-6:
        shares = [round(weight / sum(given), 4) for weight in given[:-1]]
        do = ",".join(f"{share:g}" for share in [*shares, round(1 - sum(shares), 4)])
        raise UserError(f"the weights {told} sum to {sum(given):g}, not 1", do=f"give {do}")
    return given


def run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint."""
    parents = checkpoint.parents
    return parents[1] if len(parents) > 1 else checkpoint.absolute().parents[1]


def _distinct(paths: Iterable[Path]) -> list[Path]:
    """Each folder once, under the name that it had first."""
    found: dict[Path, Path] = {}
    for path in paths:
        found.setdefault(path.resolve(), path)
    return list(found.values())


def _best_whole(pool: Sequence[Member], best: int, by: Figure, say: Say) -> list[Member]:
    """The best by a figure, best first, without damaged ones; only what may be taken is checked."""
    chosen: list[Member] = []
    for member in sorted((m for m in pool if getattr(m, by) is not None), key=partial(_rank, by)):
        if len(chosen) == best:
            break
        if fault := find_fault(member.checkpoint):
            say(f"{member.checkpoint} is damaged and passed over: {fault}")
        else:
            chosen.append(member)
    return chosen


def _member(checkpoint: Path, several: bool) -> Member:
    run = run_of(checkpoint)
    row = figures_of(run).get(checkpoint.name, {})
    name = f"step {checkpoint.name}"
    return Member(f"{run} {name}" if several else name, checkpoint, row.get("loss"), row.get("wer"))


def _rank(by: Figure, member: Member) -> tuple[float, float, int, str]:
    other = member.loss if by == "wer" else member.wer
    figure = getattr(member, by)
    step = int(member.checkpoint.name)
    return figure, math.inf if other is None else other, -step, str(member.checkpoint)


def _refuse_other_models(runs: Sequence[Path]) -> None:
    """Refuses runs of models that differ in size or tokenizer."""
    facts = [read_json(run / "env.json").get("fixed", {}) for run in runs]
    for run, there in zip(runs[1:], facts[1:], strict=True):
        sizes = list(differences(facts[0].get("model", {}), there.get("model", {})).values())
        if sizes or there.get("tokenizer") != facts[0].get("tokenizer"):
            raise UserError(
                f"{runs[0]} and {run} cannot be averaged",
                f"they are of different models: {sizes[0] if sizes else 'the tokenizers differ'}",
                "name runs that began with one model",
            )


def _refuse_other_dev_sets(runs: Sequence[Path]) -> None:
    """Refuses to rank figures of different dev sets against each other."""

    def asked(run: Path) -> dict[str, Any]:
        config = read_json(run / "config.json")
        names = (at for at in config if re.match(r"data\.dev|validation\.max_clips|text\.lang", at))
        return {at: config[at].get("value") for at in names}

    on = [{row.get("scored_on") for row in figures_of(run).values()} for run in runs]
    for run, theirs in zip(runs[1:], on[1:], strict=True):
        if on[0] and theirs and theirs != on[0]:
            changed = differences(asked(runs[0]), asked(run)).values()
            raise UserError(
                f"the checkpoints of {runs[0]} and {run} cannot be ranked together",
                f"their dev data differ: {next(iter(changed), 'clips, texts or tokenizer')}",
                "name the checkpoints to average, such as RUN/checkpoints/STEP",
            )

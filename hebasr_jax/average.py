"""The mean of several checkpoints' weights, and whether it beats its members.

`members` says which checkpoints and with what weights; here their mean is made, scored beside each
of them, and the best of all is chosen. How weights are scored is for the caller to say.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hebasr_jax.distributed import any_host, is_first
from hebasr_jax.errors import UserError
from hebasr_jax.members import Member, Say
from hebasr_jax.paths import Tree, flat
from hebasr_jax.run_changes import differences
from hebasr_jax.run_folder import read_json, write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A weighted mean of members; of one member, that member as it is."""

    name: str
    members: tuple[Member, ...]
    weights: tuple[float, ...]

    @property
    def shares(self) -> dict[str, float]:
        """Weight of each member by its name."""
        return dict(zip((m.name for m in self.members), self.weights, strict=True))


@dataclass(frozen=True, eq=False)
class Choice:
    """The best of all candidates.

    weights: of each member by its name.
    params: float32 tree on the host.
    scores: of each dev set, as `score` gave them; what is not finite is None.
    table: a row for each candidate: name, weights, wer and loss (means over sets), sets.
    """

    name: str
    weights: dict[str, float]
    params: Tree
    scores: dict[str, Any]
    table: list[Row]


def average(trees: Iterable[Tree], weights: Sequence[float]) -> Tree:
    """Weighted mean of parameter trees, added in float64 and returned in float32, on the host.

    Args:
      trees: taken one at a time: beside the sum, only one is in memory.
      weights: as many as there are trees; they must sum to 1.

    Raises:
      UserError: weights that do not sum to 1, trees of different models, or one that holds
        integers, NaN or infinity.
    """
    if abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"the weights {list(weights)} sum to {sum(weights)}", "a mean needs 1")
    total: Tree | None = None
    parts = iter(trees)  # zip, or a variable for the tree, would hold it while the next is read
    for number, weight in enumerate(weights):
        total = _added(total, next(parts), weight, f"member {number + 1} of {len(weights)}")
    assert total is not None
    assert next(parts, None) is None, "more trees than weights"
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), total)


def compare(
    members: Sequence[Member],
    weights: Sequence[float],
    load: Callable[[Member], Tree],
    score: Callable[[Tree], Mapping[str, Any] | None],
    *,
    soup: bool = False,
    kept: Path | None = None,
    key: str = "",
    say: Say,
) -> Choice | None:
    """Scores the mean of the members beside each of them; the best of all, or None if stopped.

    The best has the lowest mean WER over the dev sets, then the lowest mean loss. On a full tie
    the mean wins: the same score rests on more checkpoints, so that less of it is the luck of one.

    Greedy soup (Wortsman et al., arXiv 2203.05482): from the best member on, each next one joins
    a uniform mean if the dev WER does not rise; every mean that was tried is in the table.

    With several hosts all of them call this; the first one writes.

    Args:
      score: scores of each dev set, as `validate` gives them; None when a signal came.
      kept: folder of scores: a candidate that has its scores there is not scored again.
      key: what scores depend on besides the weights, such as dev data and settings.
    """
    if kept and is_first():
        _make(kept)
    rows: dict[frozenset, Row] = {}
    best: tuple[Row, Candidate, Tree | None, dict[str, Any]] | None = None
    for candidate in _candidates(members, weights, soup, rows):
        shares = frozenset(candidate.shares.items())
        if shares in rows:
            continue
        path = kept / f"{_fingerprint(candidate, key)}.json" if kept else None
        scores, tree = (read_json(path).get("scores") if path else None), None
        if any_host(not scores):
            tree = _build(candidate, load)
            given = score(tree)
            if given is None:
                return None
            scores = json.loads(json.dumps(finite(given)))  # as they are read back
            if path and is_first():
                content = {"name": candidate.name, "weights": candidate.shares, "scores": scores}
                write_json(path, content)
        assert scores is not None
        say(describe(candidate.name, scores))
        row = rows[shares] = _row(candidate, scores)
        if best is None or order(row) < order(best[0]):
            best = row, candidate, tree, scores
    assert best is not None
    row, candidate, tree, scores = best
    params = _build(candidate, load) if tree is None else tree
    return Choice(candidate.name, candidate.shares, params, scores, list(rows.values()))


def describe(name: str, scores: Mapping[str, Any]) -> str:
    """One line of what some weights score: WER with its 95 % interval on each dev set."""
    told = []
    for of_set, found in scores.items():
        line = (
            f"WER {in_percent(found['wer'], found['ci95'])}, "
            f"CER {in_percent(found['cer'])}, {found['clips']} clips"
        )
        told.append(line if len(scores) == 1 else f"{of_set}: {line}")
    if len(told) > 1:
        told.insert(0, f"mean WER {in_percent(_mean(scores, 'wer'))}")
    return f"{name}: {'; '.join(told)}"


def in_percent(rate: float | None, interval: Sequence[float | None] = ()) -> str:
    """A rate, with its interval: "7.1 % [6.5, 7.9]"."""
    told = ["?" if value is None else f"{100 * value:.1f}" for value in (rate, *interval)]
    return f"{told[0]} %" + (f" [{', '.join(told[1:])}]" if interval else "")


def order(row: Row) -> tuple[float, float]:
    """Rows of a table by this: mean WER, then mean loss, the unknown last."""
    wer, loss = (math.inf if row[figure] is None else row[figure] for figure in ("wer", "loss"))
    return wer, loss


def _added(total: Tree | None, tree: Tree, weight: float, name: str) -> Tree:
    """The sum with one more tree, in place, once it was found to suit."""
    leaves = flat(tree)
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(f"{name} cannot be averaged", f"{path} holds {leaf.dtype}, no floats")
        if not np.isfinite(leaf).all():
            do = "leave that checkpoint out"
            raise UserError(f"{name} cannot be averaged", f"{path} holds NaN or infinity", do)
    if total is None:
        total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), tree)
    here = {path: str(leaf.shape) for path, leaf in leaves.items()}
    there = {path: str(leaf.shape) for path, leaf in flat(total).items()}
    if unlike := list(differences(there, here).values()):
        raise UserError(
            "these checkpoints cannot be averaged",
            f"they are of different models: {unlike[0]}",
            "give checkpoints of one run, or of runs that began with one model",
        )

    def add(sum_: np.ndarray, leaf: Any) -> np.ndarray:
        sum_ += np.asarray(leaf, np.float64) * weight
        return sum_

    return jax.tree.map(add, total, tree)


def _candidates(
    members: Sequence[Member],
    weights: Sequence[float],
    soup: bool,
    rows: Mapping[frozenset, Row],
) -> Iterator[Candidate]:
    """The mean, each member, then soups, which hang on the rows of what came before."""
    if len(members) > 1:
        yield Candidate(_name("average", members), tuple(members), tuple(weights))
    singles = [Candidate(member.name, (member,), (1.0,)) for member in members]
    yield from singles
    if not soup:
        return

    def row_of(candidate: Candidate) -> Row:
        return rows[frozenset(candidate.shares.items())]

    best, *others = sorted(singles, key=lambda single: order(row_of(single)))
    for single in others:
        joined = (*best.members, *single.members)
        trial = Candidate(_name("soup", joined), joined, (1 / len(joined),) * len(joined))
        yield trial
        if order(row_of(trial))[0] <= order(row_of(best))[0]:
            best = trial


def _name(kind: str, members: Sequence[Member]) -> str:
    """Such as "average of steps 400, 600 and 800"."""
    names = [member.name for member in members]
    one_run = all(name.startswith("step ") for name in names)
    *first, last = [name.removeprefix("step ") for name in names] if one_run else names
    return f"{kind} of {'steps ' if one_run else ''}{', '.join(first)} and {last}"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{folder} cannot be made", why, "free space, or repair it") from None


def _build(candidate: Candidate, load: Callable[[Member], Tree]) -> Tree:
    if len(candidate.members) == 1:
        return load(candidate.members[0])
    return average(map(load, candidate.members), candidate.weights)


def _fingerprint(candidate: Candidate, key: str) -> str:
    """Changes with a member's files, a weight or the key; the order of members is nothing."""
    manifests = (m.checkpoint / "manifest.json" for m in candidate.members)
    digests = [hashlib.sha256(manifest.read_bytes()).hexdigest() for manifest in manifests]
    shares = sorted(zip(digests, candidate.weights, strict=True))
    return hashlib.sha256(json.dumps([shares, key]).encode()).hexdigest()[:16]


def _row(candidate: Candidate, scores: Mapping[str, Any]) -> Row:
    sets = {of: {k: v for k, v in found.items() if k != "samples"} for of, found in scores.items()}
    means = {figure: _mean(scores, figure) for figure in ("wer", "loss")}
    return {"name": candidate.name, "weights": candidate.shares, **means, "sets": sets}


def _mean(scores: Mapping[str, Any], figure: str) -> float | None:
    """Over the dev sets, all alike; None where a set has no such figure."""
    values = [found.get(figure) for found in scores.values()]
    return None if not values or None in values else float(np.mean(values))


def finite(value: Any) -> Any:
    """The same with None for what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {name: finite(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [finite(below) for below in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value

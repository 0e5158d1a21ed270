"""The mean of several checkpoints' weights."""

from collections.abc import Iterable, Sequence

import numpy as np

from hebasr_jax.errors import UserError
from hebasr_jax.paths import Tree, flat, nested


def average(trees: Iterable[Tree], weights: Sequence[float]) -> Tree:
    """Weighted mean of parameter trees, added in float64 and returned in float32, on the host.

    Args:
      trees: one at a time, so that only one and the sum are in memory.
      weights: as many as there are trees; they must sum to 1.

    Raises:
      UserError: weights that do not sum to 1, or trees of different models.
    """
    if abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"the weights {list(weights)} sum to {sum(weights)}", "a mean needs 1")
    total: dict[str, np.ndarray] = {}
    for count, (tree, weight) in enumerate(zip(trees, weights, strict=True)):
        leaves = {path: np.asarray(leaf, np.float64) * weight for path, leaf in flat(tree).items()}
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        if count and shapes != {path: leaf.shape for path, leaf in total.items()}:
            raise UserError(
                "these checkpoints cannot be averaged",
                "they are of models of different size",
                "give checkpoints of one run, or of runs that began with one model",
            )
        total = {path: total.get(path, 0.0) + leaf for path, leaf in leaves.items()}
    return nested({path: leaf.astype(np.float32) for path, leaf in total.items()})

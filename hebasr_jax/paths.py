"""Parameters by path: `decoder/layers/up/kernel`. Every table of the package is keyed so."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax

Tree = dict[str, Any]  # nested dict of arrays
Value = TypeVar("Value")


def flat(tree: Tree) -> dict[str, Any]:
    """The leaves of a nested dict by their paths, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(leaves: dict[str, Any]) -> Tree:
    """The inverse of `flat`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def is_stacked(path: str) -> bool:
    """Whether the leaf's first axis counts the layers of a stack."""
    return "/layers/" in path


def look_up(table: Sequence[tuple[str, Value]], path: str) -> Value:
    """The value of the one row whose regular expression matches the whole path.

    Raises `AssertionError` when no row or more than one does: a parameter without a rule, or with
    two, is a fault of the table.
    """
    rows = [(pattern, value) for pattern, value in table if re.fullmatch(pattern, path)]
    if len(rows) != 1:
        raise AssertionError(f"{path} matches {[pattern for pattern, _ in rows] or 'no row'}")
    return rows[0][1]

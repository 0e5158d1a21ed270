"""Names of weights, settings and code: what was made under one name may be used again under it."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.paths import flat


def weights_key(params: Any) -> str:
    """sha256 of a tree of weights: it changes with any bit of them."""
    hasher = hashlib.sha256()
    for path, leaf in flat(params).items():
        hasher.update(path.encode())
        hasher.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return hasher.hexdigest()


def key_of(content: Any) -> str:
    """sha256 of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def imports_of(*modules: str) -> set[str]:
    """These modules of the package (`data.decode`) and all of it that they import."""
    found: set[str] = set()
    waiting = [*modules]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += re.findall(r"^\s*from hebasr_jax\.([\w.]+) import", _source(name), re.M)
            waiting += [name.rpartition(".")[0]] if "." in name else []
    return found


def code_version(modules: Iterable[str]) -> str:
    """sha256 of the sources of modules."""
    return key_of([(name, _source(name)) for name in sorted(modules)])


def _source(module: str) -> str:
    path = Path(__file__).parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8")

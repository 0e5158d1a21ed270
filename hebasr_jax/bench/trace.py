"""What a GPU did while steps ran, from the profiler: collectives, and how much of them shows."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hebasr_jax.bench.figures import Row

Span = tuple[float, float]  # start and end, in ms


def collective_times(steps: Callable[[], Any], count: int) -> Row:
    """Time of NCCL's kernels on this process's first GPU in each of `count` steps.

    "collectives ms" has them all, waiting for the other GPUs included; of these "exposed ms" is the
    part in which nothing else ran. Nothing on a CPU, whose collectives have no kernels.

    Args:
      steps: runs them, and may return before they end.
    """
    if jax.default_backend() != "gpu":
        return {}
    with tempfile.TemporaryDirectory(prefix="hebasr-trace-") as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(steps())
        found = kernels(next(Path(folder).rglob("*.xplane.pb")))
    talks = [span for name, span in found if "nccl" in name.lower()]
    works = [span for name, span in found if "nccl" not in name.lower()]
    return {
        "collectives ms": total(talks) / count,
        "exposed ms": (total(talks + works) - total(works)) / count,
    }


def kernels(path: Path) -> list[tuple[str, Span]]:
    """Name and time of everything that ran on the first GPU's streams."""
    data = jax.profiler.ProfileData.from_file(str(path))
    planes = sorted((p for p in data.planes if p.name.startswith("/device:GPU")), key=_name)
    return [
        (event.name, (event.start_ns / 1e6, (event.start_ns + event.duration_ns) / 1e6))
        for line in planes[0].lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def total(spans: Sequence[Span]) -> float:
    """Length of what the spans cover together, overlaps once."""
    if not spans:
        return 0.0
    start_E, end_E = np.asarray(sorted(spans)).T
    before_E = np.concatenate([[-np.inf], np.maximum.accumulate(end_E)[:-1]])
    return float(np.maximum(end_E - np.maximum(start_E, before_E), 0).sum())


def _name(plane: Any) -> str:
    return str(plane.name)

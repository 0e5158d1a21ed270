"""A model out of a training run: the run's folder or one of its checkpoints."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hebasr_jax.checkpoint import figures_of, find_fault, load
from hebasr_jax.errors import UserError
from hebasr_jax.optim import join
from hebasr_jax.paths import Tree, nested
from hebasr_jax.run_folder import read_json


def find_checkpoint(source: str) -> Path | None:
    """The checkpoint that a path names: itself, or a run's best; None if it is no such thing.

    The best is the one with the lowest validation WER, then loss; without validation the newest.
    """
    path = Path(source)
    if (path / "facts.json").is_file():
        return path
    if not (path / "checkpoints").is_dir():
        return None
    steps = [int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdecimal()]
    if not steps:
        raise UserError(
            f"{source} has no finished checkpoint", "it was not trained yet", "train it first"
        )
    table = figures_of(path)

    def rank(step: int) -> tuple[float, float, int]:
        row = table.get(str(step), {})
        figures = [row.get(name) for name in ("wer", "loss")]
        wer, loss = (float("inf") if figure is None else figure for figure in figures)
        return wer, loss, -step

    return path / "checkpoints" / str(min(steps, key=rank))


def model_files(checkpoint: Path) -> Path:
    """The folder with the config and tokenizer files of a checkpoint's run."""
    return checkpoint.absolute().parents[1] / "model"


def load_trained(checkpoint: Path) -> Tree:
    """A checkpoint's weights as one float32 tree on the host. Its files are verified first."""
    fault = find_fault(checkpoint)
    if fault:
        raise UserError(f"{checkpoint} is damaged", fault, "name another checkpoint of the run")
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    leaves = read_json(checkpoint / "facts.json")["leaves"]

    def part(name: str) -> Tree:
        """The shapes of one tree of the saved state."""
        found: dict[str, Any] = {}
        for path, described in leaves.items():
            if path.startswith(f"{name}/"):
                dtype, sizes = re.fullmatch(r"(\w+)\[(.*)\]", described).groups()  # type: ignore[union-attr]  # as saved
                shape = tuple(int(size) for size in sizes.split(",") if size)
                found[path.removeprefix(f"{name}/")] = jax.ShapeDtypeStruct(
                    shape, np.dtype(dtype), sharding=cpu
                )
        return nested(found)

    like = {"trained": part("trained"), "frozen": part("frozen")}
    state, _ = load(checkpoint, like, part=True)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.tree.map(np.asarray, join(state["trained"], state["frozen"]))

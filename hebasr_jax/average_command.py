"""The command `average`: its flags, and what it tells. Light to import: see `average.py`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from hebasr_jax import __version__
from hebasr_jax.config import Layout
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Config

if TYPE_CHECKING:
    from hebasr_jax.average import Choice, Row
    from hebasr_jax.members import Member
    from hebasr_jax.transcribe import Recognizer


@dataclass(frozen=True)
class Average:
    """Averages the best checkpoints of one or several runs; the best of all becomes a model.

    The average and each of its members are scored on the whole dev sets of the first run, and
    the one with the lowest WER is written. Scores are kept in the first run's folder: after a
    stop the same command goes on.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """run folders, or single checkpoints such as RUN/checkpoints/STEP"""
    out: Path
    """new folder for the model and averaging.json"""
    best: int = 3
    """how many checkpoints, the best of all runs together; single ones come on top"""
    by: Literal["wer", "loss"] = "wer"
    """what the best are best by, on the dev sets during training"""
    weights: str = "uniform"
    """uniform, softmax (of minus the dev loss), or one for each checkpoint: 0.5,0.3,0.2"""
    temperature: float | None = None
    """of softmax, in nats; by default 0.01, what neighbouring checkpoints differ by"""
    soup: bool = False
    """try also a greedy soup: a checkpoint joins only if the dev WER does not rise"""
    layout: Layout | None = None
    """layout to write; by default that of the model that the first run began with"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """store the weights so"""

    def run(self) -> int:
        from hebasr_jax.average import compare
        from hebasr_jax.config_file import config_of
        from hebasr_jax.data.sources import open_sources
        from hebasr_jax.export import refuse_taken
        from hebasr_jax.members import TEMPERATURE, best_members, member_weights, run_of
        from hebasr_jax.run_folder import read_json
        from hebasr_jax.trained import load_trained

        refuse_taken(self.out)  # before gigabytes are read and hours are scored
        if not self.runs:
            raise UserError("no run given", do="name run folders, such as runs/finetune")
        how = _how(self.weights)
        if self.temperature is not None and how != "softmax":
            raise UserError("--temperature is of softmax only", do="add --weights softmax")
        members = best_members(self.runs, self.best, self.by, say=_say)
        temperature = TEMPERATURE if self.temperature is None else self.temperature
        shares = member_weights(members, how, temperature)
        first = self.runs[0] if (self.runs[0] / "checkpoints").is_dir() else run_of(self.runs[0])
        config = config_of(read_json(first / "config.json"))
        if not config.data.dev:
            why = f"{first} has no set in data.dev"
            raise UserError("nothing can be compared", why, "name a run with a dev set first")
        base, layout = _open(first)
        sets = open_sources(config.data.dev)
        _say(f"scoring on {', '.join(f'{s.name} ({len(s.clips)} clips)' for s in sets)}")
        choice = compare(
            members,
            shares,
            lambda member: load_trained(member.checkpoint),
            lambda params: _score(base, params, config),
            soup=self.soup,
            kept=first / "averages",
            key=scoring_key(config, {s.name: s.fingerprint for s in sets}, base.compute.dtype),
            say=_say,
        )
        assert choice is not None
        self._write(choice, members, base, self.layout or layout)
        _show(choice.table)
        _say(f"wrote {self.out} ({self.layout or layout} layout): {choice.name}")
        return 0

    def _write(
        self, choice: "Choice", members: "Sequence[Member]", base: "Recognizer", layout: Layout
    ) -> None:
        """The model's folder with what it is an average of, or nothing."""
        import jax.numpy as jnp

        from hebasr_jax.data.workers import ended_as_by_ctrl_c
        from hebasr_jax.export import new_folder, write_model
        from hebasr_jax.run_folder import write_json

        with ended_as_by_ctrl_c(), new_folder(self.out) as folder:
            write_model(
                choice.params,
                base.config,
                base.folder.path,
                folder,
                layout,
                dtype=jnp.dtype(self.dtype),
            )
            content = {
                "name": choice.name,
                "weights": choice.weights,
                "members": [asdict(m) | {"checkpoint": str(m.checkpoint)} for m in members],
                "table": choice.table,
            }
            write_json(folder / "averaging.json", content)


def scoring_key(config: Config, fingerprints: dict[str, str], dtype: Any) -> str:
    """What scores on whole dev sets depend on besides the weights, for `average.compare`."""
    import numpy as np

    validation = {
        name: value
        for name, value in asdict(config.validation).items()
        if name not in ("every_steps", "max_clips")
    }
    settings = [config.seed, asdict(config.text), validation, np.dtype(dtype).name, __version__]
    return json.dumps([settings, fingerprints], sort_keys=True)


def _how(weights: str) -> Any:
    if weights in ("uniform", "softmax"):
        return weights
    try:
        return tuple(float(part) for part in weights.split(","))
    except ValueError:
        why = "weights are uniform, softmax, or numbers"
        raise UserError(f"--weights {weights} says nothing", why, "--weights 0.5,0.3,0.2") from None


def _open(run: Path) -> "tuple[Recognizer, Layout]":
    """The run's model without weights, as `transcribe` would compute with it."""
    import jax
    import jax.numpy as jnp

    from hebasr_jax.hub import ModelFolder
    from hebasr_jax.model.attention import pick_kernel
    from hebasr_jax.model.layers import Compute
    from hebasr_jax.transcribe import Recognizer, open_model

    files, model, layout, tokenizer = open_model(str(run / "model"))
    backend = jax.default_backend()
    dtype = jnp.dtype("bfloat16" if backend == "gpu" else "float32")
    compute = Compute(dtype, pick_kernel("auto", dtype, backend))
    folder = ModelFolder(files.path, str(run), None)
    return Recognizer({}, model, tokenizer, compute, folder), layout


def _score(base: "Recognizer", params: Any, config: Config) -> dict[str, Any]:
    from dataclasses import replace

    import jax

    from hebasr_jax.sharding import replicated
    from hebasr_jax.validate import score_sets

    whole = replicated(base.mesh)
    placed = jax.tree.map(
        lambda leaf: jax.device_put(leaf.astype(base.compute.dtype), whole), params
    )
    return score_sets(replace(base, params=placed), config.data.dev, config)


def _show(rows: "Sequence[Row]") -> None:
    """Prints every candidate to stderr, best first: fitted to a terminal, elsewhere in full."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from hebasr_jax.average import in_percent, order

    terminal = sys.stderr.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    sets = list(rows[0]["sets"])
    table.add_column("candidate", overflow="fold")
    table.add_column("weights", overflow="fold")
    for name in (*(["mean"] if len(sets) > 1 else []), *sets, "dev loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(rows, key=order):
        shares = [f"{share:.3g}" for share in row["weights"].values()]
        scores = [in_percent(row["wer"])] if len(sets) > 1 else []
        scores += [in_percent(row["sets"][name]["wer"], row["sets"][name]["ci95"]) for name in sets]
        loss = "?" if row["loss"] is None else f"{row['loss']:.4f}"
        table.add_row(row["name"], ", ".join(shares), *scores, loss)
    width = None if terminal else sys.maxsize
    console = Console(stderr=True, width=width, markup=False, emoji=False, highlight=False)
    console.print("WER on the dev sets, with 95 % intervals; the first is the best")
    console.print(table)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

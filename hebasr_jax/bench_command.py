"""The command `bench`: its flags, and what it prints. Light to import."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hebasr_jax.errors import UserError
from hebasr_jax.flags import given, refuse_unread

_SLOTS = (64, 128, 256, 512)
_PARTS: dict[str, tuple[str, ...]] = {
    "train": ("product", "fixed", "mix"),
    "generate": ("slots", "file"),
}
_ALWAYS = {"what", "size", "json"}
_READ: dict[str, set[str]] = {  # flags that each measurement reads besides
    "train": {
        "work", "rows", "mix_audio_s", "buckets", "steps", "remat", "unroll", "attention", "gather",
        "moments", "devices", "cut_over", "join_share", "peer", "dtype",
        "coordinator", "processes", "process",
    },
    "generate": {"work", "slots", "tokens", "minutes", "attention", "peer", "dtype"},
    "features": {"rows", "steps"},
    "data": {"threads", "audio_s"},
    "prepare": {"audio_s", "jobs", "source"},
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Speed of this machine with random weights of a real model's sizes.

    train: the whole step on clips of 30 s, and on a mix of lengths from shards on disk.
    generate: decoding with forced lengths, and a long file. features: they and each
    augmentation alone. data: shards to batches, no device. prepare: MP3 clips to shards.
    """

    what: Annotated[
        tyro.conf.Positional[Literal["train", "generate", "features", "data", "prepare"]],
        tyro.conf.arg(metavar="WHAT"),
    ]
    """train, generate, features, data or prepare"""
    size: Literal["1.7b", "0.6b", "tiny"] = "1.7b"
    """of the model"""
    json: bool = False
    """print one JSON object instead of a table; kept as runs/bench.json, --dry-run tells hours"""
    work: tuple[Literal["product", "fixed", "mix", "slots", "file"], ...] = ()
    """parts of `train` (product, fixed, mix) or of `generate` (slots, file); all by default"""
    rows: int = 32
    """clips of 30 s on each device in a step of the fixed work"""
    mix_audio_s: float = 960.0
    """seconds of padded audio on each device in a step of the mix"""
    buckets: int = 12
    """shapes of the mix"""
    steps: int = 20
    """timed steps or repeats"""
    slots: tuple[int, ...] = _SLOTS
    """rows decoded together on each device"""
    tokens: int = 150
    """new tokens that each clip of 30 s is made to have"""
    minutes: float = 60.0
    """length of the long file"""
    remat: Literal["none", "dots", "full"] = "dots"
    """what the backward pass recomputes, as in a config"""
    unroll: bool = False
    """layers one behind the other instead of in a loop, as in a config"""
    moments: Literal["float32", "bfloat16"] = "float32"
    """of the optimiser, as in a config"""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """attention kernel"""
    gather: Literal["step", "layer"] = "step"
    """when sharded weights are gathered"""
    devices: int | None = None
    """of the mesh; all by default"""
    cut_over: int | None = None
    """devices that weights and moments are cut over, as in a config; all by default"""
    coordinator: str | None = None
    """host:port of the first process of several, as `hebasr train` has it: the fixed work only"""
    processes: int | None = None
    """how many there are"""
    process: int | None = None
    """which of them this is, from 0"""
    join_share: float = 0.0
    """share of the short clips of the mix that are joined, as in a config"""
    peer: bool = False
    """first run transformers on the same work, in a process of its own (needs torch)"""
    threads: int = 16
    """that read shards in `data`"""
    audio_s: float = 60_000.0
    """seconds of audio that `data` writes and reads, and that `prepare` makes shards of"""
    jobs: tuple[int, ...] = ()
    """processes that make shards in `prepare`, one run each; 1 and one for each core by default"""
    source: Path | None = None
    """folder of audio files whose sound the clips of `prepare` have; noise by default"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of computing"""

    def run(self) -> int:
        from hebasr_jax.bench.figures import facts
        from hebasr_jax.distributed import is_first, start

        self._check()
        start(self.coordinator, self.processes, self.process)
        rows = self._peers() if self.peer else []  # before JAX takes the device's memory
        told = {"command": self._command()} | facts() | {"size": self.size}
        try:
            with tempfile.TemporaryDirectory(prefix="hebasr-bench-") as folder:
                for row in self._measured(Path(folder)):
                    rows.append(row)
                    if is_first():
                        _say("measured: " + ", ".join(f"{k} {_short(v)}" for k, v in row.items()))
        finally:  # what was measured before a fault is told all the same
            if is_first():
                self._tell(told, rows)
        return 0

    def _tell(self, told: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        from hebasr_jax.bench.figures import as_json
        from hebasr_jax.dry_run import show

        if self.json:
            print(as_json(self.what, told, rows))
            return
        print("  ".join(f"{name} {value}" for name, value in told.items()))
        for title, some in _alike(rows):
            show(title, some)

    def _check(self) -> None:
        """Refuses flags that make no work, or that this measurement does not read."""
        for name in ("rows", "steps", "buckets", "mix_audio_s", "tokens", "threads", "audio_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive")
        if min(self.jobs, default=1) < 1:
            raise UserError("--jobs must be positive")
        if self.tokens < 3 or min(self.slots, default=0) < 1 or self.minutes < 0.1:
            raise UserError("--tokens must be 3 or more, --slots 1 or more, --minutes 0.1 or more")
        if not 0 <= self.join_share <= 1:
            raise UserError("--join-share is a share", "it lies in 0..1")
        if self.processes and self.work != ("fixed",):
            raise UserError("several processes measure --work fixed only", do="add --work fixed")
        if foreign := set(self.work) - set(_PARTS.get(self.what, ())):
            raise UserError(
                f"--work {sorted(foreign)[0]} is no part of {self.what}",
                f"its parts are {', '.join(_PARTS.get(self.what, ())) or 'not told apart'}",
            )
        refuse_unread(self, _READ[self.what] | _ALWAYS, self.what)

    def _command(self) -> str:
        words = ["hebasr", "bench", self.what]
        for name, value in given(self).items():
            if name != "what":
                words.append(f"--{name.replace('_', '-')}")
                words += (
                    [] if value is True else map(str, value if type(value) is tuple else [value])
                )
        return " ".join(words)

    def _parts(self) -> tuple[str, ...]:
        return self.work or _PARTS[self.what]

    def _measured(self, folder: Path) -> Iterator[dict[str, Any]]:
        from hebasr_jax.bench.work import model_of

        if self.what == "train":
            yield from self._train(folder)
        elif self.what == "generate":
            yield from self._generate(folder)
        elif self.what == "features":
            from hebasr_jax.bench.features import by_part

            yield from by_part(model_of(self.size), self.rows, self.steps)
        elif self.what == "prepare":
            from hebasr_jax.bench.prepare import shards_made

            yield from shards_made(folder, self.audio_s, self.jobs, self.source, _say)
        else:
            from hebasr_jax.bench.data import fed

            yield from fed(model_of(self.size), folder, self.audio_s, self.threads, _say)

    def _peers(self) -> list[dict[str, Any]]:
        """What `bench.peer` prints; its module is the only one with torch."""
        if self.what not in ("train", "generate"):
            raise UserError(f"there is no peer for {self.what}", do="leave --peer out")
        if not importlib.util.find_spec("torch"):
            raise UserError("--peer needs torch", "it is not installed", "pip install torch")
        rows = [self.rows] if self.what == "train" else list(self.slots)
        module = [sys.executable, "-m", "hebasr_jax.bench.peer", self.what, self.size]
        flags = ["--steps", str(self.steps), "--tokens", str(self.tokens)]
        done = subprocess.run(
            [*module, *map(str, rows), *flags], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise UserError("the peer failed", f"exit code {done.returncode}", "see what it said")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def _train(self, folder: Path) -> Iterator[dict[str, Any]]:
        from hebasr_jax.bench import train
        from hebasr_jax.bench.work import model_of
        from hebasr_jax.run_config import Computation, Optim

        compute = Computation(
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            unroll=self.unroll,
            gather=self.gather,
            devices=self.devices,
            cut_over=self.cut_over,
            cache_dir=None,
        )
        settings = train.Settings(
            model_of(self.size),
            compute,
            self.rows,
            self.steps,
            self.mix_audio_s,
            self.buckets,
            self.join_share,
            Optim(moments=self.moments),
        )
        if "product" in self._parts():
            yield train.matrix_product()
        if "fixed" in self._parts():
            yield train.against_plain_attention(settings)
            yield train.fixed(settings)
        if "mix" in self._parts():
            yield train.mix(settings, folder, _say)

    def _generate(self, folder: Path) -> Iterator[dict[str, Any]]:
        from hebasr_jax.bench import generate
        from hebasr_jax.bench.work import model_of
        from hebasr_jax.run_config import Computation, Config
        from hebasr_jax.run_setup import compute_of

        asked = Computation(self.dtype, self.attention)
        compute = compute_of(Config(compute=asked))
        settings = generate.Settings(model_of(self.size), compute, self.slots, tokens=self.tokens)
        params = generate.random_params(settings.model, compute)
        yield {"attention": compute.kernel, "in": "encoder windows, prefill, cached decoding"}
        if "slots" in self._parts():
            yield from generate.in_slots(settings, params)
        if "file" in self._parts():
            yield generate.a_file(settings, params, folder, self.minutes)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _alike(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of one kind, by their first column, under one title."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(next(iter(row)), []).append(row)
    return list(groups.items())


def _say(line: str) -> None:
    """Everything that is not a result goes to stderr."""
    print(line, file=sys.stderr, flush=True)

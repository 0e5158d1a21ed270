"""How much work the steps since the last line of metrics.jsonl did, and how fast."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.config import CHUNK_FRAMES, CHUNK_TOKENS, ModelConfig
from hebasr_jax.data.clips import Batch
from hebasr_jax.distributed import from_all_hosts
from hebasr_jax.features import frame_count
from hebasr_jax.flops import train_flops
from hebasr_jax.model.encoder import audio_tokens


@dataclass(frozen=True)
class Work:
    """What one batch asks for (`real`) and what is computed with its padding.

    audio_s: seconds of the clips as they were recorded. frames: of the encoder. positions: of the
    decoder. flops: useful operations (`flops.train_flops`).
    """

    audio_s: float
    frames: int
    frames_computed: int
    positions: int
    positions_computed: int
    flops: float


def work_of(batch: Batch, audio_s: int, model: ModelConfig) -> Work:
    """Of a host's rows; `audio_s` is the bucket's length."""
    samples_B = np.floor(batch.samples_B / batch.speed_B.clip(min=0.1)).astype(np.int64)
    frames_B = frame_count(samples_B)
    tokens_B = audio_tokens(frames_B)
    text_B = np.where(batch.samples_B > 0, batch.text_lengths_B, 0)
    rows, columns = batch.text_BX.shape
    return Work(
        audio_s=float(batch.samples_B.sum()) / SAMPLE_RATE,
        frames=int(frames_B.sum()),
        frames_computed=rows * audio_s * CHUNK_FRAMES,
        positions=int((tokens_B + text_B).sum()),
        positions_computed=rows * (audio_s * CHUNK_TOKENS + columns),
        flops=train_flops(model, tokens_B, text_B, int(batch.in_loss_BX.sum())),
    )


@dataclass
class Window:
    """The steps since the last line, as far as this host worked on them. `devices`: of all."""

    devices: int
    losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    skipped: int = 0
    work: list[Work] = field(default_factory=list)
    waited_s: float = 0.0
    paused_s: float = 0.0
    began_s: float = field(default_factory=time.perf_counter)

    def restart(self, now_s: float | None = None) -> None:
        """Time counts from now, or from a reading of the clock."""
        self.waited_s, self.paused_s = 0.0, 0.0
        self.began_s = time.perf_counter() if now_s is None else now_s

    def line(self, step: int, steps: int, epoch: float, rates: Mapping[str, float]) -> dict:
        """The line of metrics.jsonl for the steps since the last one; begins the next window.

        All hosts call it: work is that of all, the wait and the memory those of the worst.
        """
        now_s = time.perf_counter()
        taken_s = max(now_s - self.began_s - self.paused_s, 1e-9)
        names = [entry.name for entry in fields(Work)]
        own = {name: sum(getattr(w, name) for w in self.work) for name in names}
        hosts = from_all_hosts([own, self.waited_s / taken_s, peak_bytes()])
        work = {name: sum(sums[name] for sums, _, _ in hosts) for name in names}
        finite = [loss for loss in self.losses if np.isfinite(loss)]
        told = {
            "kind": "train",
            "step": step,
            "steps": steps,
            "epoch": epoch,
            "loss": float(np.mean(finite)) if finite else float("nan"),
            "losses": list(self.losses),
            "grad_norm": self.grad_norm,
            "rates": dict(rates),
            "audio_s_per_s": work["audio_s"] / taken_s,
            "tflops": work["flops"] / taken_s / self.devices / 1e12,
            "padding_audio": 1 - work["frames"] / max(work["frames_computed"], 1),
            "padding_text": 1 - work["positions"] / max(work["positions_computed"], 1),
            "data_wait_share": max(waited for _, waited, _ in hosts),
            "skipped": self.skipped,
            "memory_bytes": max((peak for _, _, peak in hosts if peak), default=None),
        }
        self.losses, self.work = [], []
        self.restart(now_s)  # of waiting for the other hosts too
        return told


def peak_bytes() -> int | None:
    """Most memory that the first local device ever held; None where JAX does not count it."""
    stats: dict[str, Any] | None = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None

"""Features and augmentation alone: what each costs on the fixed work, and of the whole step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from hebasr_jax.bench import work
from hebasr_jax.bench.figures import Row, seconds_of, spread
from hebasr_jax.config import ModelConfig
from hebasr_jax.run_config import Augment
from hebasr_jax.train_step import prepare_inputs

_WARM_UP, _INNER = 3, 10

_ALONE = {
    "features": Augment(),
    "speed": Augment(speed_factors=work.AUGMENT.speed_factors),
    "noise": Augment(noise_share=1.0, noise_snr_db=work.AUGMENT.noise_snr_db),
    "band": Augment(band_share=1.0),
    "gain": Augment(gain_share=1.0),
    "masks": Augment(time_masks=2, mel_masks=2),
    "all of round 2.5": work.AUGMENT,
}


def by_part(model: ModelConfig, rows: int, repeats: int) -> list[Row]:
    """ms of log-mel features, and of each augmentation beyond them; shares at 1."""
    batch = jax.device_put(work.full_batch(model, rows))
    told = []
    plain_ms = 0.0
    for name, augment in _ALONE.items():
        run = _program(batch, augment, model.encoder.mel_bins)
        seconds_of(run, _WARM_UP)
        row = spread([taken_s / _INNER for taken_s in seconds_of(run, repeats)])
        plain_ms = plain_ms or row["ms"]
        speed = rows * work.CLIP_S / row["ms"] * 1e3
        added = {} if name == "features" else {"beyond features ms": row["ms"] - plain_ms}
        told.append({"part": name, **row, **added, "audio-s/s": speed})
    return told


def _program(batch: Any, augment: Augment, mel_bins: int) -> Callable[[], Any]:
    """Features of a batch several times over in one program: alone they are too short to time."""

    def once(batch: Any, number: Any) -> Any:
        moved = replace(batch, seed_B2=batch.seed_B2 + number)  # else one result would do for all
        shifted = replace(moved, wave_BS=batch.wave_BS + number.astype(batch.wave_BS.dtype))
        inputs = prepare_inputs(
            shifted, None, augment=augment, audio_s=work.CLIP_S, mel_bins=mel_bins
        )
        return inputs.mel_BTM.sum()

    numbers = np.arange(_INNER, dtype=np.uint32)
    program = jax.jit(lambda batch: jax.lax.map(partial(once, batch), numbers))
    return lambda: program(batch)

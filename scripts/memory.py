"""`python scripts/memory.py MODEL`: the largest batch of 30-s clips that each kind of card holds.

MODEL is a folder with config.json. By the formula of hebasr_jax/step_memory.py: all parameters
trained (or the recipe's stages), AdamW, bfloat16, cuDNN attention, 170 text tokens a clip.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hebasr_jax.config import ModelConfig, model_config, read_config
from hebasr_jax.model.asr import abstract_params
from hebasr_jax.optim import RateRow, rate_table
from hebasr_jax.run_config import Computation, Config, Group, Optim, Stage
from hebasr_jax.step_memory import Shape, memory_estimate

CARDS_GB, DEVICES, ROWS = (40, 48, 80, 141), (1, 2, 8), (64, 48, 32, 24, 16, 12, 8, 6, 4, 2, 1)
SPARE = 0.92  # of a card's memory is for the step; the rest is the driver's, XLA's and the batch's
WAYS = {  # the quickest first
    f"{remat}{', bfloat16 moments' * half}": Config(
        compute=Computation(remat=remat), optim=Optim(moments="bfloat16" if half else "float32")
    )
    for remat in ("dots", "full")
    for half in (False, True)
}
ENOUGH = 8  # clips: with fewer a slower way that holds more is told
FROZEN = Group(0.0)
STAGES = {
    "all": Stage(),
    "round 2, wide": Stage(
        conv_stem=FROZEN,
        encoder=Group(3e-5, trained_layers=8),
        decoder=Group(3e-5, trained_layers=12),
    ),
}


def main(folder: Path) -> None:
    model = model_config(read_config(folder))
    shapes = abstract_params(model)
    print("| trained | cards | 40 GB | 48 GB | 80 GB | 141 GB |\n|---|---|---|---|---|---|")
    for name, stage in STAGES.items():
        rates = rate_table(shapes, stage)
        for devices in DEVICES:
            cells = []
            for card_gb in CARDS_GB:
                fits = {
                    way: largest(model, config, stage, rates, devices, card_gb)
                    for way, config in WAYS.items()
                }
                way = next(
                    (way for way in fits if fits[way] >= ENOUGH),
                    max(fits, key=lambda way: fits[way]),
                )
                cells.append(f"{fits[way]} clips, {way}" if fits[way] else "does not fit")
            print(f"| {name} | {devices} | {' | '.join(cells)} |")


def largest(
    model: ModelConfig,
    config: Config,
    stage: Stage,
    rates: Sequence[RateRow],
    devices: int,
    card_gb: int,
) -> int:
    """Clips of 30 s on each card in one micro-batch; 0 when none fits."""
    for rows in ROWS:
        memory = memory_estimate(
            model,
            config,
            stage,
            rates,
            Shape(rows, 30, 170),
            devices=devices,
            kernel="cudnn",
            accumulated=True,
        )
        if memory.total <= SPARE * card_gb * 1e9:
            return rows
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))

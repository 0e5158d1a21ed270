"""Round 2.5's items on the demo's data and tiny model: for `--ablate`, in minutes on a CPU.

Stamps, contexts and a mix of sets are left out: the demo's corpus has none.


make demo     # once: makes the corpus and the model
python scripts/train.py --config configs/demo_recipe.py --ablate
"""

from dataclasses import replace

from configs.demo import get_config as demo
from hebasr_jax.run_config import Augment, Average, Config, Export, Group, Stage


def get_config() -> Config:
    config = demo()
    fast, slow = Group(5e-3, layer_decay=0.9), Group(2.5e-3, layer_decay=0.9)
    return replace(
        config,
        name="demo-recipe",
        augment=Augment(
            speed_factors=(0.9, 1.0, 1.1),
            time_masks=1,
            time_mask_frames=8,  # clips are a second long
            mel_masks=1,
            mel_mask_bins=12,
            noise_share=0.4,
            noise_snr_db=(15.0, 30.0),
        ),
        stages=(
            # A model that starts from nothing cannot learn from its upper layers alone: the first
            # stage trains all, the second lets the lowest part rest.
            Stage(
                "all",
                steps=300,
                conv_stem=fast,
                encoder=fast,
                projector=fast,
                embedding=fast,
                decoder=fast,
            ),
            Stage(
                "upper",
                steps=700,
                conv_stem=Group(0.0),
                encoder=slow,
                projector=fast,
                embedding=fast,
                decoder=fast,
            ),
        ),
        train=replace(config.train, steps=1000, keep_best=3),
        average=Average(best=3),
        export=Export(),
    )

"""A plain fine-tune of Qwen3-ASR-1.7B on your own manifest: the config to copy and change.

python scripts/train.py --config configs/finetune.py --dry-run
"""

from hebasr_jax.run_config import (
    Augment,
    Average,
    Config,
    Data,
    Export,
    Group,
    Model,
    Optim,
    Source,
    Stage,
    Train,
    Validation,
)


def get_config() -> Config:
    return Config(
        name="finetune",
        model=Model("Qwen/Qwen3-ASR-1.7B"),
        data=Data(
            # One JSON object a line: {"audio": "a.flac", "text": "...", "duration_s": 3.2, ...}
            train=(Source("mine", "data/train.jsonl"),),
            dev=(Source("dev", "data/dev.jsonl"),),
            batch_clips=64,
            buckets=8,
            join_share=1.0,
            threads=16,
        ),
        augment=Augment(speed_factors=(0.9, 1.0, 1.1), time_masks=2, mel_masks=2),
        optim=Optim(warmup_steps=500),
        stages=(
            Stage(
                epochs=3,
                conv_stem=Group(0.0),
                encoder=Group(1e-5, layer_decay=0.95),
                projector=Group(1e-4),
                embedding=Group(1e-5),
                decoder=Group(2e-5, layer_decay=0.95),
            ),
        ),
        train=Train(checkpoint_steps=500),
        validation=Validation(every_steps=500),
        average=Average(best=3),
        export=Export(layouts=("original", "transformers")),
    )

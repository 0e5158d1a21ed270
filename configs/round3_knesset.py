"""Round 3, first phase: Knesset plenums alone, three epochs, as ivrit.ai's large-v3 began.

Source: model card of ivrit-ai/whisper-large-v3-turbo (April 2025) and the defaults of
ivrit-ai/asr-training. Its export is what configs/round3_mixed.py starts from.

python scripts/train.py --config configs/round3_knesset.py --dry-run
"""

from dataclasses import replace

from configs.round1 import get_config as round1
from configs.round1 import ivrit
from hebasr_jax.run_config import (
    Config,
    Export,
    Group,
    Optim,
    Source,
    Stage,
    Text,
    Train,
    Validation,
)

KNESSET = "ivrit-ai/knesset-plenums-whisper-training"


def normalised(source: Source) -> Source:
    """Niqqud, direction marks, brackets and speakers' names go before the model learns them."""
    return replace(source, normalizer="hebrew-v1")


def get_config() -> Config:
    config = round1()
    every = Group(1e-5)
    return replace(
        config,
        name="round3_knesset",
        # Shares of all rows, drawn anew in each epoch (source: once for all). One context in ten
        # is another recording's, lest the model copy it; not in the source.
        text=Text(stamp_share=0.4, context_share=0.5, wrong_context_share=0.1),
        data=replace(
            config.data,
            train=(normalised(ivrit("knesset", KNESSET)),),
            # Checkpoints are chosen on talk as well as on parliament, whose protocol is edited.
            dev=tuple(map(normalised, config.data.dev)),
            batch_clips=32,
            max_text_tokens=768,  # source: 448 of Whisper; here 30 s, stamps and 224 tokens before
        ),
        # No augmentation: the source has none, and what it would add is measured by ablation.
        optim=Optim(
            beta2=0.999,
            weight_decay=0.05,
            clip_norm=1.0,
            warmup_steps=800,
            final_rate=0.0,
            decay="linear",
        ),
        # All parts at one rate, as in the source, whose encoder is trained too.
        stages=(
            Stage(
                epochs=3,
                conv_stem=every,
                encoder=every,
                projector=every,
                embedding=every,
                decoder=every,
            ),
        ),
        # About 81,000 steps (864,000 rows); source: every 500, and all are kept.
        train=Train(checkpoint_steps=1000, keep_last=2, keep_best=3),
        validation=Validation(every_steps=1000),
        # In the layout that the next phase reads, in full precision; a base is not for others.
        export=Export(layouts=("original",), dtype="float32", upload=False),
    )

"""Round 3, second phase: two runs on crowd-transcribe, recital and the best of Knesset, merged.

Source: model card of ivrit-ai/whisper-large-v3-turbo (April 2025): 90, 2.5 and 7.5 % of the rows,
two epochs, and a weighted average of the best checkpoint of each of two runs.

python scripts/train.py --config configs/round3_mixed.py --dry-run
python scripts/train.py --config configs/round3_mixed.py --set seed=1 name=round3_mixed_1
python scripts/train.py --config configs/round3_mixed.py --set seed=2 name=round3_mixed_2

The two best of both runs together, which may be of one run:
hebasr average runs/round3_mixed_1 runs/round3_mixed_2 --best 2 --by loss --out runs/round3

The best of each run, as the source has it; S and T have the lowest loss in each run's best.json:
hebasr average runs/round3_mixed_1/checkpoints/S runs/round3_mixed_2/checkpoints/T --out runs/round3

Checkpoints are scored on the dev sets of the first run, and a mean is only kept if it is better
than each of its members. `--weights 0.6,0.4` gives them weights of your own.
"""

from dataclasses import replace

from configs.round1 import ivrit
from configs.round3_knesset import KNESSET, normalised
from configs.round3_knesset import get_config as knesset
from hebasr_jax.run_config import Average, Config, Export, Mix, Model, Train, Validation


def get_config() -> Config:
    config = knesset()
    train = (
        normalised(ivrit("crowd-transcribe", "ivrit-ai/crowd-transcribe-v5")),
        normalised(ivrit("crowd-recital", "ivrit-ai/crowd-recital-whisper-training")),
        # Source: the best 150 hours. The dry run tells the hours: move the threshold until so.
        replace(normalised(ivrit("knesset-best", KNESSET)), min_quality=0.9),
    )
    mix = (
        Mix("crowd-transcribe", 0.9),
        Mix("crowd-recital", 0.025),
        Mix("knesset-best", 0.075),
    )
    (stage,) = config.stages
    return replace(
        config,
        name="round3_mixed",
        model=Model("runs/round3_knesset/export/original"),
        data=replace(
            config.data,
            train=train,
            # all_exhausted: by the published sizes 288,000 draws an epoch, crowd 1.27 times,
            # recital 1.04, Knesset once; a set is not repeated more although sizes be other.
            exhaust=True,
            max_repeats=1.5,
            buckets=12,  # clips of 1 to 30 s, where Whisper pads all to 30
        ),
        stages=(replace(stage, epochs=2, mix=mix),),
        # About 18,000 steps; the best lie near the end, by loss as by WER.
        train=Train(checkpoint_steps=500, keep_last=2, keep_best=3),
        validation=Validation(every_steps=500),
        # The run's own average is not made: two runs are merged.
        average=Average(best=1, by="loss"),
        export=Export(layouts=("original", "transformers"), upload=False),
    )

"""Round 2.5: Round 2 and Knesset, speed, noise, time stamps, previous text, averaging of three.

Source: the design of Round 2.5 in ozlabsai/Caspi and the model cards of ivrit.ai.

python scripts/train.py --config configs/round2_5.py --dry-run
"""

from dataclasses import replace

from configs.round1 import ivrit
from configs.round2 import get_config as round2
from hebasr_jax.run_config import Average, Config, Mix, Text


def get_config() -> Config:
    config = round2()
    # Source: 0.5, 0.3, 0.2 until the last set is used up, which repeats 50 hours of recital fifty
    # times. Here data.max_repeats caps a set at four times an epoch, and the plan table tells.
    mix = (Mix("knesset", 0.5), Mix("crowd-transcribe", 0.3), Mix("crowd-recital", 0.2))
    return replace(
        config,
        name="round2_5",
        # Shares of all rows of the mix, drawn anew in each epoch (ivrit: once for all).
        # Knesset and recital have what is drawn; crowd-transcribe has neither.
        # One context in ten is another recording's, lest the model copy it; not in the source.
        text=Text(stamp_share=0.4, context_share=0.5, wrong_context_share=0.1),
        data=replace(
            config.data,
            train=(
                *config.data.train,
                ivrit("knesset", "ivrit-ai/knesset-plenums-whisper-training"),
            ),
            max_text_tokens=768,  # 30 s with stamps, and up to 224 tokens of previous text
            max_repeats=4.0,
        ),
        augment=replace(
            config.augment,
            speed_factors=(0.9, 1.0, 1.1),  # by resampling, as Kaldi; source: by interpolation
            noise_share=0.2,  # source: half of the clips are augmented, 40 % of those with noise
            noise_snr_db=(15.0, 30.0),
            # Not taken: pitch by +-2 semitones, a second change of pitch beside the speed's.
            band_share=0.1,  # telephone-like, for eval-whatsapp; not in the source
        ),
        stages=tuple(replace(stage, mix=mix) for stage in config.stages),
        # Source: the three best by WER so far, in bfloat16, neither evaluated nor uploaded.
        average=Average(best=3, by="wer"),
    )

"""Round 1: the official fine-tuning of Qwen3-ASR on Hebrew, with its defects mended.

Source: finetuning/qwen3_asr_sft.py of QwenLM/Qwen3-ASR (June 2026). Mended here, by the engine:
padding never counts in the loss, accumulation is weighted by tokens, weights and moments are
float32, and the encoder keeps its 8-second windows in training.

python scripts/train.py --config configs/round1.py --dry-run
"""

from hebasr_jax.run_config import (
    Config,
    Data,
    Export,
    Group,
    Model,
    Optim,
    Source,
    Stage,
    Text,
    Train,
    Validation,
)

_IVRIT = "ivrit.ai licence v2: CC-BY-4.0 terms, for training AI models or research only"


_SCHEMAS = {
    "ivrit-ai/crowd-transcribe-v5": "crowd-transcribe-v5",
    "ivrit-ai/crowd-recital-whisper-training": "crowd-recital",
    "ivrit-ai/knesset-plenums-whisper-training": "knesset-plenums",
}


def ivrit(name: str, hub: str, part: str = "train") -> Source:
    """Shards made from a gated ivrit.ai set by `hebasr prepare --config` of this file."""
    path = f"data/{hub.split('/')[1]}/{part}"
    return Source(name, path, hub=hub, licence=_IVRIT, schema=_SCHEMAS[hub])


def get_config() -> Config:
    every = Group(2e-5)
    return Config(
        name="round1",
        model=Model("Qwen/Qwen3-ASR-1.7B"),
        # The script trains on text after a given prefix; so does language_in_prompt.
        text=Text(language="Hebrew", language_in_prompt=True),
        data=Data(
            train=(
                ivrit("crowd-transcribe", "ivrit-ai/crowd-transcribe-v5"),
                ivrit("crowd-recital", "ivrit-ai/crowd-recital-whisper-training"),
            ),
            # Whole recordings, never a random share of clips: those leak speakers and neighbours.
            dev=(
                ivrit("crowd-transcribe-dev", "ivrit-ai/crowd-transcribe-v5", "dev"),
                ivrit("crowd-recital-dev", "ivrit-ai/crowd-recital-whisper-training", "dev"),
            ),
            batch_clips=128,  # 32 on a device x 4 accumulated, whatever the number of devices
            buckets=8,  # the script pads to the longest of each batch; here shapes are few
            threads=16,
        ),
        optim=Optim(
            beta2=0.999,
            weight_decay=0.0,
            clip_norm=1.0,
            warmup_steps=33,  # 2 % of about 1,650 steps
            final_rate=0.0,
            decay="linear",
        ),
        stages=(
            Stage(conv_stem=every, encoder=every, projector=every, embedding=every, decoder=every),
        ),
        # The script keeps 5 checkpoints of 200 steps; here 2, and the best 3 by WER and by loss.
        train=Train(checkpoint_steps=200, keep_last=2, keep_best=3),
        validation=Validation(every_steps=200),
        export=Export(layouts=("original", "transformers")),
    )

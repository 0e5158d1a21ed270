"""Round 1: the official fine-tuning of Qwen3-ASR on Hebrew, with its defects mended.

Source: finetuning/qwen3_asr_sft.py of QwenLM/Qwen3-ASR (June 2026). Mended here, by the engine:
padding never counts in the loss, accumulation is weighted by tokens, weights and moments are
float32, and the encoder keeps its 8-second windows in training.

python scripts/train.py --config configs/round1.py --dry-run
"""

from dataclasses import replace

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


PANEL = "data/panel"  # made by `hebasr panel --config` of a recipe, after `hebasr prepare`


def ivrit(name: str, hub: str) -> Source:
    """Shards made from a gated ivrit.ai set by `hebasr prepare --config` of this file, without
    what the dev panel holds out of it."""
    schema = _SCHEMAS[hub]
    without = (f"{PANEL}/{schema}/not_for_training.jsonl",)
    path = f"data/{hub.split('/')[1]}/train"
    return Source(name, path, hub=hub, licence=_IVRIT, schema=schema, without=without)


def held_out(source: Source, name: str) -> Source:
    """Clips that the panel holds out of a training set: whole speakers or recordings."""
    return replace(source, name=name, without=(), only=f"{PANEL}/{source.schema}/dev.jsonl")


def panel() -> tuple[Source, ...]:
    """A dev set for each kind of test set. Checkpoints have the lowest mean WER over them."""
    crowd = "ivrit-ai/crowd-transcribe-v5"
    recital = ivrit("crowd-recital", "ivrit-ai/crowd-recital-whisper-training")
    knesset = ivrit("knesset", "ivrit-ai/knesset-plenums-whisper-training")
    voice = "mozilla-foundation/common_voice_17_0"
    kan = Source("kan", "data/kan/train", hub="imvladikon/hebrew_speech_kan", schema="kan")
    return (
        Source("podcasts", f"{PANEL}/podcasts/dev_long.jsonl", hub=crowd, licence=_IVRIT),
        Source("voice-notes", f"{PANEL}/voice-notes/dev_long.jsonl", hub=crowd, licence=_IVRIT),
        held_out(recital, "recital-dev"),
        held_out(knesset, "knesset-dev"),
        Source(
            "fleurs-dev",
            "data/fleurs/validation",
            split="validation",
            hub="google/fleurs",
            schema="fleurs",
        ),
        Source(
            "common-voice-dev",
            "data/common_voice_17_0/validation",
            split="validation",
            hub=voice,
            schema="common-voice",
        ),
        # No licence is stated; it is scored, and nothing is trained on it.
        replace(held_out(kan, "kan-dev"), accept_licence=True),
    )


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
            dev=panel(),
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

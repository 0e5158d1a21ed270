"""What is trained: every run of the experiment, its model and its config."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hebasr_jax.config import ModelConfig
from hebasr_jax.demo_corpus import learn_merges
from hebasr_jax.optim import GROUP_NAMES
from hebasr_jax.run_config import (
    Augment,
    Computation,
    Config,
    Data,
    Group,
    Model,
    Optim,
    Source,
    Stage,
    Text,
    Train,
    Validation,
)
from hebasr_jax.tiny import TINY, with_merges, write_tiny_model

Engine = Literal["ours", "torch", "torch-reversed"]
_ALL = 1 << 20
_PROMPT = ["system\n", "user\n", "assistant\n", "language Hebrew"]  # few tokens, as really


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    train: manifests below the folder of sets, with their shares. test: sets whose test parts are
    scored, of each its first `test_clips`. merges: byte pairs of the tokenizer. width: of both
    stacks. validate_steps: also between checkpoints. rate: of all groups.
    """

    train: tuple[tuple[str, float], ...]
    test: tuple[str, ...]
    merges: int
    width: int
    encoder_layers: int
    decoder_layers: int
    steps: int
    validate_steps: int
    buckets: int
    rate: float
    optim: Optim
    augment: Augment
    stamps: bool = False
    test_clips: int | None = None


@dataclass(frozen=True)
class Run:
    """One training run. `torch-reversed` takes each batch's rows in reverse order: the same
    mathematics, other rounding; how far two runs of torch part by themselves."""

    recipe: str
    engine: Engine
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.engine}-{self.seed}"


# The same AdamW in both engines, no augmentation: the losses can be compared step by step.
_PLAIN = Recipe(
    train=(("fsdd/train", 1.0),),
    test=("fsdd",),
    merges=60,
    width=96,
    encoder_layers=3,
    decoder_layers=2,
    steps=1200,
    validate_steps=400,
    buckets=2,
    rate=1e-3,
    optim=Optim(epsilon=1e-6, clip_norm=0.5, warmup_steps=200),
    augment=Augment(),
)
# As well as a small model can in some minutes: Muon, augmentation, all the Hebrew there is.
_BEST = Recipe(
    train=(("chant/train", 0.35), ("chant/pieces", 0.35), ("words/train", 0.3)),
    test=("chant", "words"),
    merges=48,
    width=144,
    encoder_layers=4,
    decoder_layers=3,
    steps=5000,
    validate_steps=1000,
    buckets=4,
    rate=4e-3,
    optim=Optim(matrices="muon", final_rate=0.02, warmup_steps=100),
    augment=Augment(speed_factors=(0.9, 1.0, 1.1), time_masks=2, time_mask_frames=40, mel_masks=2),
)
_CHANT = (("chant/train", 0.5), ("chant/pieces", 0.5))
RECIPES = {
    "fsdd": _PLAIN,
    "words": replace(
        _PLAIN, train=(("words/train", 1.0),), test=("words",), steps=600, validate_steps=300
    ),
    "chant": replace(
        _PLAIN, train=_CHANT, test=("chant",), steps=400, validate_steps=200, test_clips=64
    ),
    "hebrew": _BEST,
    "digit-stamps": replace(_PLAIN, stamps=True),
    "stamps": replace(_BEST, train=_CHANT, test=("chant",), steps=4000, stamps=True),
}
# The first are the ones that the gates need; at a deadline the last are cut.
RUNS = (
    Run("stamps", "ours", 0),
    Run("hebrew", "ours", 0),
    *(Run("fsdd", engine, seed) for seed in range(3) for engine in ("ours", "torch")),
    Run("fsdd", "torch-reversed", 0),
    Run("chant", "torch", 0),
    Run("words", "torch", 0),
    Run("words", "ours", 0),
    Run("chant", "ours", 0),
    Run("digit-stamps", "ours", 0),
)


def make_config(run: Run, sets: Path, out: Path, shrink: float = 1.0) -> Config:
    """The run's config; the run folder is `out / run.name`.

    Args:
      shrink: divides the number of steps, for a quick look whether all works.
    """
    recipe = RECIPES[run.recipe]
    steps = max(round(recipe.steps / shrink), 2)
    every = max(round(recipe.validate_steps / shrink), 1)
    return Config(
        name=run.name,
        runs_dir=str(out),
        seed=run.seed,
        model=Model(str(out / "models" / run.name)),
        text=Text(stamp_share=1.0 if recipe.stamps else 0.0),
        data=Data(
            train=tuple(
                Source(name.replace("/", "-"), f"{sets / name}.jsonl", share)
                for name, share in recipe.train
            ),
            dev=tuple(Source(name, str(sets / name / "test.jsonl")) for name in recipe.test),
            batch_clips=32,
            buckets=recipe.buckets,
            threads=3,
        ),
        augment=recipe.augment,
        compute=Computation(dtype="float32", remat="none", cache_dir=None),
        optim=recipe.optim,
        stages=(Stage(**dict.fromkeys(GROUP_NAMES, Group(recipe.rate))),),
        train=Train(steps=steps, checkpoint_steps=every, keep_last=1, keep_best=0, log_steps=1),
        validation=Validation(
            every_steps=0 if recipe.stamps else every,
            max_clips=recipe.test_clips,
            batch_audio_s=2000.0,
            samples=_ALL,
            bootstrap=1000,
        ),
    )


def write_model(run: Run, sets: Path, folder: Path) -> None:
    """The model that a run starts from: random by its seed, a tokenizer of its training texts."""
    recipe = RECIPES[run.recipe]
    manifests = [(sets / f"{name}.jsonl").read_bytes() for name, _ in recipe.train]
    texts = [json.loads(line)["text"] for lines in manifests for line in lines.splitlines()]
    merges = learn_merges([*_PROMPT * len(texts), *texts], recipe.merges)
    config = with_merges(model_sizes(recipe), len(merges))
    write_tiny_model(
        folder, seed=run.seed, config=config, merges=merges, conv_gains=(8.0, 2.0, 2.0)
    )


def model_sizes(recipe: Recipe) -> ModelConfig:
    width = recipe.width
    encoder = replace(
        TINY.encoder, width=width, layers=recipe.encoder_layers, heads=4, mlp_width=4 * width
    )
    decoder = replace(
        TINY.decoder,
        width=width,
        layers=recipe.decoder_layers,
        heads=4,
        kv_heads=2,
        head_dim=width // 4,
        mlp_width=8 * width // 3,
        rope_theta=1e4,
    )
    return replace(TINY, encoder=encoder, decoder=decoder)

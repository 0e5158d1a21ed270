"""The work that is measured: sizes, clips, lengths and texts, all made here from a seed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.config import DecoderConfig, EncoderConfig, ModelConfig
from hebasr_jax.data.clips import Batch, Clip, ClipSet
from hebasr_jax.layout import write_settings
from hebasr_jax.run_config import Augment
from hebasr_jax.text import load_tokenizer
from hebasr_jax.tiny import TINY, with_merges, write_byte_tokenizer

_LARGE = ModelConfig(  # Qwen3-ASR-1.7B, qwen3-asr.md 1.1
    encoder=EncoderConfig(
        mel_bins=128,
        conv_channels=480,
        width=1024,
        layers=24,
        heads=16,
        mlp_width=4096,
        window_chunks=8,
    ),
    decoder=DecoderConfig(
        vocab_size=151936,
        width=2048,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        mlp_width=6144,
        max_positions=65536,
        rope_theta=1e6,
        norm_eps=1e-6,
    ),
    audio_token_id=151676,
)
# Only what is measured or tested by size; a model's own sizes come from its config.json.
SIZES: dict[str, ModelConfig] = {
    "1.7b": _LARGE,
    "0.6b": replace(
        _LARGE,
        encoder=replace(_LARGE.encoder, width=896, layers=18, heads=14, mlp_width=3584),
        decoder=replace(_LARGE.decoder, width=1024, mlp_width=3072),
    ),
    "tiny": TINY,
}

CLIP_S, PROMPT_TOKENS, TARGET_TOKENS = 30, 20, 150
"""The fixed work: clips of 30 s with 20 tokens of prompt, 9 of them before the audio, and 150."""
_BEFORE = 9

# configs/round2_5.py with every share at 1; a test compares the two.
AUGMENT = Augment(
    speed_factors=(0.9, 1.0, 1.1),
    time_masks=2,
    time_mask_frames=80,
    time_mask_share=0.2,
    mel_masks=2,
    mel_mask_bins=27,
    noise_share=1.0,
    noise_snr_db=(15.0, 30.0),
    band_share=1.0,
)
_WORDS = ("system", "user", "assistant", "language", "\u0120Hebrew")  # \u0120 is a space
_MERGES = tuple(dict.fromkeys((word[:n], word[n]) for word in _WORDS for n in range(1, len(word))))


def full_batch(model: ModelConfig, rows: int, seed: int = 0) -> Batch:
    """`rows` clips of the fixed work, at speed 1, so that each has the 390 tokens it is said to."""
    rng = np.random.default_rng(seed)
    text = PROMPT_TOKENS + TARGET_TOKENS
    samples = CLIP_S * SAMPLE_RATE
    in_loss_BX = np.zeros((rows, text), bool)
    in_loss_BX[:, PROMPT_TOKENS:] = True
    return Batch(
        wave_BS=np.stack([noise(rng, samples) for _ in range(rows)]),
        samples_B=np.full(rows, samples, np.int32),
        speed_B=np.ones(rows, np.float32),
        seed_B2=rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
        text_BX=rng.integers(0, model.audio_token_id, (rows, text)).astype(np.int32),
        text_lengths_B=np.full(rows, text, np.int32),
        audio_at_B=np.full(rows, _BEFORE, np.int32),
        in_loss_BX=in_loss_BX,
    )


def noise(rng: np.random.Generator, samples: int) -> Int[np.ndarray, " S"]:
    """Gaussian noise whose level changes five times a second, as syllables do; int16."""
    level = np.repeat(np.clip(rng.lognormal(0.0, 0.8, -(-samples // 3200)), 0, 3), 3200)[:samples]
    return (1500 * level * rng.standard_normal(samples, np.float32)).astype(np.int16)


def ivrit_mix(clips: int, seed: int) -> Float[np.ndarray, " C"]:
    """Lengths in seconds of a made-up mix like that of ivrit.ai's sets (design, section 5).

    70 % are lognormal with median 3.9 s and sigma 0.65 within 0.6 to 20 s; the others are 30 s less
    an exponential of mean 4 s, within 8 to 30 s.
    """
    rng = np.random.default_rng(seed)
    short_C = np.clip(rng.lognormal(np.log(3.9), 0.65, clips), 0.6, 20.0)
    long_C = np.clip(30.0 - rng.exponential(4.0, clips), 8.0, 30.0)
    return np.where(rng.random(clips) < 0.7, short_C, long_C)


def target_tokens(seconds: float) -> int:
    """Text positions of a clip, the end token included: 4 and 5 a second."""
    return 4 + round(5 * float(seconds))


def made_up_set(seconds_C: Sequence[float], seed: int) -> ClipSet:
    """Clips of these lengths: parts of one noise, each with a text of as many tokens as it should.

    A text is of digits, each a token of its own in the tokenizer that `write_model_files` writes.
    """
    rng = np.random.default_rng(seed)
    samples_C = np.round(np.asarray(seconds_C) * SAMPLE_RATE).astype(np.int64)
    base = noise(rng, 2 * int(samples_C.max()))
    start_C = rng.integers(0, len(base) - samples_C + 1)
    digits = rng.integers(0, 10, 4 + int(5 * max(seconds_C)) + 1)
    clips = tuple(
        Clip(str(n), "".join(map(str, digits[: tokens - 1])), int(samples) / SAMPLE_RATE)
        for n, (samples, tokens) in enumerate(
            zip(samples_C, map(target_tokens, seconds_C), strict=True)
        )
    )
    return ClipSet(
        "mix", clips, lambda n: base[start_C[n] : start_C[n] + samples_C[n]], f"made up, {seed}"
    )


def model_of(size: str) -> ModelConfig:
    """The sizes of a model, its ids those of the tokenizer that `write_model_files` writes."""
    config = SIZES[size]
    small = with_merges(config, len(_MERGES))
    whole = max(config.decoder.vocab_size, small.decoder.vocab_size)
    return replace(small, decoder=replace(small.decoder, vocab_size=whole))


def write_model_files(model: ModelConfig, folder: Path) -> None:
    """Config and tokenizer files, no weights.

    Of the real vocabulary the tokenizer knows the bytes and the words of the prompt, so that a
    prompt has the real one's 18 text tokens.
    """
    write_byte_tokenizer(folder, _MERGES)
    write_settings(folder, model, load_tokenizer(folder), "transformers", "bfloat16")

"""Tiny random models of the real classes with a tokenizer of bytes, for `make demo` and tests."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from hebasr_jax.config import DecoderConfig, EncoderConfig, ModelConfig
from hebasr_jax.export import new_folder
from hebasr_jax.layout import write_json, write_settings
from hebasr_jax.model.asr import init_params
from hebasr_jax.text import load_tokenizer
from hebasr_jax.timestamps import STAMP_TOKENS
from hebasr_jax.weights import save_params

# The control tokens of the real tokenizer, in its order; True: dropped from decoded text.
CONTROL = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|audio_start|>", True),
    ("<|audio_end|>", True),
    ("<|audio_pad|>", True),
    ("<asr_text>", False),
)
_BYTES = 256
_SPARE = 1 + len(STAMP_TOKENS)  # rows for the filler and the time stamps

TINY = ModelConfig(
    encoder=EncoderConfig(
        mel_bins=128,
        conv_channels=16,
        width=32,
        layers=2,
        heads=4,
        mlp_width=64,
        window_chunks=8,
    ),
    decoder=DecoderConfig(
        vocab_size=_BYTES + len(CONTROL) + _SPARE,
        width=48,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp_width=96,
        max_positions=4096,
        rope_theta=1e6,
        norm_eps=1e-6,
    ),
    audio_token_id=_BYTES + [name for name, _ in CONTROL].index("<|audio_pad|>"),
)


def with_merges(config: ModelConfig, merges: int) -> ModelConfig:
    """The same sizes with a vocabulary of the 256 bytes, so many merges and the control tokens."""
    audio_pad = [name for name, _ in CONTROL].index("<|audio_pad|>")
    vocabulary = _BYTES + merges + len(CONTROL) + _SPARE
    return replace(
        config,
        decoder=replace(config.decoder, vocab_size=vocabulary),
        audio_token_id=_BYTES + merges + audio_pad,
    )


def write_tiny_model(
    destination: Path,
    *,
    seed: int = 0,
    config: ModelConfig = TINY,
    merges: Sequence[tuple[str, str]] = (),
    conv_gains: Sequence[float] = (1.0, 1.0, 1.0),
) -> None:
    """A model folder in the transformers layout with random float32 weights.

    Args:
      merges: of the tokenizer; `config` must have room for them (`with_merges`).
      conv_gains: factors on the first weights of the three convolutions: GELU passes little of
        a small signal on, so that a stem that starts too faint is slow to learn.
    """
    with new_folder(destination) as folder:
        write_byte_tokenizer(folder, merges)
        write_settings(folder, config, load_tokenizer(folder), "transformers", "float32")
        params = init_params(config, jax.random.key(seed))
        for number, gain in enumerate(conv_gains, start=1):
            params["encoder"][f"conv{number}"]["kernel"] *= gain
        save_params(params, config, "transformers", folder)


def write_byte_tokenizer(folder: Path, merges: Sequence[tuple[str, str]] = ()) -> None:
    """tokenizer.json of the 256 bytes, the given merges and the control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(name, special=special, normalized=False) for name, special in CONTROL]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    audio = {
        "audio_token": "<|audio_pad|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen3ASRProcessor",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "extra_special_tokens": [name for name, special in CONTROL if special],
        "model_specific_special_tokens": audio,
        **audio,
    }
    write_json(folder / "tokenizer_config.json", settings)

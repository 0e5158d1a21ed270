"""Sizes of the released models (qwen3-asr.md 1.1); the package reads a model's own config.json."""

from hebasr_jax.bench.work import SIZES

LARGE, SMALL = SIZES["1.7b"], SIZES["0.6b"]

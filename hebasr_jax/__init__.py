"""Qwen3-ASR in JAX: weights in and out of Hugging Face form, training and decoding for Hebrew."""

__version__ = "0.1.0"

"""Sizes of the released models (qwen3-asr.md 1.1); the package itself reads config.json only."""

from dataclasses import replace

from hebasr_jax.config import DecoderConfig, EncoderConfig, ModelConfig

LARGE = ModelConfig(  # Qwen3-ASR-1.7B
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
SMALL = replace(  # Qwen3-ASR-0.6B
    LARGE,
    encoder=replace(LARGE.encoder, width=896, layers=18, heads=14, mlp_width=3584),
    decoder=replace(LARGE.decoder, width=1024, mlp_width=3072),
)

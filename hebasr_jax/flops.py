"""Useful floating-point operations of a training step, by the formula of the design's section 5.

What counts is the work that the clips ask for: the encoder and the decoder with their attention
at every real position, the head at target positions only; padding, recomputation, norms and the
optimiser do not count. The backward pass counts twice the forward pass, whatever is frozen.
"""

import numpy as np
from jaxtyping import Int

from hebasr_jax.config import CHUNK_FRAMES, CHUNK_TOKENS, EncoderConfig, ModelConfig

_KERNEL = 3 * 3


def train_flops(
    model: ModelConfig,
    audio_tokens_B: Int[np.ndarray, " B"],
    text_tokens_B: Int[np.ndarray, " B"],
    targets: int,
) -> float:
    """Operations of one step over these rows.

    Args:
      audio_tokens_B: audio tokens of each row (`encoder.audio_tokens`), 0 in rows that only fill.
      text_tokens_B: prompt and target tokens of each row; of rows with audio only.
      targets: tokens in the loss, of all rows.
    """
    audio_B = np.asarray(audio_tokens_B, np.float64)
    length_B = np.where(audio_B > 0, audio_B + text_tokens_B, 0.0)
    window = model.encoder.window_chunks * CHUNK_TOKENS
    pairs_B = audio_B // window * window**2 + (audio_B % window) ** 2
    causal_B = length_B * (length_B + 1) / 2
    encoder, decoder = model.encoder, model.decoder
    forward = (
        audio_B.sum() * 2 * (_stem_products(encoder) + encoder.layers * _encoder_layer(encoder))
        + audio_B.sum() * 2 * encoder.width * (encoder.width + decoder.width)
        + pairs_B.sum() * 4 * encoder.layers * encoder.width
        + length_B.sum() * 2 * decoder.layers * _decoder_layer(model)
        + causal_B.sum() * 4 * decoder.layers * decoder.heads * decoder.head_dim
        + targets * 2 * decoder.width * decoder.vocab_size
    )
    return float(3 * forward)


def _stem_products(encoder: EncoderConfig) -> float:
    """Multiplications of the conv stem for one audio token: a 13th of a one-second chunk's."""
    frames, bins, channels_in, products = CHUNK_FRAMES, encoder.mel_bins, 1, 0
    for _ in range(3):
        frames, bins = -(-frames // 2), -(-bins // 2)
        products += frames * bins * _KERNEL * channels_in * encoder.conv_channels
        channels_in = encoder.conv_channels
    return products / CHUNK_TOKENS + bins * encoder.conv_channels * encoder.width


def _encoder_layer(encoder: EncoderConfig) -> int:
    """Multiplications of one layer's weights for one token."""
    return 4 * encoder.width**2 + 2 * encoder.width * encoder.mlp_width


def _decoder_layer(model: ModelConfig) -> int:
    """Multiplications of one layer's weights for one position."""
    decoder = model.decoder
    heads = 2 * decoder.heads + 2 * decoder.kv_heads  # query and output, key and value
    return decoder.width * (heads * decoder.head_dim + 3 * decoder.mlp_width)

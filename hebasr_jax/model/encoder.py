"""Audio encoder: conv stem over one-second chunks, then transformer layers in 8-second windows."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from hebasr_jax.config import CHUNK_FRAMES, CHUNK_TOKENS, EncoderConfig
from hebasr_jax.model.attention import attend, matmul_precision
from hebasr_jax.model.layers import Compute, convolve, gelu, layer_norm, linear, scan_layers, stack

Count = TypeVar("Count", int, Array, np.ndarray)


def audio_tokens(frames: Count) -> Count:
    """Audio tokens of a clip of `frames` mel frames: 13 a second, one per begun 8 frames."""
    return CHUNK_TOKENS * (frames // CHUNK_FRAMES) + (frames % CHUNK_FRAMES + 7) // 8


class Encoder(nnx.Module):
    """Mel frames to audio tokens; positions restart each second, attention each window."""

    def __init__(self, config: EncoderConfig, compute: Compute, rngs: nnx.Rngs) -> None:
        def conv(channels_in: int) -> nnx.Conv:
            return nnx.Conv(
                channels_in,
                config.conv_channels,
                kernel_size=(3, 3),
                strides=2,
                padding=1,
                dtype=compute.dtype,
                precision=matmul_precision(compute.dtype),
                rngs=rngs,
            )

        self.conv1 = conv(1)
        self.conv2 = conv(config.conv_channels)
        self.conv3 = conv(config.conv_channels)
        flat = config.conv_bins * config.conv_channels
        self.conv_out = linear(flat, config.width, False, compute, rngs)
        self.layers = stack(lambda r: EncoderLayer(config, compute, r), config.layers, rngs)
        self.frozen: Any = nnx.data(None)  # frozen layers before `layers`, if the stack is cut
        self.norm = layer_norm(config.width, compute, rngs)
        self.config = config
        self.compute = compute

    def __call__(
        self, mel_BTM: Float[Array, "B T M"], frames_B: Int[Array, " B"]
    ) -> Float[Array, "B A D"]:
        """Audio tokens [B, 13 * ceil(T / 100), D]; the first `audio_tokens(frames)` of a row hold.

        `mel_BTM` must be zero behind each clip's frames, as `features.log_mel` leaves it: the
        convolutions of a last partial chunk see those zeros (qwen3-asr.md, trap 7).
        """
        x_BAD = self.stem(mel_BTM)
        lengths_B = audio_tokens(frames_B)
        with jax.named_scope("encoder_layers"):
            x_BAD, _ = scan_layers(
                lambda layer, x: (layer(x, lengths_B), None), x_BAD, self.segments(), self.compute
            )
        return self.norm(x_BAD)

    def segments(self) -> list[Any]:
        """The stack's segments, lowest first."""
        return [layers for layers in (self.frozen, self.layers) if layers is not None]

    @jax.named_scope("conv_stem")
    def stem(self, mel_BTM: Float[Array, "B T M"]) -> Float[Array, "B A D"]:
        """Convolutions over each one-second chunk alone, plus the chunk's 13 position rows."""
        clips, frames, bins = mel_BTM.shape
        chunks = -(-frames // CHUNK_FRAMES)
        mel_BTM = jnp.pad(mel_BTM, ((0, 0), (0, chunks * CHUNK_FRAMES - frames), (0, 0)))
        x = mel_BTM.astype(self.compute.dtype).reshape(clips * chunks, CHUNK_FRAMES, bins, 1)
        for conv in (self.conv1, self.conv2, self.conv3):
            x = gelu(convolve(conv, x))
        x = self.conv_out(x.reshape(clips * chunks, CHUNK_TOKENS, -1))
        x += jnp.asarray(sinusoids(self.config.width), x.dtype)  # the same rows each second
        return x.reshape(clips, chunks * CHUNK_TOKENS, -1)


def sinusoids(width: int) -> np.ndarray:
    """Position rows [13, width]: sines of all frequencies, then cosines (not interleaved)."""
    half = width // 2
    frequency = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
    angle = np.arange(CHUNK_TOKENS)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class EncoderLayer(nnx.Module):
    """Pre-norm layer: windowed attention and a GELU MLP, both with biases."""

    def __init__(self, config: EncoderConfig, compute: Compute, rngs: nnx.Rngs) -> None:
        def dense(n_in: int, n_out: int) -> nnx.Linear:
            return linear(n_in, n_out, True, compute, rngs)

        self.attention_norm = layer_norm(config.width, compute, rngs)
        self.query = dense(config.width, config.width)
        self.key = dense(config.width, config.width)
        self.value = dense(config.width, config.width)
        self.out = dense(config.width, config.width)
        self.mlp_norm = layer_norm(config.width, compute, rngs)
        self.up = dense(config.width, config.mlp_width)
        self.down = dense(config.mlp_width, config.width)
        self.config = config
        self.compute = compute

    def __call__(self, x_BAD: Array, lengths_B: Int[Array, " B"]) -> Array:
        y_BAD = self.attention_norm(x_BAD)
        x_BAD = x_BAD + self.out(self.attend_windows(y_BAD, lengths_B))
        y_BAF = gelu(self.up(self.mlp_norm(x_BAD)))
        return x_BAD + self.down(y_BAF)

    def attend_windows(self, y_BAD: Array, lengths_B: Int[Array, " B"]) -> Array:
        """Attention inside windows of 104 tokens, counted from each clip's start.

        Rows are padded to whole windows here only; the dense layers never see that padding.
        """
        clips, tokens, width = y_BAD.shape
        window = min(tokens, self.config.window_chunks * CHUNK_TOKENS)
        windows = -(-tokens // window)

        def split(x_BAD: Array) -> Array:
            x_BAD = jnp.pad(x_BAD, ((0, 0), (0, windows * window - tokens), (0, 0)))
            return x_BAD.reshape(clips * windows, window, self.config.heads, -1)

        start = window * jnp.arange(windows)
        # Windows behind a clip's end keep length 1, since kernels may fail on empty rows.
        lengths = jnp.clip(lengths_B[:, None] - start, 1, window).reshape(-1)
        out = attend(
            split(self.query(y_BAD)),
            split(self.key(y_BAD)),
            split(self.value(y_BAD)),
            lengths_B=lengths,
            causal=False,
            kernel=self.compute.kernel,
            mesh=self.compute.mesh,
        )
        return out.reshape(clips, windows * window, width)[:, :tokens]

"""Qwen3 decoder: one block serves training, prefill and cached decoding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hebasr_jax.config import DecoderConfig
from hebasr_jax.model.attention import attend
from hebasr_jax.model.layers import (
    Compute,
    join_columns,
    linear,
    products,
    rms_norm,
    rotary_angles,
    rotate,
    scan_layers,
    stack,
    take_rows,
)

# From the queries, keys and values of new positions to the attention output, plus what the caller
# wants kept of this layer: nothing in training, keys and values in prefill, the cache in decoding.
Mixer = Callable[[Array, Array, Array], tuple[Array, Any]]


class Decoder(nnx.Module):
    """Stacked blocks between the embedding table and the final norm; the head is the table."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(config.vocab_size, config.width, dtype=compute.dtype, rngs=rngs)
        self.layers = stack(lambda r: DecoderLayer(config, compute, r), config.layers, rngs)
        self.frozen: Any = nnx.data(None)  # frozen layers before `layers`, if the stack is cut
        self.norm = rms_norm(config.width, config.norm_eps, compute, rngs)
        self.config = config
        self.compute = compute

    def __call__(
        self, x_BLD: Float[Array, "B L D"], lengths_B: Int[Array, " B"], *, keep_kv: bool = False
    ) -> tuple[Float[Array, "B L D"], tuple[Array, Array] | None]:
        """Final hidden states of right-padded rows that start at position 0.

        With `keep_kv` the second result holds every layer's keys and values, each
        [layers, B, L, K, H], rotated and ready for a cache; else it is None.
        """
        positions_BL = jnp.broadcast_to(jnp.arange(x_BLD.shape[1]), x_BLD.shape[:2])
        kernel, mesh = self.compute.kernel, self.compute.mesh
        causal = partial(attend, lengths_B=lengths_B, causal=True, kernel=kernel, mesh=mesh)

        def mix(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            return causal(q, k, v), (k, v) if keep_kv else None

        angles = self.angles(positions_BL)
        with jax.named_scope("decoder_layers"):
            x_BLD, kept = scan_layers(
                lambda layer, x: layer(x, angles, mix), x_BLD, self.segments(), self.compute
            )
        return self.norm(x_BLD), kept

    def segments(self) -> list[Any]:
        """The stack's segments, lowest first."""
        return [layers for layers in (self.frozen, self.layers) if layers is not None]

    def unstacked(self) -> list[Any]:
        """Each layer alone, its weights cast, and joined where they share an input, once.

        For loops that decode: XLA joins such products by itself, but copies the weights each time.
        """
        dtype = self.compute.dtype
        layers = [
            jax.tree.map(lambda w, n=n: w[n].astype(dtype) if w.ndim > 2 else w[n], stack)
            for stack in self.segments()
            for n in range(jax.tree.leaves(stack)[0].shape[0])
        ]
        for layer in layers:
            layer.query_key_value = join_columns(layer.query, layer.key, layer.value)
            layer.gate_up = join_columns(layer.gate, layer.up)
        return layers

    def angles(self, positions_BL: Int[Array, "B L"]) -> Array:
        """Rotary angles for the given positions."""
        return rotary_angles(positions_BL, self.config.head_dim, self.config.rope_theta)

    def embed_text(self, ids_BX: Int[Array, "B X"]) -> Float[Array, "B X D"]:
        """Embeddings of token ids in the compute dtype."""
        return take_rows(self.embed.embedding[...].astype(self.compute.dtype), ids_BX)

    def head(self) -> Float[Array, "V D"]:
        """The output matrix in the compute dtype: the embedding table, tied."""
        return self.embed.embedding[...].astype(self.compute.dtype)

    def logits(self, x_BLD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary in float32."""
        return head_logits(x_BLD, self.head())


def head_logits(x_BLD: Float[Array, "*B D"], table_VD: Float[Array, "V D"]) -> Float[Array, "*B V"]:
    """Products of hidden states with every row of the table, in float32."""
    precision = jax.lax.Precision.HIGHEST if table_VD.dtype == jnp.float32 else None
    return jnp.einsum(
        "...d,vd->...v", x_BLD, table_VD, precision=precision, preferred_element_type=jnp.float32
    )


class DecoderLayer(nnx.Module):
    """Pre-norm block: grouped-query attention with normed heads and rotary positions, SwiGLU."""

    def __init__(self, config: DecoderConfig, compute: Compute, rngs: nnx.Rngs) -> None:
        def dense(n_in: int, n_out: int) -> nnx.Linear:
            return linear(n_in, n_out, False, compute, rngs)

        def norm(width: int) -> nnx.RMSNorm:
            return rms_norm(width, config.norm_eps, compute, rngs)

        self.attention_norm = norm(config.width)
        self.query = dense(config.width, config.heads * config.head_dim)
        self.key = dense(config.width, config.kv_heads * config.head_dim)
        self.value = dense(config.width, config.kv_heads * config.head_dim)
        self.query_norm = norm(config.head_dim)
        self.key_norm = norm(config.head_dim)
        self.out = dense(config.heads * config.head_dim, config.width)
        self.mlp_norm = norm(config.width)
        self.gate = dense(config.width, config.mlp_width)
        self.up = dense(config.width, config.mlp_width)
        self.down = dense(config.mlp_width, config.width)
        # In loops that decode: the weights of several of these as one matrix.
        self.query_key_value: Any = nnx.data(None)
        self.gate_up: Any = nnx.data(None)
        self.config = config

    def __call__(self, x_BLD: Array, angles_BLH: Array, mix: Mixer) -> tuple[Array, Any]:
        """The block's output and what `mix` kept; the norm of q and k comes before the rotation."""
        y_BLD = self.attention_norm(x_BLD)
        heads = (*x_BLD.shape[:2], -1, self.config.head_dim)
        q, k, v = products(y_BLD, (self.query, self.key, self.value), self.query_key_value)
        q_BLNH = rotate(self.query_norm(q.reshape(heads)), angles_BLH)
        k_BLKH = rotate(self.key_norm(k.reshape(heads)), angles_BLH)
        v_BLKH = v.reshape(heads)
        out_BLNH, kept = mix(q_BLNH, k_BLKH, v_BLKH)
        x_BLD = x_BLD + self.out(out_BLNH.reshape(*x_BLD.shape[:2], -1))
        y_BLD = self.mlp_norm(x_BLD)
        gate, up = products(y_BLD, (self.gate, self.up), self.gate_up)
        x_BLD = x_BLD + self.down(jax.nn.silu(gate) * up)
        return x_BLD, kept

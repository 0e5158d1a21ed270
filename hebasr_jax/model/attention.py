"""The one door to attention kernels. Masks are given as lengths, never as a full boolean mask."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hebasr_jax.sharding import ROWS

Kernel = Literal["cudnn", "xla"]
_LONG, _BLOCK = 2048, 1024  # positions: rows beyond _LONG go block by block through XLA


def pick_kernel(requested: Kernel | Literal["auto"], dtype: DTypeLike, platform: str) -> Kernel:
    """The kernel a run will use: cuDNN for 16-bit floats on a GPU, else XLA.

    Raises:
      ValueError: a kernel that was asked for by name and cannot be had here.
    """
    fits_cudnn = platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2
    if requested == "cudnn" and not fits_cudnn:
        raise ValueError(
            f"the cudnn attention kernel needs a GPU and bfloat16, not {jnp.dtype(dtype).name} "
            f"on {platform}; ask for xla or auto"
        )
    if requested == "auto":
        return "cudnn" if fits_cudnn else "xla"
    return requested


def attend(
    q_BLNH: Float[Array, "B L N H"],
    k_BLKH: Float[Array, "B L K H"],
    v_BLKH: Float[Array, "B L K H"],
    *,
    lengths_B: Int[Array, " B"],
    causal: bool,
    kernel: Kernel,
    mesh: Mesh | None = None,
) -> Float[Array, "B L N H"]:
    """Self-attention inside right-padded rows, scale H**-0.5, softmax in float32.

    Query head n reads key head n // (N / K). `lengths_B` must be at least 1: cuDNN has been seen
    to fail on empty rows. Output behind a row's length is finite and has no meaning.

    Args:
      mesh: that rows are spread over; each device attends to its own. None: all rows are here.
    """
    own = partial(_attend, causal=causal, kernel=kernel)
    if mesh is not None:
        own = jax.shard_map(own, mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False)
    return own(q_BLNH, k_BLKH, v_BLKH, lengths_B.astype(jnp.int32))


def _attend(
    q_BLNH: Array, k_BLKH: Array, v_BLKH: Array, lengths_B: Array, *, causal: bool, kernel: Kernel
) -> Array:
    length = q_BLNH.shape[1]
    if kernel == "xla" and length > _LONG:
        return _attend_in_blocks(q_BLNH, k_BLKH, v_BLKH, lengths_B, causal)
    if kernel == "cudnn":  # its gradient refuses rows of odd length
        q_BLNH, k_BLKH, v_BLKH = (
            jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in (q_BLNH, k_BLKH, v_BLKH)
        )
    with jax.default_matmul_precision(matmul_precision(q_BLNH.dtype)):
        return jax.nn.dot_product_attention(
            q_BLNH,
            k_BLKH,
            v_BLKH,
            query_seq_lengths=lengths_B,
            key_value_seq_lengths=lengths_B,
            is_causal=causal,
            implementation=kernel,
        )[:, :length]


def _attend_in_blocks(
    q_BLNH: Array, k_BLKH: Array, v_BLKH: Array, lengths_B: Array, causal: bool
) -> Array:
    """XLA attention over blocks of queries: a 20-minute row's scores would not fit at once."""
    rows, length = q_BLNH.shape[:2]
    blocks = -(-length // _BLOCK)
    padded = jnp.pad(q_BLNH, ((0, 0), (0, blocks * _BLOCK - length), (0, 0), (0, 0)))
    key_S = jnp.arange(length)

    @jax.checkpoint
    def block(index: Array) -> Array:
        q = jax.lax.dynamic_slice_in_dim(padded, index * _BLOCK, _BLOCK, axis=1)
        query_L1 = (index * _BLOCK + jnp.arange(_BLOCK))[:, None]
        allowed_BLS = key_S < lengths_B[:, None, None]
        if causal:
            allowed_BLS = allowed_BLS & (key_S <= query_L1)
        with jax.default_matmul_precision(matmul_precision(q.dtype)):
            return jax.nn.dot_product_attention(
                q, k_BLKH, v_BLKH, mask=allowed_BLS[:, None], implementation="xla"
            )

    out = jnp.moveaxis(jax.lax.map(block, jnp.arange(blocks)), 0, 1)
    return out.reshape(rows, blocks * _BLOCK, *out.shape[3:])[:, :length]


def attend_written(
    q_B1NH: Float[Array, "B 1 N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    written_B: Int[Array, " B"],
    kernel: Kernel,
) -> Float[Array, "B 1 N H"]:
    """Attention of one new position of each row to the first `written_B` places of its cache.

    A decoding step is bound by reading the cache: cuDNN reads what is written, XLA all of it.
    """
    if kernel == "xla":
        valid_BS = jnp.arange(k_BSKH.shape[1]) < written_B[:, None]
        return attend_cache(q_B1NH, k_BSKH, v_BSKH, valid_BS)
    return jax.nn.dot_product_attention(
        q_B1NH,
        k_BSKH,
        v_BSKH,
        query_seq_lengths=jnp.ones_like(written_B),
        key_value_seq_lengths=written_B,
        implementation=kernel,
    )


def attend_cache(
    q_BLNH: Float[Array, "B L N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    valid: Bool[Array, "B *L S"],
) -> Float[Array, "B L N H"]:
    """Attention of new positions to the valid slots of a key/value cache.

    `valid` is [B, L, S], or [B, S] where a row's new positions see the same slots.
    """
    mask_B1LS = valid.reshape(len(valid), 1, -1, valid.shape[-1])
    with jax.default_matmul_precision(matmul_precision(q_BLNH.dtype)):
        return jax.nn.dot_product_attention(
            q_BLNH, k_BSKH, v_BSKH, mask=mask_B1LS, implementation="xla"
        )


def matmul_precision(dtype: DTypeLike) -> str:
    """float32 must mean float32: on Hopper the default product of two float32 arrays is TF32."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else "default"

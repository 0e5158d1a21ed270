"""Norms, projections and rotary positions: nothing here knows of audio or text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from hebasr_jax.model.attention import Kernel, matmul_precision
from hebasr_jax.sharding import gathered

Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class Compute:
    """How a model computes; what it computes is in `ModelConfig`.

    dtype: of activations and of the weights as they enter a product.
    kernel: attention kernel of encoder windows, full rows of the decoder and cached decoding.
    remat: what the backward pass of a layer recomputes: nothing, all but the outputs of weight
      products and of attention, or the whole layer.
    unroll: layers follow each other in the program instead of in a loop, which copies weights and
      what is kept in and out of stacks; programs take longer to compile.
    mesh: that rows are spread over, each device attending to its own; None: all rows are here.
    by_layer: weights of a layer are cut over the mesh until it runs.
    """

    dtype: DTypeLike = jnp.float32
    kernel: Kernel = "xla"
    remat: Remat = "none"
    unroll: bool = False
    mesh: Mesh | None = None
    by_layer: bool = False


def linear(n_in: int, n_out: int, bias: bool, compute: Compute, rngs: nnx.Rngs) -> nnx.Linear:
    """Dense layer with kernel [n_in, n_out]."""
    return nnx.Linear(
        n_in,
        n_out,
        use_bias=bias,
        dtype=compute.dtype,
        precision=matmul_precision(compute.dtype),
        rngs=rngs,
    )


def join_columns(*linears: nnx.Linear) -> Array:
    """The kernels of dense layers without bias side by side, as they enter a product."""
    return jnp.concatenate([linear.kernel[...] for linear in linears], axis=-1)


def products(x: Array, linears: Sequence[nnx.Linear], joined: Array | None) -> list[Array]:
    """What dense layers make of one input; by one product where their weights are joined."""
    if joined is None:
        return [linear(x) for linear in linears]
    ends = np.cumsum([linear.kernel.shape[-1] for linear in linears])[:-1].tolist()
    with jax.default_matmul_precision(matmul_precision(x.dtype)):
        return jnp.split(x @ joined, ends, axis=-1)


def convolve(conv: nnx.Conv, x_BTMC: Array) -> Array:
    """A 3 x 3 convolution of stride 2 and padding 1, its bias's gradient summed up in float32.

    Flax sums it up in bfloat16, over three million positions. Of one channel the convolution is a
    product with the nine taps of each place: the stem's forward pass takes 10.6 ms instead of 12.4.
    """
    assert conv.bias is not None
    kernel = conv.kernel[...].astype(conv.dtype)
    if x_BTMC.shape[-1] == 1:
        y = jnp.matmul(_taps(x_BTMC[..., 0]), kernel.reshape(9, -1), precision=conv.precision)
    else:
        y = jax.lax.conv_general_dilated(
            x_BTMC,
            kernel,
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=conv.precision,
        )
    return add_bias(y, conv.bias[...].astype(conv.dtype))


def _taps(x_BTM: Array) -> Array:
    """[B, ceil(T / 2), ceil(M / 2), 9]: what a 3 x 3 kernel of stride 2 and padding 1 sees."""
    _, frames, bins = x_BTM.shape
    padded = jnp.pad(x_BTM, ((0, 0), (1, 1), (1, 1)))
    places = [(i, j) for i in range(3) for j in range(3)]
    return jnp.stack([padded[:, i : i + frames : 2, j : j + bins : 2] for i, j in places], axis=-1)


@jax.custom_vjp
def add_bias(x: Array, bias_C: Array) -> Array:
    """Adds a bias to the last axis."""
    return x + bias_C


def _add_bias_fwd(x: Array, bias_C: Array) -> tuple[Array, None]:
    return x + bias_C, None


def _add_bias_bwd(kept: None, grad: Array) -> tuple[Array, Array]:
    # The last sum by a product: XLA's kernels for two of them took 4.8 ms (jax 0.11.2, H100).
    sum_BC = jnp.sum(grad, axis=tuple(range(1, grad.ndim - 1)), dtype=jnp.float32)
    ones_1B = jnp.ones((1, len(sum_BC)), jnp.float32)
    total_1C = jnp.matmul(ones_1B, sum_BC, precision=jax.lax.Precision.HIGHEST)
    return grad, total_1C[0].astype(grad.dtype)


add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


def layer_norm(width: int, compute: Compute, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with torch's epsilon (Flax's default is 1e-6) and a two-pass variance."""
    return nnx.LayerNorm(
        width, epsilon=1e-5, use_fast_variance=False, dtype=compute.dtype, rngs=rngs
    )


def rms_norm(width: int, epsilon: float, compute: Compute, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm, computed in float32 and returned in the compute dtype."""
    return nnx.RMSNorm(width, epsilon=epsilon, dtype=compute.dtype, rngs=rngs)


def stack(make: Any, layers: int, rngs: nnx.Rngs) -> Any:
    """`layers` copies of `make(rngs)` as one module whose arrays have a leading layer axis."""
    return nnx.vmap(make)(rngs.split(layers))


def scan_layers(
    body: Any, x: Array, segments: Sequence[Any], compute: Compute
) -> tuple[Array, Any]:
    """Runs `x, y = body(layer, x)` over stacked layers; returns the last x and the stacked ys.

    `segments` are stacks of layers, lowest first. A frozen one is a scan of its own, so that its
    weights have no gradient; nothing is computed backwards below the lowest trained tensor.
    """
    policies = {
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _saves_attention
        ),
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    if compute.by_layer:
        assert compute.mesh is not None
        body = partial(_gather_and_run, body, compute.mesh)

    if compute.remat != "none":
        body = jax.checkpoint(body, policy=policies[compute.remat])
    kept = []
    for layers in segments:
        x, ys = jax.lax.scan(lambda x, layer: body(layer, x), x, layers, unroll=compute.unroll)
        kept.append(ys)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)


def _gather_and_run(body: Any, mesh: Mesh, layer: Any, x: Array) -> tuple[Array, Any]:
    return body(gathered(layer, mesh), x)


def _saves_attention(primitive: Any, *operands: Any, **settings: Any) -> bool:
    """Keeps what cuDNN's attention gives (names on it would not: it is inside a custom_vjp)."""
    return primitive.name.startswith("dot_product_attention_fwd")


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU, in float32, keeping nothing but its input for the backward pass.

    By erf, as torch has it; `jax.nn.gelu` takes erfc, which costs three times as much on a GPU.
    """
    return _gelu_fwd(x)[0]


def _gelu_fwd(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    return (wide * _below(wide)).astype(x.dtype), x


def _gelu_bwd(x: Array, grad: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * np.float32((2 * np.pi) ** -0.5)
    slope = _below(wide) + wide * density
    return ((grad.astype(jnp.float32) * slope).astype(x.dtype),)


def _below(x: Array) -> Array:
    """Share of the normal distribution that lies below x."""
    return 0.5 * (1.0 + jax.lax.erf(x * np.float32(0.5**0.5)))


gelu.defvjp(_gelu_fwd, _gelu_bwd)


def rotary_angles(positions_BL: Int[Array, "B L"], head_dim: int, theta: float) -> Array:
    """Rotary angles [B, L, head_dim / 2] in float32: position * theta ** (-2i / head_dim)."""
    frequency_H = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions_BL[..., None].astype(jnp.float32) * frequency_H


def rotate(x_BLNH: Float[Array, "B L N H"], angles_BLH: Array) -> Float[Array, "B L N H"]:
    """Rotates the pairs (i, i + H/2), the half-split form of Qwen3, in float32."""
    cos, sin = jnp.cos(angles_BLH)[:, :, None], jnp.sin(angles_BLH)[:, :, None]
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLNH.dtype)


@jax.custom_vjp
def take_rows(table_VD: Array, ids_BX: Array) -> Array:
    """Rows of a table. Its gradient adds up rows of equal ids by a product, not by a scatter.

    A scatter-add of thousands of equal ids is slow on a GPU, and its order, so its last bits,
    change from run to run.
    """
    return table_VD[ids_BX]


def _take_rows_fwd(table_VD: Array, ids_BX: Array) -> tuple[Array, tuple[Array, Array]]:
    return table_VD[ids_BX], (table_VD, ids_BX)


def _take_rows_bwd(kept: tuple[Array, Array], grad_BXD: Array) -> tuple[Array, None]:
    table_VD, ids_R = kept[0], kept[1].reshape(-1)
    grad_RD = grad_BXD.reshape(len(ids_R), -1)
    equal_RR = ids_R[:, None] == ids_R
    precision = jax.lax.Precision.HIGHEST if grad_RD.dtype == jnp.float32 else None
    sums_RD = jnp.matmul(equal_RR.astype(grad_RD.dtype), grad_RD, precision=precision)
    row_R = jnp.arange(len(ids_R))
    first_R = jnp.argmax(equal_RR, axis=1) == row_R
    place_R = jnp.where(first_R, ids_R, table_VD.shape[0] + row_R)  # the others fall off the end
    whole_VD = jnp.zeros(table_VD.shape, grad_RD.dtype)
    whole_VD = whole_VD.at[place_R].set(sums_RD, mode="drop", unique_indices=True)
    return whole_VD.astype(table_VD.dtype), None


take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)


@jax.custom_vjp
def rearrange_rows(x_BND: Array, source_BM: Array, target_BN: Array) -> Array:
    """`y[b, m] = x[b, source[b, m]]`, with a gradient that is a gather as well, not a scatter.

    Args:
      target_BN: the m that row n went to, or -1; of the m's that share an n only this one may
        have a gradient.
    """
    return jnp.take_along_axis(x_BND, source_BM[..., None], axis=1)


def _rearrange_fwd(x_BND: Array, source_BM: Array, target_BN: Array) -> tuple[Array, Array]:
    return rearrange_rows(x_BND, source_BM, target_BN), target_BN


def _rearrange_bwd(target_BN: Array, grad_BMD: Array) -> tuple[Array, None, None]:
    grad_BND = jnp.take_along_axis(grad_BMD, jnp.maximum(target_BN, 0)[..., None], axis=1)
    return jnp.where(target_BN[..., None] >= 0, grad_BND, 0), None, None


rearrange_rows.defvjp(_rearrange_fwd, _rearrange_bwd)

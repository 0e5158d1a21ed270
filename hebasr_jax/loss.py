"""Next-token loss from hidden states; logits exist at text positions only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hebasr_jax.model.asr import Asr, Inputs
from hebasr_jax.model.attention import matmul_precision
from hebasr_jax.model.decoder import head_logits


def next_token_loss(
    asr: Asr, inputs: Inputs, in_loss_BX: Bool[Array, "B X"], *, rows: int | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of cross-entropies over the marked text tokens, and how many they are.

    Sum and count are kept apart: batches, devices and accumulation steps must be added before
    they are divided, or short batches weigh more than long ones.

    Args:
      in_loss_BX: tokens that the model is to write (`text.Example.in_loss`); never a row's first.
      rows: text positions whose logits exist at a time; None: all. Memory depends on it, and in
        bfloat16 the rounding of the table's gradient: each tile's logits are computed again in
        the backward pass, and the tiles' gradients are added up in the compute dtype.
    """
    hidden_BXD = asr.hidden_before_text(inputs)
    with jax.named_scope("loss"):
        hidden_RD = hidden_BXD.reshape(-1, hidden_BXD.shape[-1])
        label_R, in_loss_R = inputs.text_BX.reshape(-1), in_loss_BX.reshape(-1)
        positions = label_R.shape[0]
        if rows is None or rows >= positions:
            return _cross_entropy(asr, hidden_RD, label_R, in_loss_R), jnp.sum(in_loss_R)
        tiles = -(-positions // rows)

        def tiled(x: Array) -> Array:
            filled = jnp.pad(x, ((0, tiles * rows - positions),) + ((0, 0),) * (x.ndim - 1))
            return filled.reshape(tiles, rows, *x.shape[1:])

        sums = jax.lax.map(
            jax.checkpoint(lambda tile: _cross_entropy(asr, *tile)),
            (tiled(hidden_RD), tiled(label_R), tiled(in_loss_R)),
        )
        return jnp.sum(sums), jnp.sum(in_loss_R)


def _cross_entropy(asr: Asr, hidden_RD: Array, label_R: Array, in_loss_R: Array) -> Array:
    return _head_loss(hidden_RD, asr.decoder.head(), label_R, in_loss_R)


@jax.custom_vjp
def _head_loss(hidden_RD: Array, table_VD: Array, label_R: Array, in_loss_R: Array) -> Array:
    """Sum of cross-entropies; logits and softmax in float32, all products in the compute dtype.

    JAX's own gradient would multiply the logits' float32 gradient as it is, at half the speed.
    """
    return _head_loss_fwd(hidden_RD, table_VD, label_R, in_loss_R)[0]


def _head_loss_fwd(
    hidden_RD: Array, table_VD: Array, label_R: Array, in_loss_R: Array
) -> tuple[Array, tuple[Array, ...]]:
    logits_RV = head_logits(hidden_RD, table_VD)
    total_R = jax.nn.logsumexp(logits_RV, axis=-1)
    chosen_R = jnp.take_along_axis(logits_RV, label_R[:, None], axis=-1)[:, 0]
    loss = jnp.sum(jnp.where(in_loss_R, total_R - chosen_R, 0.0))
    return loss, (hidden_RD, table_VD, label_R, in_loss_R, logits_RV, total_R)


def _head_loss_bwd(kept: tuple[Array, ...], grad: Array) -> tuple[Array, Array, None, None]:
    hidden_RD, table_VD, label_R, in_loss_R, logits_RV, total_R = kept
    label_RV = label_R[:, None] == jnp.arange(logits_RV.shape[1])
    grad_RV = (jnp.exp(logits_RV - total_R[:, None]) - label_RV) * (grad * in_loss_R)[:, None]
    grad_RV = grad_RV.astype(hidden_RD.dtype)
    precision = matmul_precision(hidden_RD.dtype)
    with jax.default_matmul_precision(precision):
        return grad_RV @ table_VD, grad_RV.T @ hidden_RD, None, None


_head_loss.defvjp(_head_loss_fwd, _head_loss_bwd)

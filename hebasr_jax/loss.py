"""Next-token loss from hidden states; logits exist at text positions only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hebasr_jax.model.asr import Asr, Inputs


def next_token_loss(
    asr: Asr, inputs: Inputs, in_loss_BX: Bool[Array, "B X"], *, rows: int | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of cross-entropies over the marked text tokens, and how many they are.

    Sum and count are kept apart: batches, devices and accumulation steps must be added before
    they are divided, or short batches weigh more than long ones.

    Args:
      in_loss_BX: tokens that the model is to write (`text.Example.in_loss`); never a row's first.
      rows: text positions whose logits exist at a time; None: all. Memory, not the result,
        depends on it: the backward pass computes each tile's logits again.
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
    logits_RV = asr.decoder.logits(hidden_RD)
    # A sum over one entry, not a gather: its gradient is then no scatter.
    label_RV = label_R[:, None] == jnp.arange(logits_RV.shape[1])
    chosen_R = jnp.sum(jnp.where(label_RV, logits_RV, 0.0), axis=-1)
    loss_R = jax.nn.logsumexp(logits_RV, axis=-1) - chosen_R
    return jnp.sum(jnp.where(in_loss_R, loss_R, 0.0))

"""Next-token loss from hidden states; logits exist at text positions only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hebasr_jax.model.asr import Asr, Inputs


def next_token_loss(
    asr: Asr, inputs: Inputs, in_loss_BX: Bool[Array, "B X"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of cross-entropies over the marked text tokens, and how many they are.

    Sum and count are kept apart: batches, devices and accumulation steps must be added before
    they are divided, or short batches weigh more than long ones.

    Args:
      in_loss_BX: tokens that the model is to write (`text.Example.in_loss`); never a row's first.
    """
    with jax.named_scope("loss"):
        logits_BXV = asr.decoder.logits(asr.hidden_before_text(inputs))
        label_BX1 = inputs.text_BX[..., None]
        chosen_BX = jnp.take_along_axis(logits_BXV, label_BX1, axis=-1)[..., 0]
        loss_BX = jax.nn.logsumexp(logits_BXV, axis=-1) - chosen_BX
        return jnp.sum(jnp.where(in_loss_BX, loss_BX, 0.0)), jnp.sum(in_loss_BX)

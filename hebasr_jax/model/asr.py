"""The whole model: audio placed among text, hidden states out (logits only where asked for)."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from hebasr_jax.config import ModelConfig
from hebasr_jax.model.decoder import Decoder
from hebasr_jax.model.encoder import Encoder, audio_tokens
from hebasr_jax.model.layers import Compute, gelu, linear, rearrange_rows
from hebasr_jax.paths import flat, nested

Params = dict[str, Any]  # nested dict of arrays; weights.py has the table of its paths


@struct.dataclass
class Inputs:
    """A batch of clips with their text. Rows are right-padded; padding never changes a result.

    mel_BTM: log-mel features, zero behind each clip.
    frames_B: valid frames of each row.
    text_BX: token ids without audio placeholders: prompt before and after the audio, then target.
    text_lengths_B: valid tokens of each row.
    audio_at_B: how many text tokens stand before the audio.
    """

    mel_BTM: Float[Array, "B T M"]
    frames_B: Int[Array, " B"]
    text_BX: Int[Array, "B X"]
    text_lengths_B: Int[Array, " B"]
    audio_at_B: Int[Array, " B"]


class Projector(nnx.Module):
    """Encoder width to decoder width."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs) -> None:
        width = config.encoder.width
        self.hidden = linear(width, width, True, compute, rngs)
        self.out = linear(width, config.decoder.width, True, compute, rngs)

    def __call__(self, x_BAD: Array) -> Array:
        return self.out(gelu(self.hidden(x_BAD)))


class Asr(nnx.Module):
    """Qwen3-ASR."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(config.encoder, compute, rngs)
        self.projector = Projector(config, compute, rngs)
        self.decoder = Decoder(config.decoder, compute, rngs)

    def embed(self, inputs: Inputs) -> tuple[Float[Array, "B L D"], Int[Array, " B"]]:
        """Decoder input of L = X + 13 * ceil(T / 100) positions, and each row's valid length."""
        with jax.named_scope("encoder"):
            audio_BAD = self.projector(self.encoder(inputs.mel_BTM, inputs.frames_B))
        with jax.named_scope("join"):
            text_BXD = self.decoder.embed_text(inputs.text_BX)
            joined_BLD = _join(text_BXD, audio_BAD, inputs)
        return joined_BLD, inputs.text_lengths_B + audio_tokens(inputs.frames_B)

    def hidden(self, inputs: Inputs) -> Float[Array, "B L D"]:
        """Final hidden states at every position."""
        x_BLD, lengths_B = self.embed(inputs)
        return self.decoder(x_BLD, lengths_B)[0]

    def hidden_before_text(self, inputs: Inputs) -> Float[Array, "B X D"]:
        """Final hidden states that predict each text token: those one position before it.

        The first token of a row has no predecessor; its entry repeats position 0 and must not
        enter a loss.
        """
        hidden_BLD = self.hidden(inputs)
        length, text = hidden_BLD.shape[1], inputs.text_BX.shape[1]
        before_BX = jnp.maximum(text_positions(inputs) - 1, 0)
        # Which token each position predicts, if any; behind the row's end the last one repeats.
        next_BL = jnp.pad(_sources(inputs, length - text)[:, 1:], ((0, 0), (0, 1)))
        end_B1 = text + audio_tokens(inputs.frames_B)[:, None]
        is_text_BL = (next_BL < text) & (jnp.arange(1, length + 1) < end_B1)
        return rearrange_rows(hidden_BLD, before_BX, jnp.where(is_text_BL, next_BL, -1))


def text_positions(inputs: Inputs) -> Int[Array, "B X"]:
    """Decoder position of each text token: those behind the audio move by its length."""
    index_X = jnp.arange(inputs.text_BX.shape[1])
    behind_BX = index_X >= inputs.audio_at_B[:, None]
    return index_X + jnp.where(behind_BX, audio_tokens(inputs.frames_B)[:, None], 0)


def _join(text_BXD: Array, audio_BAD: Array, inputs: Inputs) -> Float[Array, "B L D"]:
    """Puts each row's audio between its text tokens; placeholders are never embedded."""
    audio_A = jnp.arange(audio_BAD.shape[1])
    heard_BA = audio_A < audio_tokens(inputs.frames_B)[:, None]
    audio_BA = jnp.where(heard_BA, inputs.audio_at_B[:, None] + audio_A, -1)
    return rearrange_rows(
        jnp.concatenate([text_BXD, audio_BAD], axis=1),
        _sources(inputs, audio_BAD.shape[1]),
        jnp.concatenate([text_positions(inputs), audio_BA], axis=1),
    )


def _sources(inputs: Inputs, audio: int) -> Int[Array, "B L"]:
    """For each decoder position its text token, or X plus its audio token.

    t0 t1 a0 a1 a2 t2 t3: with X = 4 these are 0 1 4 5 6 2 3, and t2 is predicted where a2 stands.
    Behind a row's end the text's padding follows, its last token again and again.
    """
    text = inputs.text_BX.shape[1]
    position_L = jnp.arange(text + audio)
    start_B1 = inputs.audio_at_B[:, None]
    end_B1 = start_B1 + audio_tokens(inputs.frames_B)[:, None]
    behind_BL = jnp.minimum(position_L - (end_B1 - start_B1), text - 1)
    audio_BL = jnp.where(position_L < end_B1, text + position_L - start_B1, behind_BL)
    return jnp.where(position_L < start_B1, position_L, audio_BL)


@cache
def _definition(config: ModelConfig, compute: Compute) -> tuple[Any, Params]:
    """The module's static part and its parameters as shapes; nothing is allocated."""
    model = nnx.eval_shape(lambda: Asr(config, compute, nnx.Rngs(0)))
    definition, state = nnx.split(model, nnx.Param)
    return definition, nnx.to_pure_dict(state)


def abstract_params(config: ModelConfig) -> Params:
    """Shapes of every parameter (float32)."""
    return jax.tree.map(lambda leaf: leaf, _definition(config, Compute())[1])


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters, by Flax's default initialisers."""
    _, state = nnx.split(Asr(config, Compute(), nnx.Rngs(key)), nnx.Param)
    return nnx.to_pure_dict(state)


def bind(
    params: Params, config: ModelConfig, compute: Compute, frozen: Params | None = None
) -> Asr:
    """The model with these parameters: call its methods inside jit or grad.

    Args:
      frozen: what `params` lacks where it is the trained part of `optim.split`: whole leaves, and
        the first layers of stacks that are cut. The cut changes no result.
    """
    definition, _ = _definition(config, compute)
    last, first = flat(params), flat(frozen or {})
    asr = nnx.merge(definition, nested(first | last))
    if cut := sorted({path.split("/")[0] for path in first if path in last}):
        other = nnx.merge(definition, nested(last | first))
        for name in cut:
            getattr(asr, name).frozen = getattr(other, name).layers
    return asr

"""Bytes that a training step needs on a device: by formula from shapes, and by the compiler.

With P trained and Q frozen parameters, c bytes of the compute dtype, n devices that a copy of the
weights is cut over (`compute.cut_over`, or all), R rows of A audio tokens and X text tokens,
L = A + X:

weights    4 (P + Q) / n, float32
moments    8 P / n, AdamW's, or half of it as bfloat16; Muon has half of it for the layers'
           matrices, which is not told
copy       c (P + Q), gathered once a step, or / n when gathered by layer; none if c = 4, n = 1
sums       4 P / n, float32 sums of gradients, if there is more than one micro-batch
gradients  c P of one micro-batch (/ n when gathered by layer)
stem       c x 2 arrays of each convolution's output, before and after GELU, and nine taps at each
           place of the first
encoder    R A x trained-through layers x what remat keeps of a layer at one token
decoder    R L x the same of the decoder
ends       12 bytes of each decoder position, for the last norm; where the projector is trained
           through, 12 + 3 c of each audio token: its norm and its GELU
layer      what one layer keeps without remat: the backward pass recomputes it whole
logits     8 bytes x vocabulary x text positions at a time: logits and gradient, in float32

Logits are gone when the first gradient of a layer comes, so that the larger of the two counts:
logits, or at the end of the backward pass gradients and layer.

Kept at one token (D width, F mlp, N and K heads x head size, W attended positions):
full       c D, the layer's input
dots       encoder c (5 D + F): input, query, key, value, out, up
           decoder c (2 D + N + 2 K + 2 F): input, query, key, value, out, gate, up
           with cuDNN also what attention gives, c D and c N
none       every input of an operation's gradient, norms in float32, see `_kept_by_*`; with
           XLA attention also (4 + c) W of each head, with cuDNN nothing
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hebasr_jax.config import CHUNK_TOKENS, ModelConfig
from hebasr_jax.optim import RateRow
from hebasr_jax.run_config import Config, Stage

_STEM_COPIES = 2  # arrays of the size of each convolution's output: before and after GELU


@dataclass(frozen=True)
class Memory:
    """Bytes on one device in a step, by part; see `memory_estimate`."""

    weights: int
    moments: int
    copy: int
    sums: int
    stem: int
    encoder: int
    decoder: int
    ends: int
    gradients: int
    layer: int
    logits: int

    @property
    def total(self) -> int:
        """At the peak: where the loss is, or at the end of the backward pass."""
        later = self.gradients + self.layer
        return sum(asdict(self).values()) - min(self.logits, later)


@dataclass(frozen=True)
class Shape:
    """A bucket as one device sees it: rows of a micro-batch, their audio and their text."""

    rows: int
    audio_s: int
    text_tokens: int


def memory_estimate(
    model: ModelConfig,
    config: Config,
    stage: Stage,
    rates: Sequence[RateRow],
    shape: Shape,
    *,
    devices: int = 1,
    kernel: str = "xla",
    accumulated: bool = False,
) -> Memory:
    """Bytes of a training step on each device, from shapes alone; the formula stands above.

    Nothing is kept below the lowest trained tensor. Stem to ends are within 4 % of what JAX keeps;
    the whole is within 25 % of XLA's figure on CPU in float32, and from 0 to 10 % above it
    on GPUs at 1.7B with remat "dots" (docs/expect.md, `tests/test_dry_run.py`).

    Args:
      accumulated: the batch is cut into more than one micro-batch.
    """
    size = 2 if config.compute.dtype == "bfloat16" else 4
    trained = sum(row.trained_parameters for row in rates)
    whole = sum(row.parameters for row in rates)
    spread = devices if config.compute.gather == "layer" else 1
    audio = shape.rows * shape.audio_s * CHUNK_TOKENS
    positions = audio + shape.rows * shape.text_tokens
    attended = positions // shape.rows if kernel == "xla" else 0
    stem, encoder_layers, decoder_layers = _layers_behind(model, stage)
    reaches_audio = encoder_layers > 0 or stage.projector.learning_rate > 0
    remat, scores = config.compute.remat, kernel == "xla"
    encoder_token = _kept_by_encoder(model, "none", size, scores)
    decoder_token = _kept_by_decoder(model, "none", size, attended)
    loss_rows = min(config.compute.loss_rows or shape.rows * shape.text_tokens, positions)
    return Memory(
        weights=4 * whole // devices,
        moments=(4 if config.optim.moments == "bfloat16" else 8) * trained // devices,
        copy=size * whole // spread if size < 4 or devices > 1 else 0,
        sums=accumulated * 4 * trained // devices,
        gradients=size * trained // spread,
        stem=stem * size * shape.rows * shape.audio_s * _stem_values(model),
        encoder=audio * encoder_layers * _kept_by_encoder(model, remat, size, scores),
        decoder=positions * decoder_layers * _kept_by_decoder(model, remat, size, attended),
        ends=12 * positions * model.decoder.width
        + (reaches_audio and (12 + 3 * size) * audio * model.encoder.width),
        layer=max(audio * encoder_token if encoder_layers else 0, positions * decoder_token),
        logits=8 * model.decoder.vocab_size * loss_rows,
    )


def _layers_behind(model: ModelConfig, stage: Stage) -> tuple[bool, int, int]:
    """How far the backward pass goes: through the stem, and how many layers of each stack."""

    def trained(group: Any, layers: int) -> int:
        count = layers if group.trained_layers is None else group.trained_layers
        return count if group.learning_rate else 0

    stem = stage.conv_stem.learning_rate > 0
    encoder = model.encoder.layers if stem else trained(stage.encoder, model.encoder.layers)
    below = encoder or stage.projector.learning_rate or stage.embedding.learning_rate
    decoder = model.decoder.layers if below else trained(stage.decoder, model.decoder.layers)
    return stem, encoder, decoder


def _stem_values(model: ModelConfig) -> int:
    """Kept of one second: three convolutions have 50, 25 and 13 frames of bins / 2, 4, 8."""
    bins = model.encoder.mel_bins
    values = 9 * 50 * -(-bins // 2)
    for frames in (50, 25, 13):
        bins = -(-bins // 2)
        values += _STEM_COPIES * frames * bins * model.encoder.conv_channels
    return values


def _kept_by_encoder(model: ModelConfig, remat: str, size: int, scores: bool) -> int:
    """Bytes that one encoder layer keeps of one token: (see `memory_estimate`)."""
    encoder = model.encoder
    if remat == "full":
        return size * encoder.width
    if remat == "dots":
        return size * (5 * encoder.width + encoder.mlp_width + (not scores) * encoder.width)
    window = encoder.window_chunks * CHUNK_TOKENS if scores else 0
    norms = 2 * (12 + size) * encoder.width
    return (
        norms
        + size * (5 * encoder.width + 2 * encoder.mlp_width)
        + (4 + size) * encoder.heads * window
    )


def _kept_by_decoder(model: ModelConfig, remat: str, size: int, attended: int) -> int:
    """Bytes that one decoder layer keeps of one position: (see `memory_estimate`)."""
    decoder = model.decoder
    query, key = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    if remat == "full":
        return size * decoder.width
    if remat == "dots":
        attention = 0 if attended else query
        return size * (2 * decoder.width + query + 2 * key + 2 * decoder.mlp_width + attention)
    norms = (12 + size) * (2 * decoder.width + query + key)
    return (
        norms
        + size * (decoder.width + query + key + 6 * decoder.mlp_width)
        + (4 + size) * decoder.heads * attended
    )


def compiled_bytes(analysis: Any) -> int:
    """Bytes on a device by the compiler: `compiled.memory_analysis()` of a step."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )

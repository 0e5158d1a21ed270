"""Sizes of a Qwen3-ASR model, read from the config.json of either layout. Nothing has a default."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hebasr_jax.errors import UserError

Layout = Literal["original", "transformers"]

CHUNK_FRAMES = 100  # mel frames in the one-second image that the convolutions see
CHUNK_TOKENS = 13  # audio tokens of a full chunk: three stride-2 convolutions of 100 frames


@dataclass(frozen=True)
class EncoderConfig:
    """Audio encoder: conv stem over one-second chunks, then pre-norm windowed attention."""

    mel_bins: int
    conv_channels: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    window_chunks: int  # chunks (seconds) that attend to one another

    @property
    def conv_bins(self) -> int:
        """Frequency rows left of `mel_bins` after the three stride-2 convolutions."""
        return -(-self.mel_bins // 8)


@dataclass(frozen=True)
class DecoderConfig:
    """Qwen3 text decoder with tied input and output embeddings."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    rope_theta: float
    norm_eps: float


@dataclass(frozen=True)
class ModelConfig:
    """The whole model; `audio_token_id` marks audio in token ids and is never embedded."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    audio_token_id: int


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a model folder",
            "it has no config.json",
            "give a folder or hub id of a Qwen3-ASR model",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} cannot be read", str(error), "copy or download the model again"
        ) from None
    if not isinstance(config, dict) or config.get("model_type") != "qwen3_asr":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(
            f"{path} is the config of another model",
            f"model_type is {found!r}, not 'qwen3_asr'",
            "give a Qwen3-ASR model: Qwen/Qwen3-ASR-1.7B, Qwen/Qwen3-ASR-0.6B or a fine-tune",
        )
    return config


def layout_of(config: dict[str, Any]) -> Layout:
    """Both layouts carry the same model_type; only the original one nests `thinker_config`."""
    return "original" if "thinker_config" in config else "transformers"


def model_config(config: dict[str, Any]) -> ModelConfig:
    """The sizes in a parsed config.json; a missing size or an unsupported variant is refused."""
    thinker = config.get("thinker_config", config)
    try:
        audio, text = thinker["audio_config"], thinker["text_config"]
        _refuse_variants(config, thinker, audio, text)
        return ModelConfig(
            encoder=EncoderConfig(
                mel_bins=_size(audio, "num_mel_bins"),
                conv_channels=_size(audio, "downsample_hidden_size"),
                width=_size(audio, "d_model", "hidden_size"),
                layers=_size(audio, "encoder_layers", "num_hidden_layers"),
                heads=_size(audio, "encoder_attention_heads", "num_attention_heads"),
                mlp_width=_size(audio, "encoder_ffn_dim", "intermediate_size"),
                window_chunks=_size(audio, "n_window_infer") // CHUNK_FRAMES,
            ),
            decoder=DecoderConfig(
                vocab_size=_size(text, "vocab_size"),
                width=_size(text, "hidden_size"),
                layers=_size(text, "num_hidden_layers"),
                heads=_size(text, "num_attention_heads"),
                kv_heads=_size(text, "num_key_value_heads"),
                head_dim=_size(text, "head_dim"),
                mlp_width=_size(text, "intermediate_size"),
                max_positions=_size(text, "max_position_embeddings"),
                rope_theta=_positive({**text, **_rope(text)}, "rope_theta"),
                norm_eps=_positive(text, "rms_norm_eps"),
            ),
            audio_token_id=_size(thinker, "audio_token_id"),
        )
    except KeyError as error:
        why = f"it has no {error.args[0]!r}, and sizes are never guessed"
    except (TypeError, ValueError, AttributeError) as error:
        why = f"a field has a wrong type: {error}"
    raise UserError(
        "config.json does not describe a Qwen3-ASR model",
        why,
        "copy config.json from the model that this one was made from",
    )


def _size(section: dict[str, Any], *names: str) -> int:
    """A whole number under the first of its names: versions of transformers differ in them."""
    value = section[next((name for name in names if name in section), names[0])]
    if type(value) is not int or value < 1:
        raise ValueError(f"{names[0]} is {value!r}")
    return value


def _positive(section: dict[str, Any], name: str) -> float:
    value = section[name]
    if type(value) not in (int, float) or not value > 0:
        raise ValueError(f"{name} is {value!r}")
    return float(value)


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: transformers 5 nests them all, 4.x keeps rope_theta beside."""
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _refuse_variants(
    config: dict[str, Any], thinker: dict[str, Any], audio: dict[str, Any], text: dict[str, Any]
) -> None:
    """Refuses what the released models do not use and this code therefore does not compute."""
    rope = _rope(text)
    layers = set(text.get("layer_types") or ["full_attention"])
    heads = _size(audio, "encoder_attention_heads", "num_attention_heads")
    width = _size(audio, "d_model", "hidden_size")
    needed = {
        "classify_num (a forced aligner)": (thinker.get("classify_num"), None),
        "quantization_config": (config.get("quantization_config"), None),
        "tie_word_embeddings": (
            config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)),
            True,
        ),
        "audio_config.activation_function": (audio.get("activation_function", "gelu"), "gelu"),
        "audio_config.scale_embedding": (audio.get("scale_embedding", False), False),
        "audio_config.n_window": (audio["n_window"], CHUNK_FRAMES // 2),
        "audio_config.n_window_infer modulo 100": (audio["n_window_infer"] % CHUNK_FRAMES, 0),
        "audio_config.output_dim": (audio["output_dim"], text["hidden_size"]),
        "audio_config.d_model modulo its heads": (width % heads, 0),
        "text_config.num_attention_heads modulo num_key_value_heads": (
            _size(text, "num_attention_heads") % _size(text, "num_key_value_heads"),
            0,
        ),
        "text_config.hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "text_config.attention_bias": (text.get("attention_bias", False), False),
        "text_config.use_sliding_window": (text.get("use_sliding_window", False), False),
        "text_config.layer_types": (layers, {"full_attention"}),
        "text_config.rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "text_config.partial_rotary_factor": (
            {**text, **rope}.get("partial_rotary_factor", 1.0),
            1.0,
        ),
    }
    for field, (found, expected) in needed.items():
        if found != expected:
            raise UserError(
                f"config.json asks for {field} = {found!r}",
                f"only {expected!r} is supported, as in the released Qwen3-ASR models",
            )

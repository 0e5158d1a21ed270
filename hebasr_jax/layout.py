"""The config and tokenizer files of a model folder, written in one layout from the other.

original: what qwen-asr and vLLM load (nested config, vocab.json and merges.txt).
transformers: what transformers 5.13 and later loads (flat config, tokenizer.json).
"""

import json
from pathlib import Path
from typing import Any

from hebasr_jax.config import CHUNK_FRAMES, CHUNK_TOKENS, DecoderConfig, Layout, ModelConfig
from hebasr_jax.errors import UserError
from hebasr_jax.text import TextTokenizer

# qwen-asr asks transformers 4.57 for Mistral's way to split words ("iPhone" gets other ids), and a
# local folder gets it if its config.json names a later version than this one.
WORD_RULE_VERSION = "4.57.2"

_MAX_NEW_TOKENS = 512  # the default of both reference packages

# Generation settings that mean the same in both layouts.
_GENERATION = {
    "do_sample",
    "length_penalty",
    "max_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
}

# What the released models were trained on; qwen-asr lists them, Hebrew is not among them.
# fmt: off
LANGUAGES = (
    "Chinese", "English", "Cantonese", "Arabic", "German", "French", "Spanish", "Portuguese",
    "Indonesian", "Italian", "Korean", "Russian", "Thai", "Vietnamese", "Japanese", "Turkish",
    "Hindi", "Malay", "Dutch", "Swedish", "Danish", "Finnish", "Polish", "Czech", "Filipino",
    "Persian", "Greek", "Romanian", "Hungarian", "Macedonian",
)
# fmt: on

# The released prompt (qwen3-asr.md, 4.1): the system turn always, of the user turn the audio only.
_PROMPT_TEMPLATE = """\
{%- set turn = namespace(system='', audio='') -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- if message.role == 'system' -%}
{%- set turn.system = turn.system + message.content -%}
{%- endif -%}
{%- else -%}
{%- for part in message.content -%}
{%- if message.role == 'system' and part.type == 'text' -%}
{%- set turn.system = turn.system + part.text -%}
{%- elif part.type == 'audio' or 'audio' in part or 'audio_url' in part -%}
{%- set turn.audio = turn.audio + '<|audio_start|><|audio_pad|><|audio_end|>' -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>system\\n' + turn.system + '<|im_end|>\\n' -}}
{{- '<|im_start|>user\\n' + turn.audio + '<|im_end|>\\n' -}}
"""
# transformers forces a language by an assistant turn that the generation continues.
_ASSISTANT_TEMPLATE = """\
{%- for message in messages if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{% generation %}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{% endgeneration %}
{%- endfor -%}
"""
_REPLY_TEMPLATE = """\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def write_settings(
    folder: Path,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    layout: Layout,
    dtype: str,
    *,
    source: Path | None = None,
) -> None:
    """Writes every file but weights and tokenizer: sizes, generation, front end, chat template.

    Of `source`, a model folder in the other layout, the list of languages and the generation
    settings go along; front end and chat template are those of the released models.
    """
    languages, generation = list(LANGUAGES), {}
    if source is not None:
        languages = _read_json(source / "config.json").get("support_languages", languages)
        generation = _read_json(source / "generation_config.json")
    content = config_json(config, tokenizer, layout, dtype)
    write_json(folder / "config.json", {**content, "support_languages": languages})
    generation = {k: v for k, v in generation.items() if k in _GENERATION}
    content = {**generation_json(tokenizer, layout), **generation}
    write_json(folder / "generation_config.json", content)
    if layout == "original":
        write_json(folder / "preprocessor_config.json", extractor_json(config, layout))
        template = _PROMPT_TEMPLATE + _REPLY_TEMPLATE
        write_json(folder / "chat_template.json", {"chat_template": template})
    else:
        write_json(folder / "processor_config.json", extractor_json(config, layout))
        template = _PROMPT_TEMPLATE + _ASSISTANT_TEMPLATE + _REPLY_TEMPLATE
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def config_json(
    config: ModelConfig, tokenizer: TextTokenizer, layout: Layout, dtype: str
) -> dict[str, Any]:
    """The content of config.json in either layout."""
    special = tokenizer.special
    shared = {"architectures": ["Qwen3ASRForConditionalGeneration"], "dtype": dtype}
    sizes = {
        "audio_config": _audio_json(config, layout),
        "text_config": _text_json(config.decoder, layout),
        "audio_token_id": config.audio_token_id,
    }
    if layout == "transformers":
        return {
            **shared,
            "model_type": "qwen3_asr",
            "pad_token_id": special.im_end,
            "eos_token_id": [special.endoftext, special.im_end],
            **sizes,
            "tie_word_embeddings": True,
        }
    return {
        **shared,
        "model_type": "qwen3_asr",
        "pad_token_id": special.endoftext,
        "eos_token_id": special.im_end,
        "transformers_version": WORD_RULE_VERSION,
        "thinker_config": {
            **shared,
            "model_type": "qwen3_asr_thinker",
            **sizes,
            "audio_start_token_id": special.audio_start,
            "audio_end_token_id": special.audio_end,
            "user_token_id": tokenizer.encode("user")[0],
        },
    }


def _audio_json(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    encoder = config.encoder
    sizes = {
        "num_mel_bins": encoder.mel_bins,
        "downsample_hidden_size": encoder.conv_channels,
        "d_model": encoder.width,
        "encoder_layers": encoder.layers,
        "encoder_attention_heads": encoder.heads,
        "encoder_ffn_dim": encoder.mlp_width,
        "n_window": CHUNK_FRAMES // 2,
        "n_window_infer": encoder.window_chunks * CHUNK_FRAMES,
        "output_dim": config.decoder.width,
        "activation_function": "gelu",
        "scale_embedding": False,
    }
    if layout == "original":
        return {"model_type": "qwen3_asr_audio_encoder", **sizes, "max_source_positions": 1500}
    return {"model_type": "qwen3_asr_encoder", **sizes, "max_position_embeddings": CHUNK_TOKENS}


def _text_json(decoder: DecoderConfig, layout: Layout) -> dict[str, Any]:
    sizes = {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "intermediate_size": decoder.mlp_width,
        "max_position_embeddings": decoder.max_positions,
        "rms_norm_eps": decoder.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    if layout == "transformers":
        rope = {"rope_type": "default", "rope_theta": decoder.rope_theta}
        return {"model_type": "qwen3", **sizes, "rope_parameters": rope}
    # Three interleaved rotary sections with equal positions: plain rotary positions in effect.
    half = decoder.head_dim // 2
    small = half * 5 // 16
    sections = {
        "rope_type": "default",
        "type": "default",
        "mrope_section": [half - 2 * small, small, small],
        "interleaved": True,
        "mrope_interleaved": True,
    }
    rope = {"rope_theta": decoder.rope_theta, "rope_scaling": sections}
    return {"model_type": "qwen3_asr_text", **sizes, **rope}


def generation_json(tokenizer: TextTokenizer, layout: Layout) -> dict[str, Any]:
    """The content of generation_config.json in either layout."""
    end, pad = tokenizer.special.im_end, tokenizer.special.endoftext
    if layout == "original":
        return {"eos_token_id": [end, pad], "pad_token_id": pad}
    return {
        "do_sample": False,
        "max_new_tokens": _MAX_NEW_TOKENS,
        "eos_token_id": [pad, end],
        "pad_token_id": end,
    }


def extractor_json(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """preprocessor_config.json (original) or processor_config.json (transformers)."""
    front_end = {
        "chunk_length": 30,
        "dither": 0.0,
        "feature_size": config.encoder.mel_bins,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }
    processor = {"processor_class": "Qwen3ASRProcessor"}
    if layout == "original":
        return {**front_end, "feature_extractor_type": "WhisperFeatureExtractor", **processor}
    window = {"n_window": CHUNK_FRAMES // 2, "min_length": 8000, "sampling_rate": 16000}
    name = {"feature_extractor_type": "Qwen3ASRFeatureExtractor"}
    return {
        "feature_extractor": {**front_end, **window, **name},
        "timestamp_segment_time": 80,
        **processor,
    }


def write_transformers_tokenizer(source: Path, folder: Path) -> None:
    """An original folder's tokenizer as tokenizer.json, by transformers itself."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(str(source), local_files_only=True)
    tokenizer.chat_template = None  # written beside, with the assistant's turn
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the Rust side raises plain Exception, for a full disk too
        raise OSError(str(error)) from error


def write_original_tokenizer(source: Path, folder: Path) -> None:
    """A transformers folder's tokenizer as vocab.json and merges.txt, for transformers 4.57."""
    whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    settings = _read_json(source / "tokenizer_config.json")
    write_json(folder / "vocab.json", whole["model"]["vocab"])
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    named = settings.pop("model_specific_special_tokens", {})
    listed = settings.pop("extra_special_tokens", [])
    for newer in ("backend", "is_local", "local_files_only"):
        settings.pop(newer, None)
    settings |= {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen3ASRProcessor",
        "added_tokens_decoder": {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"}
            for token in whole["added_tokens"]
        },
        "additional_special_tokens": listed if isinstance(listed, list) else list(listed.values()),
        "extra_special_tokens": named or (listed if isinstance(listed, dict) else {}),
    }
    write_json(folder / "tokenizer_config.json", settings)


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a file that a model folder may lack."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", str(error), "copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read", "it holds no JSON object", "copy it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """JSON as a model folder has it: indented, UTF-8, Hebrew readable."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

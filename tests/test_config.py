"""config.json of either layout: the same sizes, nothing guessed, nothing passed over."""

import copy
import json
from pathlib import Path

import pytest
from transformers import Qwen3ASRConfig

from hebasr_jax.config import layout_of, model_config, read_config
from hebasr_jax.errors import UserError
from hebasr_jax.layout import config_json
from hebasr_jax.text import load_tokenizer
from hebasr_jax.tiny import TINY, write_byte_tokenizer


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, dict]:
    """The tiny model's config.json in both layouts, and as transformers itself saves it."""
    folder = tmp_path_factory.mktemp("config")
    write_byte_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    made = {
        layout: config_json(TINY, tokenizer, layout, "float32")
        for layout in ("original", "transformers")
    }
    (folder / "config.json").write_text(json.dumps(made["transformers"]))
    Qwen3ASRConfig.from_pretrained(folder).save_pretrained(folder / "saved")
    return {**made, "saved": read_config(folder / "saved")}


@pytest.mark.parametrize("kind", ["original", "transformers", "saved"])
def test_sizes_come_back(contents, kind) -> None:
    assert model_config(contents[kind]) == TINY
    assert layout_of(contents[kind]) == ("original" if kind == "original" else "transformers")


def test_names_of_other_versions_are_understood(contents) -> None:
    content = copy.deepcopy(contents["transformers"])
    audio, text = content["audio_config"], content["text_config"]
    audio["num_attention_heads"] = audio.pop("encoder_attention_heads")
    audio["hidden_size"] = audio.pop("d_model")
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    assert model_config(content) == TINY


SIZES = [
    ("audio_config", name)
    for name in ("num_mel_bins", "d_model", "encoder_layers", "n_window", "n_window_infer")
] + [
    ("text_config", name)
    for name in ("vocab_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters")
]


@pytest.mark.parametrize(("section", "name"), SIZES)
def test_no_size_is_guessed(contents, section, name) -> None:
    content = copy.deepcopy(contents["transformers"])
    del content[section][name]
    with pytest.raises(UserError, match="rope_theta" if name == "rope_parameters" else name):
        model_config(content)
    for wrong in (None, "12", 0, -3, [], {}):
        content[section][name] = wrong
        with pytest.raises(UserError):
            model_config(content)


VARIANTS = [
    ("audio_config", "activation_function", "relu"),
    ("audio_config", "scale_embedding", True),
    ("audio_config", "n_window", 100),
    ("audio_config", "n_window_infer", 850),
    ("audio_config", "output_dim", 3584),
    ("audio_config", "encoder_attention_heads", 5),
    ("text_config", "attention_bias", True),
    ("text_config", "use_sliding_window", True),
    ("text_config", "layer_types", ["full_attention", "sliding_attention"]),
    ("text_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
    ("text_config", "partial_rotary_factor", 0.5),
    ("text_config", "num_key_value_heads", 3),
    (None, "tie_word_embeddings", False),
    (None, "classify_num", 5000),
    (None, "quantization_config", {"bits": 4}),
]


@pytest.mark.parametrize(("section", "name", "value"), VARIANTS)
def test_what_is_not_computed_is_refused(contents, section, name, value) -> None:
    content = copy.deepcopy(contents["transformers"])
    (content[section] if section else content)[name] = value
    with pytest.raises(UserError) as error:
        model_config(content)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "no config.json"),
        ("{", "cannot be read"),
        ("[]", "another model"),
        ('{"model_type": "whisper"}', "whisper"),
        ('{"model_type": "qwen3_asr"}', "audio_config"),
        ('{"model_type": "qwen3_asr", "audio_config": 3, "text_config": null}', "wrong type"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused(tmp_path: Path, text, word) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=word):
        model_config(read_config(tmp_path))

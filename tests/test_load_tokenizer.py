"""Loading a tokenizer folder of either layout, and refusing a damaged one."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
from test_text import STAMPED, tiny, write_tiny_tokenizer

from hebasr_jax.errors import UserError
from hebasr_jax.text import build_example, load_tokenizer
from hebasr_jax.tiny import CONTROL


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_both_layouts_give_the_same_tokenizer(tmp_path, layout):
    tokenizer = load_tokenizer(write_tiny_tokenizer(tmp_path, layout))
    assert dataclasses.astuple(tokenizer.special) == (261, 262, 260, 263, 264, 265, 266)
    text = "language Hebrew שלום don't 12"
    assert tokenizer.encode(text) == tiny().encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_splitting_rule_is_that_of_qwen2_whatever_the_loader_does(tmp_path, monkeypatch):
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    load = Qwen2Tokenizer.from_pretrained

    def with_another_rule(*args, **kwargs):
        tokenizer = load(*args, **kwargs)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)
        return tokenizer

    monkeypatch.setattr(Qwen2Tokenizer, "from_pretrained", with_another_rule)
    tokenizer = load_tokenizer(write_tiny_tokenizer(tmp_path))
    splits = [piece for piece, _ in tokenizer.plain.pre_tokenizer.pre_tokenize_str("don't 12")]
    assert splits == ["don", "'t", "Ġ", "1", "2"]
    assert tokenizer.encode("a b") == tiny().encode("a b")


def test_a_tokenizer_travels_to_a_worker_process():
    copy = pickle.loads(pickle.dumps(tiny()))
    assert build_example(copy, STAMPED, "") == build_example(tiny(), STAMPED, "")


@pytest.mark.parametrize("name", [name for name, _ in CONTROL])
def test_a_missing_control_token_is_named(tmp_path, name):
    file = write_tiny_tokenizer(tmp_path) / "tokenizer.json"
    stranger = "<renamed>"
    content = file.read_text(encoding="utf-8").replace(json.dumps(name), json.dumps(stranger))
    file.write_text(content, encoding="utf-8")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace(name, stranger), encoding="utf-8")
    with pytest.raises(UserError, match=f"no token {name}".replace("|", r"\|")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_missing_file_is_a_users_error(tmp_path, name):
    (write_tiny_tokenizer(tmp_path, "original") / name).unlink()
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_a_file_cut_short_is_a_users_error(tmp_path, layout):
    write_tiny_tokenizer(tmp_path / "whole", layout)
    for file in (tmp_path / "whole").iterdir():
        cut = Path(shutil.copytree(tmp_path / "whole", tmp_path / file.name))
        content = file.read_text(encoding="utf-8").rstrip()
        for length in (0, len(content) // 2, content.rfind("\n") + 1, len(content) - 1):
            (cut / file.name).write_text(content[:length], encoding="utf-8")
            with pytest.raises(UserError):
                load_tokenizer(cut)


def test_no_folder_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "nowhere")


def test_ids_that_a_loader_would_shift_are_refused(tmp_path):
    file = write_tiny_tokenizer(tmp_path, "original") / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["added_tokens_decoder"]["300"] = config["added_tokens_decoder"].pop("266")
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="<asr_text> id 300; loaded, it has 266"):
        load_tokenizer(tmp_path)

"""Time-stamp ids after a reload in transformers 4.57.6, the one that qwen-asr 0.0.6 needs."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from test_text import write_tiny_tokenizer
from test_timestamps import NAMES, REAL_ROWS, real_folder

from hebasr_jax.text import load_tokenizer
from hebasr_jax.timestamps import add_stamp_tokens

TEXT = "<|timestamps|><|3s|><|+4|>שלום<|5s|><|+0|><|im_end|>"


def reload(folder: Path) -> dict:
    """What the original environment makes of the folder."""
    script = Path(__file__).with_name("reload_tokenizer.py")
    python = os.environ["HEBASR_ORIGINAL_PYTHON"]
    command = [python, "-W", "ignore", str(script), str(folder), TEXT, *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == "4.57.6"
    return report["loaders"]


def check(folder: Path, marker: int) -> None:
    """Every loader has the ids that we have, and keeps stamps as visible text."""
    ours = load_tokenizer(folder)
    assert ours.stamps.marker == marker
    loaders = reload(folder)
    assert loaders
    for loaded in loaders.values():
        assert loaded["ids"] == list(range(marker - 1, marker + 135))
        assert loaded["size"] == marker + 135
        assert loaded["text_ids"] == ours.full.encode(TEXT).ids
        assert loaded["text_ids"][:3] == [marker, marker + 4, marker + 126]
        assert loaded["decoded"].replace(" ", "") == TEXT.removesuffix("<|im_end|>")


@pytest.mark.shared
@pytest.mark.parametrize("layout", ["original", "transformers", "both"])
def test_the_real_ids(tmp_path, layout):
    folder = real_folder(tmp_path / layout, layout)
    add_stamp_tokens(folder, REAL_ROWS)
    check(folder, marker=151706)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_the_ids_of_a_tiny_tokenizer(tmp_path, layout):
    folder = write_tiny_tokenizer(tmp_path, layout)
    add_stamp_tokens(folder, vocab_size=512)
    check(folder, marker=268)

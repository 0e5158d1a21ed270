"""Rungs 7 and 11: a written folder is complete, loads strictly, and says the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from reference import load_ours, load_torch, noise, tiny_folder

from hebasr_jax.config import layout_of, model_config, read_config
from hebasr_jax.errors import UserError
from hebasr_jax.export import new_folder, write_model
from hebasr_jax.layout import LANGUAGES, config_json, write_json
from hebasr_jax.text import PromptStyle, build_prompt, load_tokenizer
from hebasr_jax.tiny import TINY
from hebasr_jax.transcribe import load_recognizer, transcribe

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The tiny model in the original layout."""
    folder = tmp_path_factory.mktemp("export") / "original"
    params, config = load_ours(tiny_folder())
    write_model(params, config, tiny_folder(), folder, "original")
    return folder


def test_across_layouts_and_back_is_bit_identical(original, tmp_path) -> None:
    params, config = load_ours(original)
    write_model(params, config, original, tmp_path / "back", "transformers")
    first, last = load_ours(tiny_folder())[0], load_ours(tmp_path / "back")[0]
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for folder in (original, tmp_path / "back"):
        assert model_config(read_config(folder)) == TINY
    assert layout_of(read_config(original)) == "original"
    tokenizers = [load_tokenizer(f) for f in (tiny_folder(), original, tmp_path / "back")]
    assert len({t.special for t in tokenizers}) == 1
    assert len({t.encode("צה\"ל said: שלום, don't 123") for t in tokenizers}) == 1


@pytest.mark.parametrize("shards", [None, 100_000])
def test_transformers_loads_an_export_strictly_and_says_the_same(tmp_path, original, shards):
    """Through its own processor, prompt and generate; float32, token for token."""
    from transformers import Qwen3ASRProcessor

    params, config = load_ours(original)
    write_model(params, config, original, tmp_path / "m", "transformers", shard_bytes=shards)
    model = load_torch(tmp_path / "m")
    processor = Qwen3ASRProcessor.from_pretrained(tmp_path / "m")
    wave = noise(37000)
    batch = processor.apply_transcription_request(wave, language="English")
    recognizer = load_recognizer(str(tmp_path / "m"))
    style = PromptStyle("English")
    prompt = build_prompt(recognizer.tokenizer, style)
    pad = recognizer.tokenizer.special.audio_pad
    tokens = int((batch["input_ids"] == pad).sum())
    assert batch["input_ids"][0].tolist() == [*prompt.before, *[pad] * tokens, *prompt.after]
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=20, do_sample=False)
    theirs = ids[0, batch["input_ids"].shape[1] :].tolist()
    ours = transcribe(recognizer, [wave], style=style, max_new_tokens=20)[0]
    ended = [i for i, token in enumerate(theirs) if token in recognizer.tokenizer.special.eos]
    assert list(ours.tokens) == (theirs[: ended[0]] if ended else theirs)
    assert ours.tokens


def test_export_says_the_same_as_its_source(original) -> None:
    waves = [noise(n, n) for n in (16000, 41000, 159, 90000)]
    first = transcribe(load_recognizer(str(tiny_folder())), waves, max_new_tokens=16)
    second = transcribe(load_recognizer(str(original)), waves, max_new_tokens=16)
    assert [r.tokens for r in first] == [r.tokens for r in second]
    assert [r.transcript for r in first] == [r.transcript for r in second]
    assert first[2].tokens == ()


def test_a_copy_keeps_every_config_and_tokenizer_file(tmp_path) -> None:
    params, config = load_ours(tiny_folder())
    source = Path(shutil.copytree(tiny_folder(), tmp_path / "source"))
    (source / "merges.txt").write_text("kept as it is\n")
    (source / "notes.bin").write_bytes(b"not copied")
    write_model(params, config, source, tmp_path / "copy", "transformers")
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    assert copied == {path.name for path in source.iterdir()} - {"notes.bin"}
    for path in source.iterdir():
        if path.suffix in (".json", ".txt", ".jinja"):
            assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_a_changed_dtype_is_written_into_the_config(tmp_path, layout) -> None:
    params, config = load_ours(tiny_folder())
    write_model(params, config, tiny_folder(), tmp_path / "m", layout, dtype=np.dtype("float16"))
    content = read_config(tmp_path / "m")
    assert content["dtype"] == "float16"
    assert content.get("thinker_config", content)["dtype"] == "float16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_ours(tmp_path / "m")[0])} == {
        "float16"
    }


def test_languages_and_generation_settings_cross_the_layouts(original, tmp_path) -> None:
    """A Hebrew fine-tune lists Hebrew; its list and budget are not reset on the way and back."""
    source = Path(shutil.copytree(original, tmp_path / "source"))
    content = read_config(source)
    content["support_languages"].append("Hebrew")
    write_json(source / "config.json", content)
    generation = json.loads((source / "generation_config.json").read_text())
    write_json(source / "generation_config.json", {**generation, "max_new_tokens": 4096})
    params, config = load_ours(source)
    there, back = tmp_path / "there", tmp_path / "back"
    write_model(params, config, source, there, "transformers")
    write_model(params, config, there, back, "original")
    load_torch(there)
    for folder in (there, back):
        assert read_config(folder)["support_languages"] == content["support_languages"]
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings["max_new_tokens"] == 4096
        assert len(settings["eos_token_id"]) == 2


def test_a_folder_of_another_process_is_left_alone(tmp_path) -> None:
    """Two writers of one name do not share a temporary folder, and neither removes the other's."""

    def write_and_fail(first: Path) -> None:
        with new_folder(tmp_path / "model") as second:
            assert second != first
            raise OSError("the second fails")

    with new_folder(tmp_path / "model") as first:
        (first / "a").write_text("first")
        with pytest.raises(UserError):
            write_and_fail(first)
        assert (first / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_half_written_is_left_behind(tmp_path) -> None:
    class Stop(Exception):
        pass

    def write_half() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("{}")
            raise Stop

    with pytest.raises(Stop):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(tmp_path) -> None:
    params, config = load_ours(tiny_folder())
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="exists"):
            write_model(params, config, tiny_folder(), taken, "original")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_that_refuses_is_reported(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    params, config = load_ours(tiny_folder())
    with pytest.raises(UserError, match="cannot be written"):
        write_model(params, config, tiny_folder(), tmp_path / "file" / "model", "original")


@pytest.mark.shared
def test_real_tokenizer_files_cross_the_layouts(tmp_path) -> None:
    """Real vocabulary, tiny weights: original -> transformers -> original, ids alike."""
    from dataclasses import replace

    real = SHARED / "qwen3-asr-1.7b"
    tokenizer = load_tokenizer(real)
    config = replace(
        TINY,
        decoder=replace(TINY.decoder, vocab_size=151936, width=8, layers=1),
        audio_token_id=tokenizer.special.audio_pad,
    )
    from hebasr_jax.model.asr import init_params

    params = init_params(config, jax.random.key(0))
    there, back = tmp_path / "there", tmp_path / "back"
    write_model(params, config, real, there, "transformers", stamps=True)
    write_model(params, config, there, back, "original")
    texts = ['צה"ל, ארה״ב ו־API: 1,948', "don't CamelCase", "שָׁלוֹם", " <|im_end|> \n", ""]
    for folder in (there, back):
        again = load_tokenizer(folder)
        assert again.special == tokenizer.special
        assert again.stamps is not None
        assert again.stamps.marker == 151706
        for text in texts:
            assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.shared
def test_our_config_equals_the_released_one_where_both_speak() -> None:
    """Every field that we write for the original layout has the released value.

    Other than the version: layout.py says why it is lower.
    """
    real = SHARED / "qwen3-asr-1.7b"
    released = read_config(real)
    ours = config_json(model_config(released), load_tokenizer(real), "original", "bfloat16")
    ours.pop("transformers_version")
    assert released["support_languages"] == list(LANGUAGES)

    def compare(mine, theirs, path=""):
        for key, value in mine.items():
            if isinstance(value, dict):
                compare(value, theirs[key], f"{path}{key}.")
            else:
                assert theirs[key] == value, path + key

    compare(ours, released)


def test_sigterm_while_a_model_is_written_leaves_nothing(tmp_path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from hebasr_jax import cli, export\n"
        "def write(*_, **options):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "export.save_params = write\n"
        "cli.main(sys.argv[1:])"
    )
    words = ["convert", tiny_folder(), tmp_path / "new", "--layout", "original"]
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "interrupted")
    assert not list(tmp_path.iterdir())

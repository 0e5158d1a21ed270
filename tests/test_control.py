"""The control: what faster-whisper is asked for, and what becomes of its answer.

faster-whisper itself is an extra; here a module of the same interface stands in for it, whose
text is the length of the sound that it was given.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from stand_in_hub import FILES, MODEL, child, served
from stand_in_whisper import installed

from hebasr_jax.control import load_control
from hebasr_jax.errors import UserError
from hebasr_jax.eval_sets import choose_sets
from hebasr_jax.evaluate import Settings, run_sets
from hebasr_jax.hypotheses import read_hypotheses
from hebasr_jax.longform import Cutting

STAND_IN = """
from types import SimpleNamespace
calls = []
class WhisperModel:
    def __init__(self, path, *, local_files_only):
        assert local_files_only
        many = open(path + "/model.bin").read() != "english"
        self.model = SimpleNamespace(device="cpu", compute_type="int8", is_multilingual=many)
    def transcribe(self, wave, **options):
        calls.append((wave, options))
        parts = (" a", f" {len(wave)} ")
        return (SimpleNamespace(text=text, tokens=[1, 2]) for text in parts), None
"""
CHILD = """
import sys
from hebasr_jax.control import _FILES
from hebasr_jax.hub import find_model
print(sorted(path.name for path in find_model(sys.argv[1], files=_FILES).path.iterdir()))
"""


@pytest.fixture
def whisper(tmp_path, monkeypatch):
    """A stand-in for the package; importing it gives its module."""
    yield from installed(tmp_path / "packages", STAND_IN, monkeypatch)


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "whisper"
    made.mkdir()
    for name in ("model.bin", "tokenizer.json", "config.json"):
        (made / name).write_text(name)
    return made


def test_each_piece_is_asked_for_alone_as_ivrit_does(whisper, folder, tmp_path) -> None:
    system = load_control(str(folder))
    assert system.about["versions"] == {"faster-whisper": "9.9", "ctranslate2": "9.9"}
    whisper.calls.clear()  # of the warm-up
    waves = [np.full(1600, 16384, np.int16), np.full(800, 0.25, np.float32)]
    found = system.decode(waves, ["", ""])
    assert [each.transcript.text for each in found] == ["a 1600", "a 800"]
    assert found[0].tokens == (1, 2, 1, 2)
    assert found[0].duration_s == 0.1
    for (wave, options), level in zip(whisper.calls, (0.5, 0.25), strict=True):
        assert options == {"language": "he", "beam_size": 5}
        assert wave.dtype == np.float32
        assert wave[0] == level


def test_it_goes_through_the_evaluation(whisper, folder, tmp_path) -> None:
    soundfile.write(tmp_path / "long.wav", np.tile([0.1, -0.1], 16000), 16000)
    row = {"audio": "long.wav", "text": "א"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row), encoding="utf-8")
    sets, out = choose_sets((), [str(tmp_path / "own.jsonl")]), tmp_path / "control"
    said: list[str] = []

    def run() -> dict:
        cutting = Cutting(piece_s=1.0, search_s=0.2)
        results, failed = run_sets(
            load_control(str(folder)), sets, out, Settings(cutting), say=said.append
        )
        assert not failed
        return results

    results = run()
    (row,) = read_hypotheses(out / "own" / "hypotheses.jsonl")
    assert row.pieces >= 2
    assert sum(int(word) for word in row.hypothesis.split() if word != "a") == 32000
    assert results["sets"]["own"]["dtype"] == "int8"
    run()
    assert "nothing changed" in " ".join(said)
    (folder / "model.bin").write_text("other weights")
    assert run()["model"]["key"] != results["model"]["key"]


def test_what_cannot_be_loaded(whisper, folder, tmp_path, monkeypatch) -> None:
    (folder / "model.bin").write_text("english")
    with pytest.raises(UserError, match="no multilingual Whisper"):
        load_control(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no Whisper model.*\nIt has no tokenizer.json"):
        load_control(str(folder))
    monkeypatch.setitem(sys.modules, "faster_whisper", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'hebasr-jax\[control\]'"):
        load_control(str(folder))


def test_of_a_hub_model_its_own_files_are_fetched(tmp_path) -> None:
    with served(FILES | {"model.bin": b"weights"}) as hub:
        done = child(tmp_path, hub, "-c", CHILD, MODEL)
    assert done.stdout.strip() == "['config.json', 'merges.txt', 'model.bin']", done.stderr

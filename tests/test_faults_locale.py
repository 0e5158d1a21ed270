"""A contrary machine: no UTF-8, a clock that jumps back, a cache that cannot be written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from reference import tiny_folder
from tone_runs import QUICK, checkpoints, losses, make_workspace, settings, train

from hebasr_jax.cli import main
from hebasr_jax.data.sources import open_source
from hebasr_jax.run_config import Source
from hebasr_jax.tracking import read_metrics

PLAIN = {"LC_ALL": "C", "LANG": "C"}  # Python then takes UTF-8 for names and files by itself
UNSET = ("PYTHONIOENCODING", "PYTHONUTF8", "PYTHONCOERCECLOCALE")
SMALL = ("data.buckets=1", "train.steps=2", "validation.every_steps=0", "train.log_steps=1")


def hebasr(folder: Path, *words: str) -> str:
    """What a command writes on stdout, in that locale."""
    done = subprocess.run(
        [sys.executable, "-m", "hebasr_jax", *words],
        cwd=folder,
        env=os.environ | PLAIN | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8")


def test_hebrew_and_spaces_in_every_path_without_utf8_and_with_a_clock_that_jumps(
    tmp_path_factory, monkeypatch
) -> None:
    """No program can be kept on the disk besides: the cache is to be below a file."""
    made = make_workspace(tmp_path_factory.getbasetemp(), "locale")
    space = Path(shutil.move(made, tmp_path_factory.mktemp("c") / "תיקיה של דיבור"))
    (space / "corpus").rename(space / "קול וטקסט")
    (space / "קול וטקסט" / "train.jsonl").rename(space / "קול וטקסט" / "אימון 1.jsonl")
    (space / "tiny").rename(space / "דגם קטן")
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    words = settings(
        "name=הרצה 1",
        "runs_dir=כל ההרצות",
        "model.path=דגם קטן",
        "data.train.0.path=קול וטקסט/אימון 1.jsonl",
        "data.dev.0.path=קול וטקסט/dev.jsonl",
        "export.layouts=(transformers,)",
        "compute.cache_dir=config.py/xla",
        *SMALL,
        *QUICK,
    )
    clock = {"clock": -3600}
    told = train(space, *words, meddle=clock, encoding="utf-8")
    run = space / "כל ההרצות" / "הרצה 1"
    assert "report: כל ההרצות/הרצה 1/report.html" in told
    assert checkpoints(run) == [2]
    assert len(losses(run)) == 2
    times = [line["time_s"] for line in read_metrics(run / "metrics.jsonl")]
    assert times[1] < times[0] - 1800  # else the clock did not jump
    values = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert values["name"]["value"].encode("utf-8", "surrogateescape").decode() == "הרצה 1"
    model, other = "כל ההרצות/הרצה 1/export/transformers", "דגם אחר"
    hebasr(space, "convert", model, other, "--layout", "original")
    assert (space / other / "model.safetensors").exists()


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder whose name is not UTF-8, with a manifest that tells no length."""
    folder = tmp_path / os.fsdecode(b"r\xe9sum\xff")
    folder.mkdir()
    wave = np.random.default_rng(0).normal(size=32000) * 0.1
    soundfile.write(os.fsencode(folder / "a.wav"), wave, 16000, format="WAV")
    rows = [{"audio": "a.wav", "text": "one"}, {"audio": "a.wav", "text": "a"}]
    rows[1] |= {"start_s": 0.5, "end_s": 1.5}
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_data_below_a_folder_that_is_not_utf8(odd) -> None:
    given = ["--source", str(odd / "m.jsonl"), "--name", "s"]
    assert main(["prepare", *given, "--processes", "1", "--out", str(odd)]) == 0
    source, shards = (open_source(Source("s", str(odd / name))) for name in ("m.jsonl", "s"))
    assert [clip.duration_s for clip in source.clips] == [2.0, 1.0]
    for index in range(2):
        assert np.array_equal(source.read(index), shards.read(index))


def test_a_model_is_not_written_where_it_could_not_be_loaded(odd, capsysbinary) -> None:
    words = ["convert", str(tiny_folder()), str(odd / "new"), "--layout", "original"]
    assert main(words) == 1
    assert b"its name is not UTF-8" in capsysbinary.readouterr().err
    assert not (odd / "new").exists()

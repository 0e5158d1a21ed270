"""A contrary machine: no UTF-8, a clock that jumps back, a cache that cannot be written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tone_runs import QUICK, checkpoints, losses, make_workspace, settings, train

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

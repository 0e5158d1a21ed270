"""The command `average` on a real run: what it writes is the best of what it scored."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cpu_programs
import jax
import numpy as np
import pytest
from tone_runs import make_workspace, train

from hebasr_jax.cli import main
from hebasr_jax.config import layout_of, model_config, read_config
from hebasr_jax.paths import flat
from hebasr_jax.trained import load_trained
from hebasr_jax.transcribe import load_recognizer
from hebasr_jax.weights import load_params

ROOT = Path(__file__).parents[1]
STEPS = (10, 20, 30)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A workspace with a run of 30 steps and, by the command as a user gives it, its average."""
    folder = make_workspace(tmp_path_factory.getbasetemp(), "average")
    train(folder)
    words = ("runs/whole", "--weights", "0.5,0.3,0.2", "--by", "loss", "--out", "mean")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "average.py", *words],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        | cpu_programs.environment(1),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    (folder / "told").write_text(done.stderr, encoding="utf-8")
    return folder


@pytest.fixture
def space(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, and the place to be."""
    folder = tmp_path / "space"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(space, capsys, monkeypatch):
    """What the command says as it ends with code 1, before weights are read, writing nothing."""

    def run(*words: str) -> str:
        before = sorted(space.rglob("*"))
        monkeypatch.setattr("hebasr_jax.trained.load_trained", None)
        assert main(["average", *words]) == 1
        out, err = capsys.readouterr()
        told = err[err.index("error: ") :]
        assert out == ""
        assert len(told.splitlines()) <= 3, err
        assert "fault of hebasr" not in told
        assert sorted(space.rglob("*")) == before
        return told

    return run


def stored(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a written model."""
    content = read_config(folder)
    params = load_params(folder, model_config(content), layout_of(content), place=np.asarray)
    return flat(params)


def test_what_is_written_is_the_best_of_all_bit_for_bit(made) -> None:
    content = json.loads((made / "mean" / "averaging.json").read_text(encoding="utf-8"))
    table = content["table"]
    assert [row["name"] for row in table[1:]] == [m["name"] for m in content["members"]]
    assert {m["name"] for m in content["members"]} == {f"step {step}" for step in STEPS}
    losses = [member["loss"] for member in content["members"]]
    assert losses == sorted(losses)
    assert list(table[0]["weights"].values()) == [0.5, 0.3, 0.2]
    best = min(table, key=lambda row: (row["wer"], row["loss"]))
    assert content["name"] == best["name"]
    assert content["weights"] == best["weights"]
    trees = {
        n: flat(load_trained(made / f"runs/whole/checkpoints/{n[5:]}")) for n in best["weights"]
    }
    for path, leaf in stored(made / "mean").items():
        exact = sum(w * trees[n][path].astype(np.float64) for n, w in best["weights"].items())
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, exact.astype(np.float32))
    load_recognizer(str(made / "mean"))  # whole, with its tokenizer


def test_members_score_as_the_run_measured_them(made) -> None:
    """Twelve clips, all of them in either case."""
    content = json.loads((made / "mean" / "averaging.json").read_text(encoding="utf-8"))
    for member, row in zip(content["members"], content["table"][1:], strict=True):
        assert row["wer"] == member["wer"]
        assert row["loss"] == pytest.approx(member["loss"], rel=1e-5)
        assert row["sets"]["held"]["clips"] == 12


def test_it_tells_every_candidate_with_its_interval(made) -> None:
    lines = (made / "told").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "scoring on held (12 clips)"
    content = json.loads((made / "mean" / "averaging.json").read_text(encoding="utf-8"))
    for line, row in zip(lines[1:5], content["table"], strict=True):
        low, high = row["sets"]["held"]["ci95"]
        interval = f"{100 * row['wer']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        assert line.startswith(f"{row['name']}: WER {interval}, CER ")
        (cells,) = [x for x in lines[7:] if x.startswith(f"{row['name']} ") and interval in x]
        assert f"{row['loss']:.4f}" in cells
    assert lines[-2 - len(content["table"])].split()[:2] == ["candidate", "weights"]
    assert lines[-1 - len(content["table"])].startswith(content["name"])
    assert lines[-1] == f"wrote mean (transformers layout): {content['name']}"


def test_a_stopped_one_goes_on_with_the_scores_it_has(space, monkeypatch, capsys) -> None:
    """Then other weights, a soup, the other layout and bfloat16: each option changes the result."""
    calls = []

    def scored(recognizer, sources, config):
        calls.append(recognizer.params)
        found = {"wer": 0.001, "ci95": (0.0, 0.1), "cer": 0.1, "loss": 0.5, "clips": 12}
        return {"held": found}

    monkeypatch.setattr("hebasr_jax.validate.score_sets", scored)
    common = ("average", "runs/whole", "--by", "loss")
    assert main([*common, "--weights", "0.5,0.3,0.2", "--out", "again"]) == 0
    assert calls == []
    first, again = stored(space / "mean"), stored(space / "again")
    assert all(np.array_equal(leaf, again[path]) for path, leaf in first.items())
    words = ("--layout", "original", "--dtype", "bfloat16", "--best", "2")
    assert (
        main([*common, *words, "--weights", "softmax", "--temperature", "0.5", "--out", "b"]) == 0
    )
    assert len(calls) == 1
    content = json.loads((space / "b" / "averaging.json").read_text(encoding="utf-8"))
    assert content["name"].startswith("average of steps ")
    ours, theirs = (m["loss"] for m in content["members"])
    weights = list(content["weights"].values())
    assert weights[0] / weights[1] == pytest.approx(np.exp((theirs - ours) / 0.5))
    assert layout_of(read_config(space / "b")) == "original"
    written = stored(space / "b")
    for path, leaf in flat(calls[0]).items():
        assert np.array_equal(written[path], np.asarray(leaf.astype(jax.numpy.bfloat16))), path
    assert main([*common, "--soup", "--out", "c"]) == 0
    assert "\nsoup of steps " in capsys.readouterr().err
    assert len(calls) == 3  # the mean of three, the mean of the best two


def test_faults_are_told_before_anything_is_read(space, refused) -> None:
    out = ("--out", "new")
    assert "mean exists" in refused("runs/whole", "--out", "mean")
    assert "sum to 1.1, not 1" in refused("runs/whole", "--weights", "0.5,0.3,0.3", *out)
    assert "says nothing" in refused("runs/whole", "--weights", "uniformly", *out)
    assert "2 weights for 3" in refused("runs/whole", "--weights", "0.5,0.5", *out)
    assert "of softmax only" in refused("runs/whole", "--temperature", "0.1", *out)
    assert "neither a run" in refused("runs/none", *out)
    other = Path(shutil.copytree("runs/whole", "runs/other"))
    env = json.loads((other / "env.json").read_text())
    env["fixed"]["tokenizer"] = "another"
    (other / "env.json").write_text(json.dumps(env))
    assert "tokenizers differ" in refused("runs/whole", "runs/other", *out)
    (other / "best.json").write_text("{}")
    assert "a dev wer in best.json" in refused("runs/other", *out)
    config = json.loads((other / "config.json").read_text())
    held = {at: config.pop(at) for at in list(config) if at.startswith("data.dev")}
    (other / "config.json").write_text(
        json.dumps(config | {"data.dev": {**held["data.dev.0.name"], "value": []}})
    )
    assert "has no set in data.dev" in refused("runs/other/checkpoints/10", *out)

"""The recipes of configs/ from the first step to the hub, small: every part, stopped in each."""

import json
import os
import shutil
from pathlib import Path

import cpu_programs
import jax.numpy as jnp
import numpy as np
import pytest
from stand_in_hub import MODEL, TOKEN, served
from tone_runs import (
    arrays,
    checkpoints,
    losses,
    make_workspace,
    same_bits,
    settings,
    train,
    validations,
)

from hebasr_jax.cli import main
from hebasr_jax.config import model_config, read_config
from hebasr_jax.config_file import load_config
from hebasr_jax.paths import flat
from hebasr_jax.tiny import write_tiny_model
from hebasr_jax.tracking import read_metrics
from hebasr_jax.trained import load_trained
from hebasr_jax.weights import load_params

CONFIGS = Path(__file__).parents[1] / "configs"
SETS = {"round1": (2, 7), "round2": (2, 7), "round2_5": (3, 7)}
MEMBER, SCORE, SEND = (
    f"hebasr_jax.{name}" for name in ("finish.load_trained", "finish._score", "upload._send")
)
STEP, SAVE, CARD = (
    f"hebasr_jax.{name}" for name in ("train.one_step", "export.save_params", "finish.write_card")
)


def local(config: str, name: str) -> list[str]:
    """Settings that put a recipe on the tiny model and the tones."""
    train, dev = SETS[config]
    stages = len(load_config(CONFIGS / f"{config}.py").config.stages)
    layers = [f"stages.{n}.decoder.trained_layers={n + 1}" for n in range(stages)]
    if stages > 1:
        layers.append("stages.1.encoder.trained_layers=1")
    return settings(
        f"name={name}",
        "model.path=tiny",
        *(f"data.train.{n}.path=corpus/train.jsonl" for n in range(train)),
        *(f"data.dev.{n}.path=corpus/dev.jsonl" for n in range(dev)),
        *(f"data.train.{n}.without=" for n in range(train)),
        *(f"data.dev.{n}.{part}=None" for n in range(dev) for part in ("only", "split")),
        "data.batch_clips=8",
        "data.buckets=1",
        "data.min_clip_s=0.1",
        "data.max_bad_share=0.1",
        "data.threads=2",
        "compute.dtype=float32",
        "compute.remat=none",
        f"compute.cache_dir={cpu_programs.FOLDER}",
        "train.steps=10",
        "train.checkpoint_steps=2",
        "train.log_steps=1",
        "validation.every_steps=2",
        "validation.bootstrap=20",
        "validation.batch_audio_s=24",
        "optim.warmup_steps=2",
        *layers,
    )


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    return make_workspace(tmp_path_factory.getbasetemp(), "recipe")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub, which the child processes are told of as users tell theirs."""
    with served(None) as server:
        for name, value in {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": TOKEN,
            "HF_REPO_ID": MODEL,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        yield server


def run(space: Path, config: str, name: str, *more: str, code: int = 0, **options) -> str:
    words = [*local(config, name), *settings(*more)]
    told = train(space, *words, config=CONFIGS / f"{config}.py", code=code, **options)
    assert TOKEN not in told
    return told


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(space) -> Path:
    """Round 2.5 from its first step to its exports, nothing uploaded."""
    told = run(space, "round2_5", "whole")
    assert "stage top: steps 1 to 4" in told
    assert "stage wide: steps 5 to 10" in told
    assert "average of steps" in told
    return space / "runs" / "whole"


def forget_upload(run_folder: Path) -> None:
    """As if the run had not been uploaded: each test has a hub of its own."""
    final = run_folder / "final.json"
    final.write_text(json.dumps(json.loads(final.read_text()) | {"upload": {}}))


def test_round_2_5_goes_from_the_first_step_to_the_hub_stopped_in_each_part(
    space, whole, hub
) -> None:
    parts = space / "runs" / "parts"
    forget_upload(whole)
    told = run(space, "round2_5", "whole")
    assert f"uploaded to {os.environ['HF_ENDPOINT']}/{MODEL}/commit/" in told
    sent = hub.commits[hub.refs["main"]]
    assert sent.keys() == {p.name for p in (whole / "export" / "original").iterdir()}
    assert (
        sent["model.safetensors"]
        == (whole / "export" / "original" / "model.safetensors").read_bytes()
    )

    for call, at, signal, code in (
        (STEP, 2, "SIGTERM", 75),  # in the first stage
        (STEP, 4, "SIGTERM", 75),  # in the second
        (STEP, 2, "SIGKILL", -9),
        (MEMBER, 2, "SIGTERM", 75),  # while members are averaged
        (SCORE, 2, "SIGTERM", 75),  # while candidates are scored
        (SAVE, 1, "SIGKILL", -9),  # in an export
        (CARD, 2, "SIGTERM", 75),
        (SEND, 1, "SIGTERM", 75),
    ):
        meddle = {"call": call, "at": at, "signal": signal}
        run(space, "round2_5", "parts", code=code, meddle=meddle)
    run(space, "round2_5", "parts")

    assert losses(parts) == losses(whole)
    assert validations(parts) == validations(whole)
    assert checkpoints(parts) == checkpoints(whole)
    assert same_bits(arrays(parts, 10), arrays(whole, 10))
    ours, theirs = (json.loads((x / "final.json").read_text()) for x in (parts, whole))
    assert ours.pop("upload")["repository"] == theirs.pop("upload")["repository"] == MODEL
    assert ours == theirs
    for layout in ("original", "transformers"):
        written = [folder_bytes(x / "export" / layout) for x in (parts, whole)]
        assert written[0].keys() == written[1].keys()
        for name in written[0].keys() - {"README.md", "training_curve.svg"}:
            assert written[0][name] == written[1][name], name
    assert not [p for p in parts.rglob("*") if "partial" in p.name]
    for path in [*space.rglob("*")]:
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_a_finished_run_does_nothing_twice(space, whole, hub) -> None:
    run(space, "round2_5", "whole")
    hub.log.clear()
    exports = whole / "export"
    before = {path: path.read_bytes() for path in exports.rglob("*.*")}
    weights = [path.stat().st_mtime_ns for path in exports.rglob("*.safetensors")]
    told = run(space, "round2_5", "whole")
    assert "exported" not in told
    assert "uploaded" not in told
    assert {path: path.read_bytes() for path in exports.rglob("*.*")} == before
    assert [path.stat().st_mtime_ns for path in exports.rglob("*.safetensors")] == weights
    assert not hub.log


def test_new_facts_reach_the_card_and_the_hub_but_not_the_weights(space, whole, hub) -> None:
    exports = whole / "export"
    weights = [path.read_bytes() for path in sorted(exports.rglob("*.safetensors"))]
    told = run(space, "round2_5", "whole", "data.train.0.licence=of a new kind")
    assert "of a new kind" in (exports / "original" / "README.md").read_text(encoding="utf-8")
    assert "exported" not in told
    assert "uploaded to" in told
    assert "of a new kind" in hub.commits[hub.refs["main"]]["README.md"].decode()
    assert [path.read_bytes() for path in sorted(exports.rglob("*.safetensors"))] == weights
    run(space, "round2_5", "whole")


def test_other_weights_at_the_same_step_are_exported_anew(space, monkeypatch) -> None:
    monkeypatch.delenv("HF_REPO_ID", raising=False)
    few = ("train.steps=2", "validation.every_steps=2", "average.best=1")
    run(space, "round1", "anew", *few)
    exported = space / "runs" / "anew" / "export" / "original" / "model.safetensors"
    first = exported.read_bytes()
    shutil.rmtree(space / "runs" / "anew" / "checkpoints")
    told = run(space, "round1", "anew", *few, "stages.0.decoder.learning_rate=1e-3")
    assert "exported" in told
    assert exported.read_bytes() != first
    chosen = flat(load_trained(space / "runs" / "anew" / "checkpoints" / "2"))
    params = load_params(
        exported.parent, model_config(read_config(exported.parent)), "original", place=np.asarray
    )
    for path, leaf in flat(params).items():
        assert np.array_equal(leaf, jnp.asarray(chosen[path]).astype(leaf.dtype)), path


def test_a_test_set_that_is_not_there_is_found_before_training(space, monkeypatch, capsys) -> None:
    monkeypatch.chdir(space)
    (space / "one.py").write_text(
        "from dataclasses import replace\nfrom hebasr_jax.run_config import *\n"
        + (space / "config.py")
        .read_text()
        .replace("dev=(", "test=(Source('t', 'no.jsonl'),), dev=(")
    )
    assert main(["train", "--config", "one.py", *settings("name=untested")]) == 1
    assert "no.jsonl: no such file" in capsys.readouterr().err


def test_a_kill_between_a_validation_and_its_record_costs_no_candidate(space, monkeypatch) -> None:
    monkeypatch.delenv("HF_REPO_ID", raising=False)
    few = ("train.steps=2", "validation.every_steps=2", "average.best=1")
    for call, at in (("hebasr_jax.train.tell", 2), ("hebasr_jax.train.rank", 1)):
        name = call.rsplit(".", 1)[-1]
        meddle = {"call": call, "at": at, "signal": "SIGKILL"}
        run(space, "round1", name, *few, code=-9, meddle=meddle)
        run(space, "round1", name, *few)
        best = json.loads((space / "runs" / name / "best.json").read_text())
        assert best["2"]["wer"] is not None
        final = json.loads((space / "runs" / name / "final.json").read_text())
        assert final["candidates"]


def test_the_export_is_the_chosen_weights_and_the_card_tells_of_them(whole) -> None:
    final = json.loads((whole / "final.json").read_text())
    wers = {row["name"]: (row["wer"], row["loss"]) for row in final["candidates"]}
    assert len(wers) == 4
    assert wers[final["chosen"]] == min(wers.values())
    exported = whole / "export" / "transformers"
    params = flat(
        load_params(exported, model_config(read_config(exported)), "transformers", place=np.asarray)
    )
    steps = {name: whole / "checkpoints" / name.split()[-1] for name in final["members"]}
    trees = {name: flat(load_trained(path)) for name, path in steps.items()}
    for path, leaf in params.items():
        mean = sum(
            weight * trees[name][path].astype(np.float64)
            for name, weight in final["members"].items()
        )
        assert np.array_equal(leaf, jnp.asarray(mean.astype(np.float32)).astype(leaf.dtype)), path
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert final["chosen"] in card
    assert "What it must not be used for" in card


@pytest.mark.parametrize("config", ["round1", "round2"])
def test_rounds_1_and_2_run_to_the_export(space, config, monkeypatch) -> None:
    monkeypatch.delenv("HF_REPO_ID", raising=False)
    told = run(space, config, config, "validation.every_steps=5", "train.checkpoint_steps=5")
    assert "uploaded" not in told
    names = {p.name for p in (space / "runs" / config / "export").iterdir()}
    assert names == {"original", "transformers"}
    lines = read_metrics(space / "runs" / config / "metrics.jsonl")
    rates = [line["rates"]["decoder"] for line in lines if line["kind"] == "train"]
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)  # both schedules end at nothing


def test_a_failed_upload_fails_nothing_and_is_tried_again(space, whole, hub) -> None:
    hub.faults["/api/repos/create"] = [(403, {})]
    final = whole / "final.json"
    forget_upload(whole)
    told = run(space, "round2_5", "whole")
    assert "not uploaded: " in told
    assert "hf auth login" in told
    assert not json.loads(final.read_text())["upload"]
    told = run(space, "round2_5", "whole", "export.upload=false")
    assert "uploaded" not in told
    run(space, "round2_5", "whole")
    assert json.loads(final.read_text())["upload"]["repository"] == MODEL


def test_a_bad_repository_is_refused_before_training(space, monkeypatch, capsys) -> None:
    monkeypatch.chdir(space)
    monkeypatch.setenv("HF_REPO_ID", "no repository")
    words = local("round2", "new")
    assert main(["train", "--config", str(CONFIGS / "round2.py"), *words]) == 1
    assert "HF_REPO_ID" in capsys.readouterr().err
    assert not (space / "runs" / "new").exists()


@pytest.mark.parametrize("config", SETS)
def test_without_data_and_weights_a_round_fails_early_with_the_remedy(
    config, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(CONFIGS / f"{config}.py")
    write_tiny_model(tmp_path / "tiny")
    assert main(["train", "--config", path, *settings("model.path=tiny")]) == 1
    told = capsys.readouterr().err
    assert "ivrit-ai/crowd-transcribe-v5" in told
    assert "hebasr prepare --config" in told
    assert len(told.split("error: ")[1].splitlines()) <= 3
    layers = settings(*(["stages.0.decoder.trained_layers=1"] if config != "round1" else []))
    more = settings(
        *(
            ["stages.1.decoder.trained_layers=1", "stages.1.encoder.trained_layers=1"]
            if config != "round1"
            else []
        )
    )
    words = [*settings("model.path=tiny"), *layers, *more]
    assert main(["train", "--config", path, "--dry-run", *words]) == 0
    shown = capsys.readouterr().out
    assert "Sets that are not here" in shown
    assert "ivrit-ai/crowd-recital-whisper-training" in shown
    assert "Learning rates, stage" in shown

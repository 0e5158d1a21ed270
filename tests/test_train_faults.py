"""What goes wrong in training is told in one to three lines, and nothing that was good is lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tone_runs import (
    WORDS,
    arrays,
    checkpoints,
    losses,
    make_workspace,
    read_rows,
    settings,
    train,
    write_rows,
)

from hebasr_jax.cli import main
from hebasr_jax.config import model_config, read_config
from hebasr_jax.errors import UserError
from hebasr_jax.paths import flat, nested
from hebasr_jax.run_folder import open_run
from hebasr_jax.tiny import TINY, with_merges, write_tiny_model
from hebasr_jax.tracking import read_metrics
from hebasr_jax.weights import load_params, save_params

STEP = "hebasr_jax.train.one_step"
QUIET = ("validation.every_steps=0", "train.checkpoint_steps=3")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A workspace with a run, `cut`, that was stopped and has checkpoints of step 3 and later."""
    folder = make_workspace(tmp_path_factory.getbasetemp(), "faults")
    stop = {"call": STEP, "at": 5, "signal": "SIGTERM"}
    train(folder, *settings("name=cut", *QUIET), code=75, meddle=stop)
    return folder


@pytest.fixture
def space(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, and the place to be."""
    folder = tmp_path / "space"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def refused(capsys, *changes: str, extra: tuple[str, ...] = ()) -> str:
    """What the command says as it ends with code 1 before anything is compiled."""
    code = main(["train", "--config", "config.py", *settings(*QUIET, *changes), *extra])
    out, told = capsys.readouterr()
    assert code == 1
    assert out == ""
    assert "Traceback" not in told
    assert told.startswith("error: ")
    assert len(told.splitlines()) <= 3, told
    assert not [path for path in Path("runs").rglob("*") if "partial" in path.name]
    return told


def enough(*_: object) -> None:
    """Ends a start where a test has seen what it wants to see."""
    raise UserError("that is enough")


def begun(*changes: str, accept: bool = False) -> None:
    """Starts the run `cut` again, up to where a test ends it by `enough`."""
    words = settings("name=cut", *QUIET, *changes)
    assert main(["train", "--config", "config.py", *words, *["--accept-changes"] * accept]) == 1


def reword(manifest: Path) -> None:
    rows = read_rows(manifest)
    rows[5]["text"] = WORDS[0]
    write_rows(manifest, rows)


def swap_letters(path: Path) -> None:
    """The ids of two letters change places: another tokenizer of the same size."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


def contents(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def flat_params(folder: Path) -> dict[str, np.ndarray]:
    config = model_config(read_config(folder))
    return flat(load_params(folder, config, "transformers", place=np.asarray))


def poison(source: Path, folder: Path) -> None:
    """The model with one weight that is no number."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    params = {path: np.array(leaf) for path, leaf in flat_params(source).items()}
    params["decoder/norm/scale"][0] = np.nan
    save_params(nested(params), model_config(read_config(folder)), "transformers", folder)


CHANGES = {
    "config": (("optim.beta1=0.8",), "optim.beta1: 0.9 -> 0.8"),
    "time stamps": (("text.stamp_share=0.5",), "text.stamp_share: 0.0 -> 0.5"),
    "manifest": ((), "data.tones: "),
    "tokenizer": ((), "tokenizer: "),
    "other model": (("model.path=other",), "model.path: "),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resumed_run_must_be_what_it_was(space, capsys, what) -> None:
    changes, named = CHANGES[what]
    before = contents(Path("runs/cut"))
    if what == "manifest":
        reword(space / "corpus" / "train.jsonl")
    if what == "tokenizer":
        swap_letters(space / "tiny" / "tokenizer.json")
    if what == "other model":
        shutil.copytree(space / "tiny", space / "other")
    told = refused(capsys, "name=cut", *changes)
    assert "was trained with other settings" in told
    assert named in told
    assert "--accept-changes" in told
    assert contents(Path("runs/cut")) == before


def test_the_checkpoint_of_another_model_is_refused(space, capsys) -> None:
    """And leaves the record of what the run was trained with."""

    def record() -> dict[Path, bytes]:
        run = Path("runs/cut")
        described = {path: path.read_bytes() for path in (run / "config.json", run / "env.json")}
        return described | contents(run / "checkpoints")

    write_tiny_model(space / "small", config=with_merges(TINY, 0))
    words = settings("name=cut", "model.path=small", *QUIET)
    kept = record()
    assert main(["train", "--config", "config.py", *words, "--accept-changes"]) == 1
    error = capsys.readouterr().err.split("error: ")[1].splitlines()
    assert len(error) == 3
    assert error[0].endswith("is the checkpoint of another model")
    assert "decoder/embed/embedding: float32[" in error[1]
    assert record() == kept


def test_a_start_that_cannot_go_on_leaves_no_file_of_its_own_to_the_next(
    space, monkeypatch
) -> None:
    """Else the old command would go on with the other model's tokenizer and not know it."""
    tokenizer, env = Path("runs/cut/model/tokenizer.json"), Path("runs/cut/env.json")
    kept, plan = tokenizer.read_bytes(), Path("runs/cut/plan.json").read_bytes()
    shutil.copytree(space / "tiny", space / "other")
    swap_letters(space / "other" / "tokenizer.json")
    with monkeypatch.context() as patch:
        patch.setattr("hebasr_jax.train.start_or_resume", enough)
        begun("model.path=other", accept=True)
    assert tokenizer.read_bytes() != kept
    assert Path("runs/cut/plan.json").read_bytes() == plan
    monkeypatch.setattr("hebasr_jax.train.compile_programs", enough)
    begun()
    assert tokenizer.read_bytes() == kept
    assert [start["changes"] for start in json.loads(env.read_text())["starts"]] == [[], []]


def test_accepted_changes_are_recorded_and_gone_on_with(space, capsys, monkeypatch) -> None:
    """Moments of another kind, too: they are cast as they are read."""
    monkeypatch.setattr("hebasr_jax.train.compile_programs", enough)
    told = refused(capsys, "name=cut", "optim.moments=bfloat16")
    assert 'optim.moments: "float32" -> "bfloat16"' in told
    begun("optim.moments=bfloat16", accept=True)
    starts = json.loads(Path("runs/cut/env.json").read_text())["starts"]
    assert starts[-1]["changes"] == ['optim.moments: "float32" -> "bfloat16"']
    begun("optim.moments=bfloat16")
    assert len(json.loads(Path("runs/cut/env.json").read_text())["starts"]) == 3


def test_a_folder_is_one_runs_at_a_time(space, capsys) -> None:
    with open_run(Path("runs/cut")):
        assert "runs/cut is in use" in refused(capsys, "name=cut")


def damage(checkpoint: Path) -> None:
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")


def test_it_goes_on_past_a_damaged_checkpoint_and_with_accepted_changes(space) -> None:
    reword(space / "corpus" / "train.jsonl")
    run = space / "runs" / "cut"
    before, last = losses(run), checkpoints(run)[-1]
    damage(run / "checkpoints" / str(last))
    words = (*settings("name=cut", *QUIET), "--accept-changes")
    told = train(space, *words, code=75, meddle={"call": STEP, "at": 3, "signal": "SIGTERM"})
    assert "changed since the last start: data.tones: " in told
    assert f"checkpoint {last} is damaged and passed over" in told
    assert "going on from step 3" in told
    assert losses(run)[:3] == before[:3]
    assert len(losses(run)) == checkpoints(run)[-1] > 4
    assert (run / "checkpoints" / f"{last}.damaged").is_dir()


def test_when_every_checkpoint_is_damaged_it_does_not_start_again(
    space, capsys, monkeypatch
) -> None:
    for step in checkpoints(Path("runs/cut")):
        damage(Path("runs/cut/checkpoints") / str(step))
    code = main(["train", "--config", "config.py", *settings("name=cut", *QUIET)])
    told = capsys.readouterr().err
    assert code == 1
    assert told.count("is damaged and passed over") == 2
    assert "error: no checkpoint in" in told
    assert losses(Path("runs/cut"))


BAD_INPUT = {
    "no manifest": (("data.train.0.path=corpus/absent.jsonl",), "absent.jsonl"),
    "empty manifest": (("data.train.0.path=corpus/empty.jsonl",), "empty.jsonl"),
    "no valid clip": (("data.max_clip_s=0.11",), "has no clip to train on"),
    "all rows bad": (("data.train.0.path=corpus/rows.jsonl",), "tones"),
    "no model": (("model.path=nowhere",), "nowhere"),
    "no rates": (
        tuple(
            f"stages.0.{group}.learning_rate=0"
            for group in ("conv_stem", "encoder", "projector", "embedding", "decoder")
        ),
        "nothing is trained",
    ),
    "unknown field": (("train.step=3",), "train.steps"),
    "more devices than there are": (("compute.devices=64",), "compute.devices = 64"),
    "a kernel for a GPU": (("compute.attention=cudnn",), "cudnn"),
    "runs where no folder can be": (("runs_dir=config.py",), "config.py"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_refused(space, capsys, what) -> None:
    changes, named = BAD_INPUT[what]
    (space / "corpus" / "empty.jsonl").write_text("")
    (space / "corpus" / "rows.jsonl").write_text("[]\n{}\nnonsense\n")
    assert named in refused(capsys, "name=new", *changes)
    left = {path.name for path in Path("runs/new").glob("*")}
    assert left <= {".lock", "model", "quarantine.jsonl"}


def test_a_config_that_cannot_be_read_is_refused(space, capsys) -> None:
    for text in ("def get_config(:", "get_config = 3", "raise ValueError('no')"):
        Path("config.py").write_text(text)
        assert "config.py" in refused(capsys)
    Path("config.py").unlink()
    assert "config.py" in refused(capsys)


def test_rows_must_go_round_the_devices(space) -> None:
    changes = ("name=new", "data.batch_clips=3", *QUIET)
    told = train(space, *settings(*changes), code=1, devices=2)
    assert "error: batches of 3 rows cannot be spread over 2 devices" in told
    assert len(told.split("error: ")[1].splitlines()) == 3


def test_batches_of_seconds_of_audio_are_made_for_a_number_of_devices(space, monkeypatch) -> None:
    """Else the user would read no more than two hashes of a plan."""
    by_audio = ("name=new", "data.batch_clips=None", "data.batch_audio_s=40", *QUIET)
    monkeypatch.setattr("hebasr_jax.train.compile_programs", enough)
    assert main(["train", "--config", "config.py", *settings(*by_audio)]) == 1
    Path("runs/new/checkpoints/5").mkdir(parents=True)
    told = train(space, *settings(*by_audio), code=1, devices=3)
    assert "devices make the rows of a batch a multiple of: 8 -> 24; plan.train: " in told


def test_too_many_bad_clips_end_the_run_with_the_reasons(space, capsys, monkeypatch) -> None:
    """Found while batches are read: nothing but the compiler is left out here."""
    monkeypatch.setattr("hebasr_jax.train.compile_programs", lambda *_: {})
    for number in range(12):
        (space / "corpus" / f"train-{number}.flac").write_bytes(b"")
    code = main(["train", "--config", "config.py", *settings("name=new", *QUIET)])
    told = capsys.readouterr().err
    assert code == 1
    error = told.split("error: ")[1].splitlines()
    assert "4 of 77 clips are bad, more than the 3.85 that may be" in error[0]
    assert "3 x " in error[1] or "4 x " in error[1]
    rows = read_rows(Path("runs/new/quarantine.jsonl"))
    assert len(rows) >= 4


def test_a_first_start_that_failed_leaves_nothing_behind(space, capsys, monkeypatch) -> None:
    """Until there is a checkpoint the same name may start with another model and mended data."""
    monkeypatch.setattr("hebasr_jax.train.compile_programs", lambda *_: {})
    shutil.copytree("tiny", "other")
    swap_letters(Path("other/tokenizer.json"))
    Path("corpus/rows.jsonl").write_text("[]\n{}\nnonsense\n")
    refused(capsys, "name=new", "data.train.0.path=corpus/rows.jsonl")
    change = settings(
        "name=new", *QUIET, "model.path=other", "data.train.0.path=corpus/absent.jsonl"
    )
    assert main(["train", "--config", "config.py", *change]) == 1
    assert (
        Path("runs/new/model/tokenizer.json").read_bytes()
        == Path("other/tokenizer.json").read_bytes()
    )
    assert not Path("runs/new/quarantine.jsonl").exists()


def test_steps_without_a_finite_gradient_change_nothing_and_end_the_run(space) -> None:
    poison(Path("tiny"), Path("poisoned"))
    changes = ("name=new", "model.path=poisoned", "train.max_skipped_steps=4", *QUIET)
    told = train(space, *settings(*changes), code=1)
    error = told.split("error: ")[1].splitlines()
    assert len(error) == 3
    assert error[0] == "4 steps in a row had no finite gradient; the run ends"
    lines = read_metrics(Path("runs/new/metrics.jsonl"))
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [line["step"] for line in skipped] == [1, 2, 3, 4]
    names = {row["id"] for row in read_rows(space / "corpus" / "train.jsonl")}
    for line in skipped:
        assert line["nonfinite"]["loss"] == "nan"
        assert len(line["clips"]) == 8
        assert set(line["clips"]) <= names
    assert checkpoints(Path("runs/new")) == [3]
    state = arrays(Path("runs/new"), 3)
    start = flat_params(Path("poisoned"))
    for path, leaf in start.items():
        assert np.array_equal(state[f"trained/{path}"], leaf, equal_nan=True), path
    assert all(not np.any(leaf) for name, leaf in state.items() if name.startswith("moments"))
    told = train(space, *settings(*changes), code=1)  # a stop does not begin the count anew
    assert "going on from step 3" in told
    assert "error: 4 steps in a row had no finite gradient" in told
    lines = read_metrics(Path("runs/new/metrics.jsonl"))
    assert max(line["step"] for line in lines if line["kind"] == "skipped") == 4


def test_a_disk_that_fills_up_is_told_and_old_checkpoints_stay(space) -> None:
    last = checkpoints(Path("runs/cut"))[-1]
    kept = contents(Path("runs/cut/checkpoints"))
    full = {"call": STEP, "at": 3, "signal": "SIGTERM", "file_bytes": 60_000}
    told = train(space, *settings("name=cut", *QUIET), code=1, meddle=full)
    error = told.split("error: ")[1].splitlines()
    assert len(error) == 3
    assert "was not saved" in error[0]
    assert f"finished checkpoints: 3, {last}" in error[2]
    assert kept.items() <= contents(Path("runs/cut/checkpoints")).items()

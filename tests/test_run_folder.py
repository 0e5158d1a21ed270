"""A run's folder: one owner, the same settings, and signals that end in a saved state."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hebasr_jax import run_changes, run_folder, run_start
from hebasr_jax.errors import UserError
from hebasr_jax.run_changes import changes_since
from hebasr_jax.run_folder import (
    EXIT_RUN_AGAIN,
    StopSignal,
    commit,
    open_run,
    read_json,
    record_start,
    write_json,
)

ROOT = Path(__file__).parents[1]
CONFIG = {
    "seed": {"value": 0, "origin": "default"},
    "train.log_steps": {"value": 10, "origin": "default"},
    "augment.speed_factors": {"value": (0.9, 1.1), "origin": "configs/a.py"},
}
FIXED = {"sets": {"fleurs": "ab12", "קול": "cd34"}, "tokenizer": "ef56"}


def _child(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _changed(**values: object) -> dict:
    new = {name.replace("__", "."): value for name, value in values.items()}
    return {k: {**v, "value": new.get(k, v["value"])} for k, v in CONFIG.items()}


def begin(folder: Path, config: dict, fixed: dict, *, about: dict | None = None, **how) -> list:
    """What changed since the last start, and the record of this one."""
    changes = changes_since(folder, config, fixed, **how)
    record_start(folder, config, fixed, changes, about=about)
    return changes


@pytest.fixture
def trained(tmp_path) -> Path:
    begin(tmp_path, CONFIG, FIXED)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    return tmp_path


_HOLDER = """
import sys, pathlib, time
from hebasr_jax.run_folder import open_run
with open_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_never_share_a_folder_and_a_dead_one_lets_go(tmp_path) -> None:
    run = tmp_path / "הרצה 1"
    holder = _child(_HOLDER, run)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on "), open_run(run):
        pass
    holder.kill()
    holder.wait()
    ours = f"process {os.getpid()} on "
    with open_run(run), pytest.raises(UserError, match=ours), open_run(run):
        pass
    with open_run(run):  # given back at the end
        pass


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), open_run(tmp_path / "file" / "run"):
        pass


def test_the_same_start_again_changes_nothing(trained) -> None:
    before = read_json(trained / "config.json")
    assert begin(trained, CONFIG, FIXED, about={"licences": {"fleurs": "CC"}}) == []
    assert read_json(trained / "config.json") == before == json.loads(json.dumps(CONFIG))
    env = read_json(trained / "env.json")
    assert env["fixed"] == FIXED
    assert len(env["starts"]) == 2
    assert env["starts"][1]["licences"] == {"fleurs": "CC"}
    assert env["starts"][0]["packages"]["jax"]
    assert "cpu" in env["starts"][0]["devices"].lower()


def test_the_environment_holds_no_secret(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret123")
    monkeypatch.setattr(sys, "argv", ["train.py", "--token", "hf_secret123"])
    begin(tmp_path, CONFIG, FIXED)
    assert "hf_secret123" not in (tmp_path / "env.json").read_text()


def test_a_changed_value_is_refused_shown_and_changes_nothing(trained) -> None:
    config, fixed = _changed(seed=1, augment__speed_factors=[1.0]), {**FIXED, "tokenizer": "0000"}
    files = {path: path.read_bytes() for path in trained.glob("*.json")}
    with pytest.raises(UserError) as caught:
        begin(trained, config, fixed)
    _, why, remedy = str(caught.value).splitlines()
    assert why == (
        'augment.speed_factors: [0.9, 1.1] -> [1.0]; seed: 0 -> 1; tokenizer: "ef56" -> "0000"'
    )
    assert "--accept-changes" in remedy
    assert {path: path.read_bytes() for path in trained.glob("*.json")} == files
    changes = begin(trained, config, fixed, accept_changes=True)
    assert read_json(trained / "env.json")["starts"][-1]["changes"] == changes == why.split("; ")
    assert begin(trained, config, fixed) == []


def test_a_changed_set_is_refused_by_name(trained) -> None:
    fixed = {**FIXED, "sets": {"fleurs": "ab12", "new": "77"}}
    with pytest.raises(UserError, match=r'sets.new: nothing -> "77"; sets.קול: "cd34" -> nothing'):
        begin(trained, CONFIG, fixed)


def test_many_differences_are_counted(trained) -> None:
    config = {f"optim.x{n}": {"value": n, "origin": "a.py"} for n in range(9)}
    with pytest.raises(UserError, match="; 8 more"):
        begin(trained, {**_changed(seed=3, augment__speed_factors=[2.0]), **config}, FIXED)


def test_a_setting_that_is_new_is_a_change_unless_it_is_at_its_default(trained) -> None:
    new = {"optim.moments": {"value": "float32", "origin": "--set"}}
    with pytest.raises(UserError, match=r'optim\.moments: nothing -> "float32"'):
        begin(trained, {**CONFIG, **new}, FIXED)
    assert begin(trained, {**CONFIG, **new}, FIXED, at_defaults=["optim.moments"]) == []


def test_a_kind_of_fact_that_is_new_is_no_change(trained) -> None:
    """Else no run of an older version could go on."""
    assert begin(trained, CONFIG, {**FIXED, "devices": 8}) == []
    with pytest.raises(UserError, match="devices: 8 -> 3"):
        begin(trained, CONFIG, {**FIXED, "devices": 3})


def test_a_run_is_not_begun_where_no_checkpoint_could_be_saved(tmp_path, monkeypatch) -> None:
    below = tmp_path / os.fsdecode(b"r\xff")
    below.mkdir()
    monkeypatch.chdir(below)
    with pytest.raises(UserError, match="not UTF-8"), open_run(Path("runs/a")):
        pass
    assert not list(below.iterdir())


def test_processes_that_read_other_data_are_refused(monkeypatch) -> None:
    """Each would train on batches of its own."""
    mine = {"data.tones": "ab", "plan.train": "cd"}
    theirs = dict(mine)
    monkeypatch.setattr(run_start, "from_all_hosts", lambda own: [own, own, theirs])
    run_start.refuse_unlike(mine)
    theirs["data.tones"] = "xy"
    with pytest.raises(UserError, match=r'processes 0 and 2 [^"]*data.tones: "ab" -> "xy"'):
        run_start.refuse_unlike(mine)


def test_values_that_touch_no_step_may_change_and_are_noted(trained) -> None:
    assert begin(trained, _changed(train__log_steps=50), FIXED) == ["train.log_steps: 10 -> 50"]


def test_what_may_change_is_in_the_config_and_spares_the_schedule() -> None:
    """Every pattern names real fields, so that a renamed field cannot slip out of the list."""
    import re

    from hebasr_jax.config_file import flatten
    from hebasr_jax.run_config import Config, Data, Source

    sets = (Source("a", "a.jsonl"),)
    every = set(flatten(Config(data=Data(train=sets, dev=sets, test=sets))))
    parts = {part for path in every for part in path.split(".")}
    for pattern in run_changes.MAY_CHANGE:
        assert any(re.fullmatch(pattern, path) for path in every), pattern
        assert set(re.findall(r"\w+", pattern)) <= parts, pattern
    free = set(filter(run_changes.free_to_change, every))
    assert {"data.micro_audio_s", "compute.devices"} <= free  # another machine's
    lasting = {"seed", "train.steps", "compute.dtype", "data.batch_clips", "data.train.0.path"}
    lasting |= {"stages.0.epochs", "stages.0.decoder.learning_rate", "text.stamp_share"}
    assert lasting | {"validation.max_clips", "optim.warmup_steps"} <= every - free


@pytest.mark.parametrize("name", ["5.partial", "5.partial.orbax-checkpoint-tmp"])
def test_before_the_first_checkpoint_all_may_change(tmp_path, name) -> None:
    begin(tmp_path, CONFIG, FIXED)
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert begin(tmp_path, _changed(seed=1), FIXED) == []
    (tmp_path / "checkpoints" / "5.damaged").mkdir()
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        begin(tmp_path, _changed(seed=2), FIXED)


def test_json_is_whole_or_as_before(tmp_path, monkeypatch) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"קובץ": 1})
    assert "קובץ" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"קובץ": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    path.write_text('{"a"')
    with pytest.raises(UserError, match="cannot be read"):
        read_json(path)


def test_the_commit_is_of_the_repository_that_tracks_the_file(tmp_path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    tracked, foreign = tmp_path / "tracked.py", tmp_path / "foreign.py"
    tracked.write_text("1")
    assert commit(tracked) is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert commit(tracked) == git("rev-parse", "HEAD")
    foreign.write_text("2")
    assert commit(tracked) == git("rev-parse", "HEAD") + "+dirty"
    assert commit(foreign) is None


_TRAINING = """
import sys, time
from hebasr_jax.run_folder import EXIT_RUN_AGAIN, StopSignal
phase = sys.argv[1]
with StopSignal() as stop:
    stop.worth_saving = phase != "compile"
    print("ready", flush=True)
    if phase == "compile":
        import jax, jax.numpy as jnp
        def deep(x):
            for i in range(3000):
                x = jnp.sin(x @ x) + i
            return x
        jax.jit(deep).lower(jnp.ones((64, 64))).compile()
    while not stop.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    if phase == "stuck":
        time.sleep(60)
sys.exit(EXIT_RUN_AGAIN)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_for_a_save_and_a_second_one_ends_at_once(number) -> None:
    child = _child(_TRAINING, "stuck")
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.stdout.readline() == "saving\n"
    child.send_signal(number)
    _, said = child.communicate(timeout=10)
    assert child.returncode == 128 + number
    assert f"{number.name}: saving after this step; again to leave at once" in said
    assert f"{number.name} again: left at once" in said


def test_a_saved_run_says_by_its_exit_code_that_it_is_to_be_run_again() -> None:
    child = _child(_TRAINING, "step")
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=10)
    assert child.returncode == EXIT_RUN_AGAIN == 75


def test_while_the_first_step_compiles_a_signal_ends_the_run_quickly() -> None:
    child = _child(_TRAINING, "compile")
    assert child.stdout.readline() == "ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(4)  # by now in the compiler, for minutes
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=5)
    assert child.returncode == EXIT_RUN_AGAIN
    assert "SIGTERM: nothing to save yet" in said


def test_handlers_are_given_back_and_other_threads_have_none() -> None:
    before = [signal.getsignal(number) for number in run_folder.SIGNALS]
    with StopSignal() as stop:
        stop.worth_saving = True
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(500):
            if stop.requested:
                break
            threading.Event().wait(0.01)
        assert stop.requested
    assert [signal.getsignal(number) for number in run_folder.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    seen = []

    def elsewhere() -> None:
        with StopSignal() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]

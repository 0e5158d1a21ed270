"""hub.find_model against a stand-in hub: a real HTTP server, and a child process per call."""

import json
import os
import socket
from pathlib import Path

import pytest
import soundfile
from reference import noise, tiny_folder
from stand_in_hub import FILES, MODEL, TOKEN, Hub, child, served

from hebasr_jax.errors import UserError
from hebasr_jax.hub import ModelFolder, find_model

WANTED = {name: data for name, data in FILES.items() if not name.endswith((".bin", ".pt"))}
API = "/api/models/[^/]+/[^/ ]+(/revision/[^ ]*)?( |$)"
CHILD = """
import json, sys
from hebasr_jax.errors import UserError
from hebasr_jax.hub import find_model
try:
    found = find_model(sys.argv[1], revision=sys.argv[2] or None)
    print(json.dumps({"path": str(found.path), "source": found.source, "sha": found.revision}))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def hub():
    with served() as server:
        yield server


def fetch(home: Path, endpoint: str | Hub, source: str = MODEL, revision: str = "", **env: str):
    """find_model in a child process."""
    done = child(home, endpoint, "-c", CHILD, source, revision, **env)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if "error" in answer:
        assert 1 <= len(answer["error"].splitlines()) <= 3
        assert answer["error"].startswith(source)
    return answer


def contents(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_fetches_exact_bytes_at_a_commit_and_no_pickle(hub, tmp_path):
    found = fetch(tmp_path, hub)
    assert found["sha"] == hub.refs["main"]
    assert found["source"] == MODEL
    assert contents(found["path"]) == WANTED
    assert not hub.asked(r"\.bin|\.pt")
    assert all(f"Bearer {TOKEN}" in notes for _, _, notes in hub.log)
    # The branch is looked up once and files are asked for by commit: a push cannot come between.
    assert len(hub.asked(API)) == 1
    assert len(hub.asked(f"GET .*/resolve/{found['sha']}/")) == len(WANTED)


def test_second_call_uses_the_cache_and_a_moved_branch_is_fetched(hub, tmp_path):
    first = fetch(tmp_path, hub)
    hub.log.clear()
    assert fetch(tmp_path, hub) == first
    assert not hub.asked("GET .*/resolve/")
    moved = hub.push(FILES | {"config.json": b'{"model_type": "qwen3_asr", "v": 2}'})
    second = fetch(tmp_path, hub)
    assert second["sha"] == moved != first["sha"]
    assert contents(second["path"])["config.json"].endswith(b'"v": 2}')
    assert len(hub.asked("GET .*/resolve/")) == 1  # the unchanged files are shared
    assert fetch(tmp_path, hub, revision=first["sha"]) == first


def test_cached_commit_needs_no_hub(hub, tmp_path):
    first = fetch(tmp_path, hub)
    closed = f"http://127.0.0.1:{closed_port()}"
    assert fetch(tmp_path, closed, revision=first["sha"]) == first
    assert fetch(tmp_path, hub, revision=first["sha"], HF_HUB_OFFLINE="1") == first


@pytest.mark.parametrize(
    ("stage", "status", "code", "told"),
    [
        (API, 404, "RepoNotFound", ["not found", "no such folder", "Check the name"]),
        (API, 403, "GatedRepo", ["403", "terms", "hf auth login", "HF_TOKEN"]),
        (API, 403, "", ["403", "hf auth login"]),
        (API, 401, "", ["401", "private", "hf auth login"]),
        ("/resolve/.*config", 403, "GatedRepo", ["403", "terms"]),
        ("/resolve/.*config", 403, "", ["403", "hf auth login"]),
    ],
)
def test_final_answers_stop_at_once(hub, tmp_path, stage, status, code, told):
    hub.faults[stage] = [(status, {"X-Error-Code": code})] * 9
    error = fetch(tmp_path, hub)["error"]
    assert [text for text in told if text not in error] == []
    assert len(hub.asked(stage)) == 1


def test_limited_requests_are_not_repeated(hub, tmp_path):
    hub.faults["/api/models"] = [(429, {})] * 9
    error = fetch(tmp_path, hub)["error"]
    assert "429" in error
    assert "Wait" in error
    assert len(hub.log) == 1


def test_unknown_revision(hub, tmp_path):
    assert "no revision v9" in fetch(tmp_path, hub, revision="v9")["error"]
    gone = "0" * 40
    assert f"no revision {gone}" in fetch(tmp_path, hub, revision=gone)["error"]


def test_busy_hub_is_asked_again(hub, tmp_path):
    hub.faults[API] = [(503, {}), (500, {})]
    assert contents(fetch(tmp_path, hub)["path"]) == WANTED


def test_dead_hub_is_given_up_after_three_attempts(hub, tmp_path):
    hub.faults["/api/models"] = [(503, {})] * 99
    error = fetch(tmp_path, hub)["error"]
    assert "HTTP 503" in error
    assert "local folder" in error
    assert len(hub.log) == 3


def test_refused_connection_and_offline_switch(hub, tmp_path):
    error = fetch(tmp_path, f"http://127.0.0.1:{closed_port()}")["error"]
    assert "cannot be reached" in error
    assert "network" in error
    assert "HF_HUB_OFFLINE" in fetch(tmp_path, hub, HF_HUB_OFFLINE="1")["error"]
    assert hub.log == []


def test_connection_dropped_in_mid_file_is_resumed(hub, tmp_path):
    weights = os.urandom(12 << 20)  # huggingface_hub keeps whole chunks of 10 MiB
    hub.push(FILES | {"model.safetensors": weights})
    hub.faults["GET .*safetensors"] = [(200, {"drop": str(11 << 20)})]
    assert contents(fetch(tmp_path, hub)["path"]) == WANTED | {"model.safetensors": weights}
    assert len(hub.asked("GET .*safetensors")) == 2
    assert hub.asked("GET .*safetensors bytes=[1-9]")


def test_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "home").touch()
    error = fetch(tmp_path / "home", hub)["error"]
    assert "cannot be stored" in error
    assert "HF_HOME" in error
    assert len(hub.asked(API)) == 1


def test_repository_without_model_files(hub, tmp_path):
    hub.push({"pytorch_model.bin": b"pickle"})
    assert "no file of a model" in fetch(tmp_path, hub)["error"]
    assert not hub.asked("resolve")


def test_commands_take_a_hub_id(hub, tmp_path):
    """transcribe and convert from the hub give what the folder gives, at a named commit."""
    sha = hub.push({path.name: path.read_bytes() for path in tiny_folder().iterdir()})
    soundfile.write(tmp_path / "a.wav", noise(16000), 16000)
    words = [str(tmp_path / "a.wav"), "--format", "json", "--max-new-tokens", "6"]
    fetched = child(tmp_path / "home", hub, "-m", "hebasr_jax", "transcribe", MODEL, *words)
    local = child(
        tmp_path / "home", hub, "-m", "hebasr_jax", "transcribe", str(tiny_folder()), *words
    )
    assert fetched.returncode == local.returncode == 0, fetched.stderr
    assert json.loads(fetched.stdout) == json.loads(local.stdout)
    words = [MODEL, str(tmp_path / "copy"), "--layout", "original"]
    done = child(tmp_path / "home", hub, "-m", "hebasr_jax", "convert", *words)
    assert done.returncode == 0, done.stderr
    assert f"at {sha}" in done.stderr
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())


def test_local_folder_and_what_is_neither(tmp_path):
    assert find_model(str(tmp_path)) == ModelFolder(tmp_path, str(tmp_path), None)
    with pytest.raises(UserError, match="a folder has no revision main"):
        find_model(str(tmp_path), revision="main")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UserError, match="is a file"):
        find_model(str(file))
    for source in ("asr", "./models/asr", "a/b/c", "../asr", "מודל/עברית", "org/a b"):
        with pytest.raises(UserError, match="org/name"):
            find_model(source)


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

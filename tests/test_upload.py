"""upload.upload_model against a stand-in hub: real HTTP, and a child process per call."""

import json
import time
from pathlib import Path

import pytest
from stand_in_hub import MODEL, SIGNATURE, TOKEN, Hub, child, served, start

from hebasr_jax.errors import UserError
from hebasr_jax.upload import check_repo_id, model_files, upload_model

SENT = {
    "README.md": "---\nlanguage: he\n---\n# מודל\n".encode(),
    "config.json": b'{"model_type": "qwen3_asr"}',
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": "א ב\n".encode(),
    "model-00001-of-00003.safetensors": bytes(range(256)) * 300,
    "model-00002-of-00003.safetensors": bytes(range(256)) * 200,
    "model-00003-of-00003.safetensors": bytes(range(256)) * 100,
    "training_curve.svg": b"<svg/>",
}
KEPT_BACK = {".env": b"secret", ".lock": b"", "optimizer.pt": b"\x80", ".hidden.json": b"{}"}
CHILD = """
import json, sys, traceback
from pathlib import Path
from hebasr_jax.upload import upload_model
from hebasr_jax.errors import UserError
try:
    answer = {"url": upload_model(Path(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))}
except UserError as error:
    traceback.print_exc()
    answer = {"error": str(error)}
print(json.dumps(answer))
"""
CREATE, COMMIT, PUT = "POST /api/repos/create", "POST .*/commit/", "PUT /lfs/"
STAGES = [CREATE, "GET .*/tree/", "POST .*/validate-yaml", "POST .*/preupload/", "POST .*/batch"]
STAGES += [PUT, COMMIT]


@pytest.fixture
def hub():
    with served(None) as server:
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for name, data in (SENT | KEPT_BACK).items():
        (path / name).write_bytes(data)
    (path / "checkpoints").mkdir()
    return path


def words(folder: Path, repo: str = MODEL, **options: object) -> list[str]:
    settings = {"waits_s": [0.05, 0.1], "timeout_s": 20} | options
    return ["-c", CHILD, str(folder), repo, json.dumps(settings)]


def upload(folder: Path, hub: Hub | str, repo: str = MODEL, options=None, **env: str) -> dict:
    """upload_model in a child process; nothing that it or the hub now holds may tell the token."""
    home = folder.parent / "home"
    done = child(home, hub, *words(folder, repo, **(options or {})), **env)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if "error" in answer:
        assert 2 <= len(answer["error"].splitlines()) <= 3
    written = [path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()]
    if isinstance(hub, Hub):
        written += [data for files in hub.commits.values() for data in files.values()]
    assert not [data for data in written if TOKEN.encode() in data or SIGNATURE.encode() in data]
    return answer


def test_the_hub_has_the_files_byte_for_byte_in_one_commit(hub, folder):
    answer = upload(folder, hub)
    assert hub.files == SENT
    assert answer == {"url": f"{hub.address}/{MODEL}/commit/{hub.refs['main']}"}
    assert [len(hub.asked(stage)) for stage in STAGES] == [1, 1, 1, 1, 1, 3, 1]
    assert len(hub.commits) == 2  # with the empty one of a new repository
    assert hub.private
    assert all(f"Bearer {TOKEN}" in notes for method, _, notes in hub.log if method != "PUT")
    assert not [entry for entry in hub.asked(PUT) if TOKEN in entry[2]]  # storage is not the hub


def test_a_repository_is_public_only_if_asked(hub, folder):
    upload(folder, hub, options={"private": False})
    assert not hub.private


def test_a_second_upload_sends_what_is_new_and_takes_away_what_is_stale(hub, folder):
    first = upload(folder, hub)
    hub.push(hub.files | {".gitattributes": b"x", "notes.md": b"y", "tokenizer.json": b"stale"})
    assert set(upload(folder, hub)) == {"url"}
    assert hub.files == SENT | {".gitattributes": b"x", "notes.md": b"y"}
    for name in SENT:
        if name.endswith(".safetensors"):
            (folder / name).unlink()
    (folder / "model.safetensors").write_bytes(b"one file now")
    second = upload(folder, hub)
    names = {name for name in hub.files if name.endswith(".safetensors")}
    assert names == {"model.safetensors"}
    assert len(hub.asked(PUT)) == 4
    assert second != first
    before = len(hub.asked(COMMIT))
    assert upload(folder, hub) == second  # nothing is new
    assert len(hub.asked(COMMIT)) == before


@pytest.mark.parametrize(
    ("stage", "status"),
    [(CREATE, 401), (CREATE, 403), ("POST .*/preupload/", 403), (COMMIT, 401)],
)
def test_no_access_stops_at_once_with_the_remedy(hub, folder, stage, status):
    hub.faults[stage] = [(status, {})] * 9
    error = upload(folder, hub)["error"]
    for told in (f"HTTP {status}", "hf auth login", "HF_TOKEN", "namespace"):
        assert told in error
    assert len(hub.asked(stage)) == 1
    assert not any(hub.commits.values())


def test_one_who_may_write_but_not_create_can_upload(hub, folder):
    hub.push({})
    hub.faults[CREATE] = [(403, {})] * 9
    assert "url" in upload(folder, hub)
    assert hub.files == SENT


@pytest.mark.parametrize("stage", STAGES)
def test_a_busy_hub_is_asked_again(hub, folder, stage):
    hub.faults[stage] = [(status, {"Retry-After": "3600"}) for status in (429, 500)]
    began = time.monotonic()
    assert "url" in upload(folder, hub)
    assert time.monotonic() - began < 30
    assert hub.files == SENT
    assert len(hub.commits) == 2


@pytest.mark.parametrize(
    ("stage", "status"), [(CREATE, 500), (PUT, 500), (COMMIT, 503), (COMMIT, 412)]
)
def test_a_broken_hub_is_given_up_after_three_attempts(hub, folder, stage, status):
    hub.faults[stage] = [(status, {})] * 99
    error = upload(folder, hub)["error"]
    assert f"Attempts: 3, the last: HTTP {status}" in error
    assert "upload it again later" in error
    asked = len(hub.asked(stage))
    assert 3 <= asked <= 9 if stage == PUT else asked == 3  # of three files, at once
    assert not any(hub.commits.values())


def test_files_that_the_hub_refuses_are_not_sent_again(hub, folder):
    hub.faults["validate-yaml"] = [(400, {})] * 9
    assert "refuses the files (HTTP 400)" in upload(folder, hub)["error"]
    assert len(hub.asked("validate-yaml")) == 1


def test_a_killed_upload_goes_on_without_sending_anything_twice(hub, folder):
    hub.faults[PUT] = [(200, {"stall": ""})]
    process = start(folder.parent / "home", hub, *words(folder))
    assert hub.stalled.wait(60)
    deadline = time.monotonic() + 60
    while len(hub.objects) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    arrived = set(hub.objects)
    assert len(arrived) == 2
    assert hub.files == {}
    hub.log.clear()
    assert "url" in upload(folder, hub)
    assert hub.files == SENT
    sent = [path.removeprefix("/lfs/") for _, path, _ in hub.asked(PUT)]
    assert len(sent) == 1
    assert not arrived & set(sent)


def test_a_connection_that_breaks_is_mended(hub, folder):
    hub.faults[PUT] = [(200, {"hang_up": "20000"})]
    hub.faults[COMMIT] = [(200, {"hang_up": "10"})]
    assert "url" in upload(folder, hub)
    assert hub.files == SENT
    assert len(hub.asked(PUT)) == 4
    assert len(hub.commits) == 2


def test_a_silent_server_does_not_hold_the_run(hub, folder):
    hub.faults[CREATE] = [(200, {"stall": ""})] * 9
    began = time.monotonic()
    error = upload(folder, hub, options={"timeout_s": 0.5})["error"]
    assert "Attempts: 3" in error
    assert time.monotonic() - began < 30


def test_no_server_and_no_network(hub, folder):
    error = upload(folder, "http://127.0.0.1:9")["error"]  # the port of discard, closed
    assert "Attempts: 3, the last: Connect" in error
    assert "HF_HUB_OFFLINE" in upload(folder, hub, HF_HUB_OFFLINE="1")["error"]
    assert hub.log == []


@pytest.mark.parametrize("token", ["", "hf_עברית", "hf_a\x01b"])
def test_no_token_that_can_be_sent(hub, folder, token):
    answer = upload(folder, hub, HF_TOKEN=token)
    assert "no token" in answer["error"]
    assert not token or token not in str(answer)
    assert hub.log == []


def test_the_process_is_left_as_it_was(hub, folder):
    code = (
        "from huggingface_hub import get_session; from huggingface_hub.utils import logging\n"
        "def state():\n"
        "    client = get_session()\n"
        "    return client.timeout, client.event_hooks, client.follow_redirects,"
        " logging.get_verbosity()\n"
        "before = state()\n"
    )
    code += CHILD + "assert state() == before, (state(), before)\n"
    done = child(folder.parent, hub, "-c", code, *words(folder)[2:])
    assert done.returncode == 0, done.stderr
    assert hub.files == SENT


@pytest.mark.parametrize("repo", ["", "asr", "a/b/c", "org/a b", "org/..", "מודל/עברית", "-x/y"])
def test_what_is_no_repository_id(tmp_path, repo):
    for refused in (lambda: check_repo_id(repo), lambda: upload_model(tmp_path, repo)):
        with pytest.raises(UserError, match="org/name"):
            refused()
    check_repo_id(MODEL)


def test_only_the_files_of_a_model(folder):
    assert {path.name for path in model_files(folder)} == set(SENT)
    (folder / "config.json").unlink()
    for path in (folder, folder / "nothing"):
        with pytest.raises(UserError, match="is no model folder"):
            model_files(path)

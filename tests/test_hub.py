"""hub.find_model against a stand-in hub: a real HTTP server, and a child process per call."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile
from reference import noise, tiny_folder

from hebasr_jax.errors import UserError
from hebasr_jax.hub import ModelFolder, find_model

MODEL = "org/asr-he"
TOKEN = "hf_stand_in_token_never_shown"
FILES = {
    "config.json": b'{"model_type": "qwen3_asr"}',
    "merges.txt": "א ב\n".encode(),
    "model.safetensors": bytes(range(256)) * 400,
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"\x80\x04 a pickle",
    "notes.pt": b"\x80\x04 another",
}
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


def sha_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """One model repository; `faults[regex]` is a list of answers given before the right one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.faults: dict[str, list[tuple[int, dict[str, str]]]] = {}
        self.log: list[tuple[str, str, str]] = []  # method, path, Range or Authorization
        self.push(FILES)

    def push(self, files: dict[str, bytes]) -> str:
        self.refs["main"] = sha_of(files)
        self.commits[self.refs["main"]] = files
        return self.refs["main"]

    def asked(self, pattern: str) -> list[tuple[str, str, str]]:
        return [entry for entry in self.log if re.search(pattern, " ".join(entry))]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        notes = f"{self.headers.get('Range', '')} {self.headers.get('Authorization', '')}"
        self.server.log.append((self.command, path, notes))
        for pattern, answers in self.server.faults.items():
            if answers and re.search(pattern, f"{self.command} {path}"):
                return self.answer(*answers.pop(0))
        if match := re.fullmatch(f"/api/models/{MODEL}(?:/revision/(.+))?", path):
            return self.info(match[1] or "main")
        if match := re.fullmatch(f"/api/models/{MODEL}/tree/(.+)", path):
            return self.tree(match[1])
        if match := re.fullmatch(f"/{MODEL}/resolve/([0-9a-f]+)/(.+)", path):
            return self.file(match[1], match[2])
        return self.answer(404, {"X-Error-Code": "RepoNotFound"})

    def info(self, ref: str) -> None:
        sha = self.server.refs.get(ref, ref)
        if sha not in self.server.commits:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        return self.answer(200, {}, json.dumps({"id": MODEL, "sha": sha, "siblings": []}).encode())

    def tree(self, sha: str) -> None:
        if sha not in self.server.commits:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.server.commits[sha].items()
        ]
        return self.answer(200, {}, json.dumps(rows).encode())

    def file(self, sha: str, name: str) -> None:
        data = self.server.commits[sha][name]
        etag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.answer(206, headers, data[start:])
        return self.answer(200, headers, data)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """`{"drop": bytes}` sends the right head of a file, so many bytes of it, and hangs up."""
        if "drop" in headers:
            sha, name = self.path.split("?")[0].split("/")[-2:]
            body = self.server.commits[sha][name]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: int(headers.get("drop", len(body)))])
        self.close_connection = "drop" in headers


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def child(home: Path, endpoint: str | Hub, *words: str, **env: str) -> subprocess.CompletedProcess:
    """A child process with its own cache and a token, which nothing that it prints may hold."""
    if isinstance(endpoint, Hub):
        endpoint = f"http://127.0.0.1:{endpoint.server_address[1]}"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, *words],
        env=inherited | settings | switches | env,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


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

"""A stand-in for the Hugging Face hub: one model and any data sets behind a real HTTP server.

It speaks what reading and writing need: commits, trees, files with ranges, the LFS batch protocol.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

MODEL = "org/asr-he"
TOKEN = "hf_stand_in_token_never_shown"
SIGNATURE = "signature-of-an-address-never-shown"
FILES = {
    "config.json": b'{"model_type": "qwen3_asr"}',
    "merges.txt": "א ב\n".encode(),
    "model.safetensors": bytes(range(256)) * 400,
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"\x80\x04 a pickle",
    "notes.pt": b"\x80\x04 another",
}


def sha_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def oid_of(name: str, data: bytes) -> str:
    """What git calls the file: of a large file the sha256, else that of a blob."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_of(data: bytes) -> dict[str, object]:
    """What the hub tells of a large file."""
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}


class Hub(ThreadingHTTPServer):
    """`faults[regex]` is a list of answers given before the right one.

    Their headers may hold `drop` (so many bytes of the file, then no more), `hang_up` (so many
    bytes are read, and nothing is answered) or `stall` (nothing is answered until the client goes).
    """

    def __init__(self, files: dict[str, bytes] | None = FILES) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.datasets: dict[str, dict[str, str]] = {}  # refs of each
        self.gated: set[str] = set()  # data sets whose files need a token
        self.objects: dict[str, bytes] = {}  # of the large file storage
        self.faults: dict[str, list[tuple[int, dict[str, str]]]] = {}
        self.log: list[tuple[str, str, str]] = []  # method, path, Range or Authorization
        self.stalled = threading.Event()
        self.watch: Callable[[], object] = lambda: None  # called at each request
        if files is not None:
            self.push(files)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]

    def push(self, files: dict[str, bytes]) -> str:
        self.refs["main"] = sha_of(files)
        self.commits[self.refs["main"]] = files
        return self.refs["main"]

    def push_dataset(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        sha = sha_of(files)
        self.commits[sha] = files
        self.datasets.setdefault(repo, {})[ref] = sha
        return sha

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
        path = self.begin()
        if path is None:
            return None
        if match := re.fullmatch("/api/(?:models|datasets)/(.+?)/tree/(.+)", path):
            return self.tree(match[1], unquote(match[2]))
        if match := re.fullmatch("/api/(?:models|datasets)/(.+?/.+?)(?:/revision/(.+))?", path):
            return self.info(match[1], unquote(match[2] or "main"))
        if match := re.fullmatch("(?:/datasets)?/(.+)/resolve/([0-9a-f]+)/(.+)", path):
            if match[1] in self.server.gated and not self.headers.get("Authorization"):
                return self.answer(401, {"X-Error-Code": "GatedRepo"})
            return self.file(match[2], unquote(match[3]))
        return self.answer(404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        path = self.begin()
        if path is None:
            return None
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            return self.answer_json({"warnings": [{"message": str(self.headers)}], "errors": []})
        if "main" not in self.server.refs:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if path == f"/api/models/{MODEL}/preupload/main":
            return self.preupload()
        if path == f"/{MODEL}.git/info/lfs/objects/batch":
            return self.batch()
        if path == f"/api/models/{MODEL}/commit/main":
            return self.commit()
        return self.answer(404, {})

    def do_PUT(self) -> None:
        path = self.begin()
        if path is None:
            return None
        assert SIGNATURE in self.path
        assert path == f"/lfs/{hashlib.sha256(self.body).hexdigest()}"
        self.server.objects[path.removeprefix("/lfs/")] = self.body
        return self.answer(200, {})

    def begin(self) -> str | None:
        """Logs and reads the request; None when a fault has answered it."""
        path = self.path.split("?")[0]
        notes = f"{self.headers.get('Range', '')} {self.headers.get('Authorization', '')}"
        self.server.log.append((self.command, path, notes))
        self.server.watch()
        faults = self.server.faults.items()
        waiting = (a for p, a in faults if a and re.search(p, f"{self.command} {path}"))
        status, headers = next((answers.pop(0) for answers in waiting), (0, {}))
        length = int(headers.get("hang_up", self.headers.get("Content-Length", 0)))
        self.body = self.read_chunks() if self.headers.get("Transfer-Encoding") else b""
        self.body += self.rfile.read(length)
        if not status:
            return path
        if "stall" in headers:
            self.server.stalled.set()
            self.rfile.read(1)
        if "stall" in headers or "hang_up" in headers:
            self.close_connection = True
            return None
        told = f"{self.headers.get('Authorization')} in {self.path}"
        self.answer(
            status, {"X-Error-Message": told} | headers, json.dumps({"error": told}).encode()
        )
        return None

    def read_chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def commit_of(self, repo: str, ref: str) -> str | None:
        """The commit that a repository has under a ref or the like; else that has been answered."""
        refs = self.server.refs if repo == MODEL else self.server.datasets.get(repo)
        sha = (refs or {}).get(ref, ref)
        if refs is None or sha not in self.server.commits:
            kind = "RepoNotFound" if refs is None else "RevisionNotFound"
            return self.answer(404, {"X-Error-Code": kind})
        return sha

    def info(self, repo: str, ref: str) -> None:
        if sha := self.commit_of(repo, ref):
            self.answer_json({"id": repo, "sha": sha, "siblings": []})

    def tree(self, repo: str, ref: str) -> None:
        if sha := self.commit_of(repo, ref):
            files = self.server.commits[sha].items()
            self.answer_json(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": oid_of(n, d)}
                    | ({"lfs": lfs_of(d)} if n.endswith(".parquet") else {})
                    for n, d in files
                ]
            )

    def file(self, sha: str, name: str) -> None:
        data = self.server.commits[sha][name]
        etag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            return self.answer(206, headers, data[start:end])
        return self.answer(200, headers, data)

    def create(self) -> None:
        wanted = json.loads(self.body)
        assert f"{wanted['organization']}/{wanted['name']}" == MODEL
        exists = "main" in self.server.refs
        if not exists:
            self.server.private = wanted.get("visibility") == "private" or wanted.get("private")
            self.server.push({})
        self.answer_json({"url": f"{self.server.address}/{MODEL}"}, 409 if exists else 200)

    def preupload(self) -> None:
        present = {name: oid_of(name, data) for name, data in self.server.files.items()}
        names = [file["path"] for file in json.loads(self.body)["files"]]
        mode = {True: "lfs", False: "regular"}
        rows = [
            {"path": n, "uploadMode": mode[n.endswith(".safetensors")], "shouldIgnore": False}
            | ({"oid": present[n]} if n in present else {})
            for n in names
        ]
        self.answer_json({"files": rows})

    def batch(self) -> None:
        rows = json.loads(self.body)["objects"]
        for row in rows:
            if row["oid"] not in self.server.objects:
                href = f"{self.server.address}/lfs/{row['oid']}?X-Signature={SIGNATURE}"
                row["actions"] = {"upload": {"href": href}}
        self.answer_json({"transfer": "basic", "objects": rows})

    def commit(self) -> None:
        files = dict(self.server.files)
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.server.push(files)
        url = f"{self.server.address}/{MODEL}/commit/{oid}?told={self.headers['Authorization']}"
        self.answer_json({"commitOid": oid, "commitUrl": url})

    def answer_json(self, content: object, status: int = 200) -> None:
        self.answer(status, {}, json.dumps(content).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """`{"drop": bytes}` sends the right head of a file, so many bytes of it, and hangs up."""
        if "drop" in headers:
            sha, name = unquote(self.path.split("?")[0]).split("/resolve/")[1].split("/", 1)
            body = self.server.commits[sha][name]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: int(headers.get("drop", len(body)))])
        self.close_connection = "drop" in headers


@contextlib.contextmanager
def served(files: dict[str, bytes] | None = FILES) -> Iterator[Hub]:
    """A hub with one commit of these files; None: without the repository."""
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def start(home: Path, endpoint: str | Hub, *words: str, **env: str) -> subprocess.Popen:
    """Python in a child process, with its own cache and a token."""
    address = endpoint.address if isinstance(endpoint, Hub) else endpoint
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, *words],
        env=inherited | settings | switches | env,
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def child(home: Path, endpoint: str | Hub, *words: str, **env: str) -> subprocess.CompletedProcess:
    """The same to its end; nothing that it prints may hold the token or a signed address."""
    process = start(home, endpoint, *words, **env)
    try:
        out, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert TOKEN not in out + told
    assert SIGNATURE not in out + told
    return subprocess.CompletedProcess(words, process.returncode, out, told)

"""Sends an exported model folder to the Hugging Face hub: in one commit, or not at all."""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hebasr_jax.errors import UserError
from hebasr_jax.hub import causes_of, is_hub_id, status_of

SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".md", ".svg")
"""What is sent of a folder; names with a dot in front never are."""

_MODEL_SUFFIXES = SUFFIXES[:4]  # what a loader reads
_PASSING = (408, 409, 412, 429)  # time-out, another commit, too many requests
_LATER = "The folder is whole: upload it again later; what has arrived is not sent again."
_ACCESS = (
    "Log in with a token that may write (`hf auth login` or HF_TOKEN), and check that the "
    "namespace is yours."
)
Say = Callable[[str], None]


def check_repo_id(repo: str) -> None:
    """Refuses what is no hub id `org/name`. Asks no server, so call it before training."""
    if not is_hub_id(repo):
        why = "A repository on the hub has the form org/name."
        raise UserError(f"{repo}: is no repository id", why, "Correct HF_REPO_ID.")


def upload_model(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    waits_s: Sequence[float] = (5.0, 30.0),
    timeout_s: float = 60.0,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
) -> str:
    """Uploads a model folder in one commit to the main branch and returns the commit's URL.

    What the hub already has is not sent again, so a second call goes on where a broken one
    stopped; where nothing is new, the URL is that of the newest commit. Model files of the
    repository (weights, json, txt, jinja, not in folders) that this folder lacks are deleted in
    the same commit: a loader would mix them with the new ones. The token is that of HF_TOKEN or
    of the hub login.

    Args:
      private: of a repository that does not exist yet; one that does is left as it is.
      waits_s: seconds between attempts, so there is one attempt more. Within an attempt
        huggingface_hub repeats a request whose connection broke, five times in 23 s.
      timeout_s: seconds without a byte after which a request is given up.

    Raises:
      UserError: nothing else, whatever happens: no folder, id or token, no access, or attempts
        used up. The text holds nothing that the server said.
    """
    check_repo_id(repo)
    try:
        files = model_files(folder)
        size = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read", error.strerror or "", _LATER) from None
    if not has_token():
        raise UserError(f"{repo}: cannot be uploaded to", "There is no token.", _ACCESS)
    say(f"uploading {len(files)} files, {size / 2**20:,.1f} MiB, to {repo}")
    with _own_client(timeout_s):
        for wait_s in (*waits_s, None):
            try:
                return _send(files, repo, private)
            except Exception as error:  # of hub, HTTP or Xet code: a run must survive them all
                fault = _final_fault(repo, error)
                if fault or wait_s is None:
                    # Not chained: a trace may show a header, and with it the token.
                    raise fault or _given_up(repo, error, 1 + len(waits_s)) from None
                say(f"upload to {repo}: {_reason(error)}; once more in {wait_s:g} s")
                time.sleep(wait_s)
    raise AssertionError("unreachable")


def model_files(folder: Path) -> list[Path]:
    """The files of an exported folder that are uploaded, by name.

    Raises `UserError` where there is no config.json or no weights.
    """
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [
        path
        for path in found
        if path.suffix in SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]
    if not {"config.json", ".safetensors"} <= {name for p in files for name in (p.name, p.suffix)}:
        why = "It needs config.json and weights (.safetensors)."
        raise UserError(f"{folder}: is no model folder", why, "Give an exported model.")
    return files


def _send(files: Sequence[Path], repo: str, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    names = {path.name for path in files}
    stale = [
        name
        for name in api.list_repo_files(repo)
        if name.endswith(_MODEL_SUFFIXES) and "/" not in name and name not in names
    ]
    commit = api.create_commit(
        repo,
        [
            *(CommitOperationAdd(path.name, path) for path in files),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message="Upload model",
    )
    return f"{api.endpoint}/{repo}/commit/{commit.oid}"


def has_token() -> bool:
    """Whether there is a token that a header can hold."""
    from huggingface_hub import get_token

    try:
        token = get_token() or ""
    except Exception:  # one that cannot be read or refreshed
        return False
    return bool(token) and token.isascii() and token.isprintable()


@contextlib.contextmanager
def _own_client(timeout_s: float) -> Iterator[None]:
    """huggingface_hub with time limits, and without lines of its own.

    As it comes, a request has no limit, a busy server's Retry-After is slept through however long
    it is, and warnings hold signed addresses and what the server says.
    """
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils import logging

    usual = get_session()  # of httpx or httpx2
    hooks, usual_timeout = usual.event_hooks, usual.timeout

    def use(hooks: Mapping[str, Any], timeout: Any) -> None:
        client = type(usual)
        set_client_factory(
            lambda: client(event_hooks=hooks, timeout=timeout, follow_redirects=True)
        )

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    use({**hooks, "response": [*hooks["response"], _refuse_busy]}, timeout_s)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        use(hooks, usual_timeout)
        logging.set_verbosity(verbosity)


def _refuse_busy(response: Any) -> None:
    """Ends an attempt: huggingface_hub would repeat the request by its own clock."""
    if response.status_code == 429 or response.status_code >= 500:
        response.raise_for_status()


def _final_fault(repo: str, error: BaseException) -> UserError | None:
    """What another attempt cannot mend, or None."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    if status in (401, 403, 404):
        why = "The token may not write there, or there is no such namespace."
        return UserError(f"{repo}: the hub gives no access (HTTP {status})", why, _ACCESS)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes_of(error)):
        return UserError(f"{repo}: cannot be uploaded to", "HF_HUB_OFFLINE is set.", _LATER)
    if status is not None and 400 <= status < 500 and status not in _PASSING:
        do = "Check the head of README.md and the storage that the account has left."
        return UserError(f"{repo}: the hub refuses the files (HTTP {status})", "", do)
    return None


def _given_up(repo: str, error: BaseException, attempts: int) -> UserError:
    why = f"Attempts: {attempts}, the last: {_reason(error)}."
    return UserError(f"{repo}: the upload failed", why, _LATER)


def _reason(error: BaseException) -> str:
    """Its status or its kind: the text may hold what the server said."""
    status = status_of(error)
    return f"HTTP {status}" if status else type(causes_of(error)[-1]).__name__

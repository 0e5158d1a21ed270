"""The Hugging Face hub: find a model or a data set on disk, or fetch it pinned to one commit."""

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from hebasr_jax.errors import UserError

Answer = TypeVar("Answer")

_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]  # a pickle is never asked for
_WAITS_S = (0.5, 1.0)  # between attempts; huggingface_hub resumes and retries each file itself
_TIMEOUT_S = 10.0
_CONVERTED = "refs/convert/parquet"  # where the hub keeps parquet files that it made itself
_ACCESS = "If it is gated accept the terms on its hub page; then `hf auth login`, or set HF_TOKEN."
_NETWORK = "Check the network; or give a commit that was fetched before, or a local folder."


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, what the user called it, and its hub commit (None: a local folder)."""

    path: Path
    source: str
    revision: str | None


@dataclass(frozen=True)
class DatasetFiles:
    """Parquet files of one split of a data set, and their hub commit (None: local files)."""

    paths: tuple[Path, ...]
    revision: str | None


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub: its path there, bytes, and sha256 (None: not told)."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class HubSplit:
    """The parquet files of one split of a data set, at a commit of the hub."""

    hub: str
    revision: str
    files: tuple[HubFile, ...]


class NoAccess(UserError):
    """The hub refuses: a gated data set can be left out, with the remedy told."""


class _NoRevision(UserError):
    pass


class _Damaged(RuntimeError):
    """What came is not what the hub says it has; a second attempt may mend it."""


def find_model(
    source: str, *, revision: str | None = None, files: Sequence[str] = _FILES
) -> ModelFolder:
    """Take an existing folder as it is; fetch a hub id `org/name` at a branch, tag or commit.

    The revision (default: the main branch) is resolved to a commit first and that commit is
    fetched, so all files are of one version. The token comes from HF_TOKEN or the hub login.
    Raises UserError for what is not there, not allowed, or not reached after a few attempts.

    Args:
      files: patterns of the names to fetch.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            do = "Leave the revision out, or give a hub id."
            raise UserError(f"{source}: a folder has no revision {revision}", "", do)
        return ModelFolder(path, source, None)
    if path.exists():
        raise UserError(f"{source}: is a file, not a model folder", "", "Give the folder it is in.")
    if not is_hub_id(source):
        why = "There is no such folder, and a hub id has the form org/name."
        raise UserError(f"{source}: no such model", why, "Check the path.")
    folder, commit = _fetch(source, revision, files, "model")
    if not folder.is_dir():
        raise UserError(f"{source}: has no file of a model", f"Looked for {[*files]}.")
    return ModelFolder(folder, source, commit)


def find_dataset(
    source: str, config: str | None, split: str, *, revision: str | None = None
) -> DatasetFiles:
    """The parquet files of a split: those of a local folder (or file), or of a hub data set.

    Where the data set's main branch has none, the hub's own conversion is taken. Files of other
    configs and splits are not asked for. Commits, token and errors as in `find_model`; a set
    that the hub refuses to give is a `NoAccess`. A split of which a part is absent is an error.
    """
    path = Path(source).expanduser()
    if path.exists() or not is_hub_id(source):
        if not path.exists():
            raise UserError(f"{source}: no such file or folder", "", "Check the path.")
        files = [path] if path.is_file() else _in_folder(path, source, config, split)
        files = files or _in_folder(path, source, None, split)  # the folder of the config alone
        if not files:
            raise _no_split(source, config, split)
        return DatasetFiles(tuple(files), None)
    wanted = f"{config}/{split}*.parquet" if config else f"{split}*.parquet"
    for branch in [revision] if revision else [None, _CONVERTED]:
        try:
            folder, commit = _fetch(source, branch, [wanted, f"*/{wanted}"], "dataset")
        except _NoRevision:
            if branch == _CONVERTED:
                break
            raise
        if files := _in_folder(folder, source, config, split):
            return DatasetFiles(tuple(files), commit)
    raise _no_split(source, config, split)


def list_dataset(
    source: str, config: str | None, split: str, *, revision: str | None = None
) -> HubSplit:
    """What `find_dataset` would fetch from the hub; nothing is fetched. Errors as there."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    if not is_hub_id(source):
        raise UserError(f"{source!r} is no data set of the hub", "An id has the form org/name.")
    for branch in [revision] if revision else [None, _CONVERTED]:
        try:
            commit = _commit(source, branch, "dataset")
        except _NoRevision:
            if branch == _CONVERTED:
                break
            raise

        def tree(commit: str = commit) -> list[RepoFile]:
            found = HfApi().list_repo_tree(
                source, recursive=True, revision=commit, repo_type="dataset"
            )
            return [file for file in found if isinstance(file, RepoFile)]

        files = {PurePosixPath(file.path): file for file in _asked(source, commit, tree)}
        if paths := _of_split(files, source, config, split):
            rows = [files[path] for path in paths]
            told = [
                HubFile(row.path, row.size, row.lfs.sha256 if row.lfs else None) for row in rows
            ]
            return HubSplit(source, commit, tuple(told))
    raise _no_split(source, config, split)


def read_range(split: HubSplit, file: HubFile, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file on the hub. Errors as in `find_model`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = hf_hub_url(split.hub, file.path, repo_type="dataset", revision=split.revision)
    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}

    def read() -> bytes:
        answer = http_backoff("GET", url, headers=headers, timeout=_TIMEOUT_S)
        hf_raise_for_status(answer)
        if answer.status_code != 206 or len(answer.content) != end - start:
            raise _Damaged(f"{file.path}: {len(answer.content)} of {end - start} bytes came")
        return answer.content

    return _asked(split.hub, split.revision, read)


def fetch_file(split: HubSplit, file: HubFile, folder: Path) -> Path:
    """The whole file, at its path below `folder`, its sha256 checked. Errors as in `find_model`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    def fetch() -> Path:
        disable_progress_bars()  # several files at a time; the shards tell the progress
        path = Path(
            hf_hub_download(
                split.hub,
                file.path,
                repo_type="dataset",
                revision=split.revision,
                local_dir=folder,
            )
        )
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if path.stat().st_size != file.size or file.sha256 not in (None, digest):
            path.unlink()
            raise _Damaged(f"{file.path}: its sha256 is not the one that the hub tells")
        return path

    return _asked(split.hub, split.revision, fetch)


def _in_folder(folder: Path, source: str, config: str | None, split: str) -> list[Path]:
    names = [PurePosixPath(file.relative_to(folder)) for file in folder.rglob("*.parquet")]
    return [folder / name for name in _of_split(names, source, config, split)]


def _of_split(
    names: Iterable[PurePosixPath], source: str, config: str | None, split: str
) -> list[PurePosixPath]:
    """`data/SPLIT-00000-of-00002-HASH.parquet`, `CONFIG/SPLIT/0000.parquet` and the like."""
    named = re.compile(rf"{re.escape(split)}(?:-\d+-of-(\d+)(?:-[0-9a-f]+)?)?\.parquet")
    files, totals = [], set()
    for file in sorted(names):
        *above, name = file.parts
        match = named.fullmatch(name)
        of_config = config in above if config else not {*above} - {"data", "default", split}
        if of_config and (match or above[-1:] == [split]):
            files.append(file)
            totals |= {int(match[1])} if match and match[1] else set()
    if totals and totals != {len(files)}:
        why = f"{len(files)} files are there, and by their names {max(totals)} belong together."
        raise UserError(f"{source}: its split {split} is not whole", why, "Fetch it anew.")
    return files


def _no_split(source: str, config: str | None, split: str) -> UserError:
    what = f"{source}: has no parquet file of the split {split}"
    why = "Looked for SPLIT-00000-of-00001.parquet, SPLIT.parquet and SPLIT/0000.parquet"
    return UserError(what, f"{why}, in a folder {config}." if config else f"{why}.")


def is_hub_id(source: str) -> bool:
    """Whether it has the form `org/name`, with letters that the hub allows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return source.count("/") == 1


def _fetch(
    source: str, revision: str | None, files: Sequence[str], kind: Literal["model", "dataset"]
) -> tuple[Path, str]:
    """The folder with the files of these patterns (which may not exist), and its commit."""
    from huggingface_hub import snapshot_download

    commit = _commit(source, revision, kind)
    folder = _asked(
        source,
        revision,
        lambda: snapshot_download(source, revision=commit, repo_type=kind, allow_patterns=[*files]),
    )
    return Path(folder), commit


def _commit(source: str, revision: str | None, kind: Literal["model", "dataset"]) -> str:
    """The commit that a branch or tag (None: the main branch) stands for."""
    from huggingface_hub import HfApi

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    info = _asked(
        source,
        revision,
        lambda: HfApi().repo_info(source, revision=revision, repo_type=kind, timeout=_TIMEOUT_S),
    )
    assert info.sha is not None  # a branch of the hub has one
    return info.sha


def _asked(source: str, revision: str | None, ask: Callable[[], Answer]) -> Answer:
    """What the hub answers, after a few attempts; its refusals as a UserError."""
    from huggingface_hub.errors import HTTPError  # of httpx or httpx2, whichever is in use

    for wait_s in (*_WAITS_S, None):
        try:
            return ask()
        except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet's downloads
            fault = _final_fault(source, revision, error)
            if fault or wait_s is None:
                raise fault or _unreachable(source, error) from error
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _final_fault(source: str, revision: str | None, error: BaseException) -> UserError | None:
    """What a second attempt cannot mend, or None. No text of the server or of requests is told."""
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    status = status_of(error)
    if isinstance(error, RevisionNotFoundError):
        do = "Check the branch, tag or commit on its hub page."
        return _NoRevision(f"{source}: has no revision {revision}", "", do)
    if status in (401, 403):
        why = "It is gated or private, or it does not exist: the hub does not tell which."
        return NoAccess(f"{source}: the hub gives no access (HTTP {status})", why, _ACCESS)
    if status == 404:
        why = "There is no such folder here, and nothing of the name on the hub."
        return UserError(f"{source}: not found", why, "Check the name.")
    if status == 429:
        why = "The hub limits requests (HTTP 429)."
        return UserError(f"{source}: cannot be fetched now", why, "Wait some minutes, or log in.")
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes_of(error)):
        return UserError(f"{source}: cannot be fetched", "HF_HUB_OFFLINE is set.", _NETWORK)
    if isinstance(error, OSError) and error.errno:
        do = "Free some space, or set HF_HOME to another disk."
        return UserError(f"{source}: cannot be stored", error.strerror or "", do)
    return None


def _unreachable(source: str, error: BaseException) -> UserError:
    status = status_of(error)
    if isinstance(error, _Damaged):
        return UserError(f"{source}: came damaged 3 times", str(error), _NETWORK)
    why = f"HTTP {status}" if status else type(causes_of(error)[-1]).__name__
    return UserError(f"{source}: the hub cannot be reached", f"After 3 attempts: {why}.", _NETWORK)


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, which huggingface_hub may wrap in another one."""
    responses = (getattr(cause, "response", None) for cause in causes_of(error))
    return next((response.status_code for response in responses if response is not None), None)


def causes_of(error: BaseException | None) -> list[BaseException]:
    """The error and those that it was raised from, the outermost first."""
    return [error, *causes_of(error.__cause__)] if error is not None else []

"""hub.find_dataset against the stand-in hub: the files of one split at one commit, or why not."""

import json
from pathlib import Path

import pytest
from stand_in_hub import TOKEN, Hub, child, served

from hebasr_jax.errors import UserError
from hebasr_jax.hub import find_dataset

REPO = "org/clips-he"
CONVERTED = "refs/convert/parquet"
PLAIN = {
    "data/test-00000-of-00002-00ff.parquet": b"one",
    "data/test-00001-of-00002-00ff.parquet": b"two",
    "data/train-00000-of-00001.parquet": b"another split",
    "data/test_clean-00000-of-00001.parquet": b"another split",
    "other/test-00000-of-00001.parquet": b"another config",
    "test.py": b"code",
}
CHILD = """
import json, sys
from hebasr_jax.errors import UserError
from hebasr_jax.hub import find_dataset
source, config, split, revision = sys.argv[1:]
try:
    found = find_dataset(source, config or None, split, revision=revision or None)
    content = [path.read_bytes().decode() for path in found.paths]
    print(json.dumps({"files": content, "sha": found.revision}))
except UserError as error:
    print(json.dumps({"error": str(error), "kind": type(error).__name__}))
"""


@pytest.fixture
def hub():
    with served(None) as server:
        yield server


def fetch(home: Path, hub: Hub | str, config="", split="test", revision="", repo=REPO, **env: str):
    done = child(home, hub, "-c", CHILD, repo, config, split, revision, **env)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer.get("error", "").splitlines()) <= 3
    return answer


def test_the_files_of_the_split_and_no_others_at_one_commit(hub, tmp_path) -> None:
    sha = hub.push_dataset(REPO, PLAIN)
    assert fetch(tmp_path, hub) == {"files": ["one", "two"], "sha": sha}
    fetched = hub.asked("GET .*/resolve/")
    assert len(fetched) == len(hub.asked(f"GET .*/resolve/{sha}/.*/?test.*parquet"))
    assert not hub.asked("resolve.*(train|test.py)")
    assert all(f"Bearer {TOKEN}" in notes for _, _, notes in hub.log)
    hub.log.clear()
    assert fetch(tmp_path, hub, revision=sha)["files"] == ["one", "two"]
    assert not hub.asked("GET .*/resolve/")
    assert fetch(tmp_path, hub, revision=sha, HF_HUB_OFFLINE="1")["files"] == ["one", "two"]
    assert "HF_HUB_OFFLINE" in fetch(tmp_path, hub, HF_HUB_OFFLINE="1")["error"]
    moved = hub.push_dataset(REPO, {"data/test-00000-of-00001.parquet": b"new"})
    assert fetch(tmp_path, hub) == {"files": ["new"], "sha": moved}


def test_the_hubs_conversion_where_the_main_branch_has_no_parquet(hub, tmp_path) -> None:
    hub.push_dataset(REPO, {"clips.py": b"", "data/he/test.tar": b""})
    assert "has no parquet file of the split test" in fetch(tmp_path, hub, "he")["error"]
    converted = {
        "he/test/0000.parquet": b"one",
        "he/test/0001.parquet": b"two",
        "he/partial-train/0000.parquet": b"the first gigabytes",
        "ar/test/0000.parquet": b"another config",
    }
    sha = hub.push_dataset(REPO, converted, CONVERTED)
    assert fetch(tmp_path, hub, "he") == {"files": ["one", "two"], "sha": sha}
    assert not hub.asked("resolve.*/ar/")
    # What is recorded leads back to the same files.
    assert fetch(tmp_path, hub, "he", revision=sha)["files"] == ["one", "two"]
    assert "split train" in fetch(tmp_path, hub, "he", "train")["error"]


def test_what_cannot_be_had(hub, tmp_path) -> None:
    hub.push_dataset(REPO, PLAIN)
    hub.gated.add(REPO)
    told = fetch(tmp_path, hub, HF_TOKEN="")
    assert told["kind"] == "NoAccess"
    assert [w for w in ("401", "gated", "terms", "hf auth login") if w not in told["error"]] == []
    hub.faults["/resolve/"] = [(403, {"X-Error-Code": "GatedRepo"})] * 9
    assert fetch(tmp_path, hub)["kind"] == "NoAccess"
    hub.faults.clear()
    told = fetch(tmp_path, hub, repo="org/none")
    assert (told["kind"], "not found" in told["error"]) == ("UserError", True)
    assert "no revision v9" in fetch(tmp_path, hub, revision="v9")["error"]
    hub.faults["/api/datasets"] = [(503, {})] * 99
    assert "cannot be reached" in fetch(tmp_path, hub)["error"]


def test_local_copies(tmp_path) -> None:
    for name in PLAIN:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(path: Path, config: str | None = None) -> list[str]:
        return [
            f.relative_to(tmp_path).as_posix()
            for f in find_dataset(str(path), config, "test").paths
        ]

    assert names(tmp_path) == list(PLAIN)[:2]
    assert names(tmp_path, "other") == ["other/test-00000-of-00001.parquet"]
    assert names(tmp_path / "other", "other") == ["other/test-00000-of-00001.parquet"]
    assert names(tmp_path / next(iter(PLAIN))) == list(PLAIN)[:1]
    (tmp_path / list(PLAIN)[1]).unlink()
    with pytest.raises(UserError, match="1 files are there, and by their names 2"):
        names(tmp_path)
    with pytest.raises(UserError, match="no parquet file of the split dev"):
        find_dataset(str(tmp_path), None, "dev")
    with pytest.raises(UserError, match="no such file or folder"):
        find_dataset(str(tmp_path / "none"), None, "test")

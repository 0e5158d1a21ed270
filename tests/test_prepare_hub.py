"""`prepare --config`: training sets that are not there come from the hub, at one commit."""

import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import stand_in_hub
from hub_rows import FIRST, RATE, a_slice, crowd, sound, write
from stand_in_hub import child, served, start

from hebasr_jax.config_file import load_config
from hebasr_jax.data.hub_files import HUB_FOLDER
from hebasr_jax.data.hub_sets import is_finished
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.shards import ORIGIN_FILE
from hebasr_jax.data.sources import open_source
from hebasr_jax.errors import UserError

KNESSET = "ivrit-ai/knesset-plenums-whisper-training"
CONFIG = """
from hebasr_jax.run_config import Config, Data, Source

def get_config():
    at, hub = "{at}/shards", "ivrit-ai/knesset-plenums-whisper-training"
    return Config(data=Data(train=(
        Source("knesset", at, hub=hub, schema="knesset-plenums"),
        Source("best", at, hub=hub, schema="knesset-plenums", min_quality=0.9),
        Source("crowd", "{at}/crowd", schema="crowd-transcribe-v5"),
    )))
"""


def a_hub_set(folder: Path, schema: str, rows: list[dict], **sound) -> dict[str, bytes]:
    write(folder, schema, rows, **sound)
    return {f"data/{file.name}": file.read_bytes() for file in folder.iterdir()}


def test_sets_are_fetched_once_and_two_of_a_config_share_shards(tmp_path) -> None:
    slices = [a_slice(6.0 * n, FIRST, quality_score=0.5 + 0.1 * n) for n in range(5)]
    knesset = a_hub_set(tmp_path / "k", "knesset-plenums", slices, seconds=6.0, kind="MP3")
    crowd_set = a_hub_set(tmp_path / "c", "crowd-transcribe-v5", [crowd(n) for n in range(3)])
    config = tmp_path / "mine.py"
    config.write_text(CONFIG.format(at=tmp_path / "data"))
    command = ("-m", "hebasr_jax", "prepare", "--config", str(config))
    with served(None) as hub:
        sha = hub.push_dataset(KNESSET, knesset)
        hub.push_dataset("ivrit-ai/crowd-transcribe-v5", crowd_set)
        done = child(tmp_path / "home", hub, *command)
        assert done.returncode == 0, done.stderr
        shards = tmp_path / "data" / "shards"
        origin = json.loads((shards / ORIGIN_FILE).read_bytes())
        assert origin["hub"] == KNESSET
        assert origin["revision"] == sha
        assert origin["clips"] == 5
        assert "ivrit" in origin["licence"]
        train = load_config(config).config.data.train
        assert [len(open_source(source).clips) for source in train] == [5, 1, 3]
        # The hub's set has grown since: what was begun at one commit is finished at it.
        hub.push_dataset(KNESSET, knesset | {"data/train-x.parquet": b"new"})
        before = {file.name: file.read_bytes() for file in shards.iterdir()}
        for file in shards.glob("*.arrayrecord"):
            file.unlink()
        done = child(tmp_path / "home", hub, *command)
        assert done.returncode == 0, done.stderr
        assert {file.name: file.read_bytes() for file in shards.iterdir()} == before
        # What is all there is left, and the hub not asked; other settings are no such request.
        hub.log.clear()
        (shards / HUB_FOLDER).mkdir()
        done = child(tmp_path / "home", hub, *command)
        assert done.returncode == 0, done.stderr
        assert not hub.log
        assert {file.name: file.read_bytes() for file in shards.iterdir()} == before
        done = child(tmp_path / "home", hub, *command, "--format", "pcm")
        assert "other settings" in done.stderr
        assert {
            file.name: file.read_bytes() for file in shards.iterdir() if file.is_file()
        } == before


def test_what_lies_there_is_left_and_what_cannot_be_fetched_is_told(tmp_path) -> None:
    config = tmp_path / "mine.py"
    config.write_text(CONFIG.format(at=tmp_path).replace(', schema="crowd-transcribe-v5"', ""))
    (tmp_path / "shards").mkdir()
    with served(None) as hub:
        done = child(tmp_path / "home", hub, "-m", "hebasr_jax", "prepare", "--config", str(config))
    assert done.returncode == 1
    assert "knesset" in done.stderr
    assert "is there, and is left as it is" in done.stderr
    assert "crowd: " in done.stderr
    assert "no schema" in done.stderr
    assert not hub.asked("GET")


FILES, CLIPS = 9, 5  # files, and clips of 6 s in each


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A local copy of a set of nine files, each about as long as a shard is to be."""
    folder = tmp_path_factory.mktemp("many") / "data"
    for number in range(FILES):
        at = range(CLIPS * number, CLIPS * (number + 1))
        rows = [{"audio": noise(n, 6.0)} | a_slice(6.0 * n, FIRST, n=n) for n in at]
        write(folder, "knesset-plenums", rows)
        name = f"train-{number:05d}-of-{FILES:05d}.parquet"
        (folder / "train-00000-of-00001.parquet").rename(folder / name)
    return folder


def noise(number: int, seconds: float) -> dict:
    """Sound that does not compress, so that it is most of a file."""
    file = io.BytesIO()
    wave = np.random.default_rng(number).uniform(-0.3, 0.3, round(seconds * RATE))
    soundfile.write(file, wave, RATE, format="WAV")
    return {"bytes": file.getvalue(), "path": f"{number}.wav"}


@pytest.fixture
def hub(many):
    with served(None) as server:
        files = {f"data/{file.name}": file.read_bytes() for file in many.iterdir()}
        server.push_dataset(KNESSET, files)
        yield server


def from_hub(folder: Path, *flags: str, schema: str = "knesset-plenums", mb: float = 0.9) -> tuple:
    """The words of a child that prepares one set, and the folder of the shards."""
    config = folder / "mine.py"
    config.write_text(
        "from hebasr_jax.run_config import Config, Data, Source\n"
        f"set = Source('knesset', {str(folder / 'shards')!r}, schema={schema!r})\n"
        "def get_config(): return Config(data=Data(train=(set,)))\n"
    )
    words = ("-m", "hebasr_jax", "prepare", "--config", str(config), "--shard-mb", str(mb))
    return (*words, *flags), folder / "shards"


def by_copy(copy: Path, out: Path) -> dict[str, bytes]:
    given = {"source": str(copy), "name": "knesset", "schema": "knesset-plenums", "shard_mb": 0.9}
    assert Prepare(out, processes=1, **given).run() == 0
    return content(out / "knesset")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ORIGIN_FILE}


def on_disk(shards: Path) -> int:
    """Files with their sound that lie there now."""
    whole = [*(shards / HUB_FOLDER).glob("*-of-*/**/*.parquet")]
    return len(whole) + len([*(shards / HUB_FOLDER).glob("*-of-*/**/*.incomplete")])


@pytest.mark.parametrize("processes", [1, 2])
def test_files_lie_here_only_while_shards_are_made_of_them(many, hub, tmp_path, processes) -> None:
    words, shards = from_hub(tmp_path, "--processes", str(processes))
    seen: list[int] = []
    hub.watch = lambda: seen.append(on_disk(shards))
    done = child(tmp_path / "home", hub, *words)
    assert done.returncode == 0, done.stderr
    assert content(shards) == by_copy(many, tmp_path / "copy")
    assert len([*shards.glob("*.arrayrecord")]) == FILES + 1  # most are of two files
    # A shard of two files for each process, and one whose files are fetched meanwhile.
    assert 1 <= max(seen) <= 2 * (processes + 1) < FILES
    told = re.search(r"at most (\S+) MB of the hub's files", done.stderr)
    sizes = sorted(file.stat().st_size for file in many.iterdir())
    assert float(told[1]) * 1e6 <= sum(sizes[-2 * (processes + 1) :]) + 5e4  # rounding
    whole = [path for _, path, notes in hub.asked("^GET .*resolve") if "bytes" not in notes]
    assert len(whole) == len(set(whole)) == FILES  # each is fetched once
    read = [re.search(r"bytes=(\d+)-(\d+)", notes) for _, _, notes in hub.asked("bytes=")]
    assert sum(int(m[2]) - int(m[1]) for m in read) < 0.2 * sum(sizes)
    assert not [*(tmp_path / "home").rglob("*.parquet")]  # nothing in the hub's cache


def test_a_kill_and_faults_of_the_hub_leave_nothing_false(many, hub, tmp_path) -> None:
    words, shards = from_hub(tmp_path, "--processes", "1")
    hub.faults["GET .*resolve.*00003-of"] = [(503, {}), (200, {"drop": "999"})]
    process = start(tmp_path / "home", hub, *words)
    while len([*shards.glob("*.json")]) < 4 and process.poll() is None:  # set, origin, two seals
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert on_disk(shards)
    done = child(tmp_path / "home", hub, *words)
    assert done.returncode == 0, done.stderr
    assert content(shards) == by_copy(many, tmp_path / "copy")


def test_a_file_that_is_not_what_the_hub_says_is_refused(hub, tmp_path, monkeypatch) -> None:
    lfs = stand_in_hub.lfs_of
    monkeypatch.setattr(stand_in_hub, "lfs_of", lambda data: lfs(data) | {"oid": "0" * 64})
    words, shards = from_hub(tmp_path, "--processes", "1")
    done = child(tmp_path / "home", hub, *words)
    assert done.returncode == 1
    assert "its sha256 is not the one that the hub tells" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*shards.glob("*.arrayrecord")]
    assert not on_disk(shards)


def test_lengths_that_no_column_tells_are_measured_file_by_file(tmp_path) -> None:
    copy, kan = tmp_path / "kan" / "data", "imvladikon/hebrew_speech_kan"
    for number in range(8):
        rows = [{"sentence": f"משפט {n}", "audio": sound(n, 1.0 + n, "MP3")} for n in range(3)]
        write(copy, "kan", rows, split=f"train-{number}")
        (copy / f"train-{number}-00000-of-00001.parquet").rename(
            copy / f"train-{number:05d}-of-00008.parquet"
        )
    with served(None) as hub:
        files = {f"data/{file.name}": file.read_bytes() for file in copy.iterdir()}
        hub.push_dataset(kan, files)
        words, shards = from_hub(tmp_path, "--processes", "1", schema="kan", mb=0.19)
        config = tmp_path / "mine.py"
        config.write_text(config.read_text().replace("'kan'", "'kan', accept_licence=True"))
        seen: list[int] = []
        hub.watch = lambda: seen.append(on_disk(shards))
        done = child(tmp_path / "home", hub, *words)
    assert done.returncode == 0, done.stderr
    assert 1 <= max(seen) <= 4  # two shards of up to two files
    assert len([*shards.glob("*.arrayrecord")]) == 8
    given = {"source": str(copy), "name": "knesset", "schema": "kan", "accept_licence": True}
    assert Prepare(tmp_path / "copy", processes=1, shard_mb=0.19, **given).run() == 0
    assert content(shards) == content(tmp_path / "copy" / "knesset")


@pytest.mark.parametrize("other", ["split='validation'", "schema='fleurs'", "hub='mine/copy'"])
def test_two_sets_of_one_path_must_be_of_one_request(tmp_path, other) -> None:
    config = tmp_path / "mine.py"
    config.write_text(
        "from hebasr_jax.run_config import Config, Data, Source\n"
        "from dataclasses import replace\n"
        f"a = Source('a', {str(tmp_path / 'x')!r}, schema='common-voice')\n"
        f"b = replace(a, name='b', {other})\n"
        "def get_config(): return Config(data=Data(train=(a,), dev=(b,)))\n"
    )
    told = rf"b: .*x is the path of a as well\n.*{other.split('=')[0].replace('schema', 'hub')} "
    with pytest.raises(UserError, match=told):
        Prepare(config=config).run()


def test_a_stale_origin_of_another_set_does_not_choose_the_commit(tmp_path) -> None:
    crowd_set = a_hub_set(tmp_path / "c", "crowd-transcribe-v5", [crowd(n) for n in range(3)])
    words, shards = from_hub(tmp_path, schema="crowd-transcribe-v5")
    shards.mkdir()
    (shards / "set.json").write_text("{}")
    (shards / ORIGIN_FILE).write_text('{"hub": "other/set", "revision": "gone", "split": "train"}')
    with served(None) as hub:
        sha = hub.push_dataset("ivrit-ai/crowd-transcribe-v5", crowd_set)
        done = child(tmp_path / "home", hub, *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((shards / ORIGIN_FILE).read_bytes())["revision"] == sha


def test_a_set_with_too_many_bad_clips_is_not_finished(tmp_path) -> None:
    rows = [a_slice(6.0 * n, FIRST) for n in range(3)]
    rows[1]["audio"] = {"bytes": b"this is no sound", "path": "x"}
    source = write(tmp_path / "copy", "knesset-plenums", rows, seconds=6.0)
    flags = {"source": source.path, "name": "k", "schema": source.schema, "processes": 1}
    assert Prepare(tmp_path, **flags, max_bad_share=0.5).run() == 0
    asked = {"schema": source.schema}
    assert is_finished(tmp_path / "k", asked, 0.5)
    assert not is_finished(tmp_path / "k", asked, 0.01)
    assert not is_finished(tmp_path / "k", {"hub": "another"}, 0.5)

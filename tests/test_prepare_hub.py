"""`prepare --config`: training sets that are not there come from the hub, at one commit."""

import json
from pathlib import Path

from hub_rows import FIRST, a_slice, crowd, write
from stand_in_hub import child, served

from hebasr_jax.config_file import load_config
from hebasr_jax.data.shards import ORIGIN_FILE
from hebasr_jax.data.sources import open_source

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

"""The dev panel: nothing held out is trained on, the same bytes each time, partial and told."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hub_rows import FIRST, a_slice, crowd, write

from hebasr_jax.cli import main
from hebasr_jax.data import panel as panel_module
from hebasr_jax.data.panel import voice_note
from hebasr_jax.data.sources import open_source
from hebasr_jax.run_config import Source

CROWD, KNESSET = "crowd-transcribe-v5", "knesset-plenums"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def words(tmp_path):
    """The command over a crowd set of twelve podcasts and a Knesset set of twelve sessions."""
    rows = [crowd(n, source=f"podcast {n // 4}") for n in range(48)]
    write(tmp_path / "crowd", CROWD, rows)
    slices = [a_slice(6.0 * (n % 2), FIRST, entry_id=f"s{n // 2}") for n in range(24)]
    write(tmp_path / "knesset", KNESSET, slices, seconds=6.0)
    sets = [f"{CROWD}={tmp_path}/crowd", f"{KNESSET}={tmp_path}/knesset"]
    return ["panel", "--sets", *sets, "--out", f"{tmp_path}/panel"]


def test_what_is_held_out_is_not_trained_on_and_the_bytes_are_the_same(
    words, tmp_path, capsys
) -> None:
    out = tmp_path / "panel"
    assert main(words) == 0
    told = capsys.readouterr()
    assert "the panel is partial: it has no recital (saspeech), fleurs (fleurs)" in told.err
    assert "eval-d1" in told.out
    before = tree(out)
    for name, schema, field in (("crowd", CROWD, "source"), ("knesset", KNESSET, "recording")):
        lists = out / schema
        path = str(tmp_path / name)
        dev = open_source(Source("d", path, schema=schema, only=str(lists / "dev.jsonl")))
        without = (str(lists / "not_for_training.jsonl"),)
        train = open_source(Source("t", path, schema=schema, without=without))
        sides = [{getattr(clip, field) for clip in s.clips} for s in (dev, train)]
        assert all(sides)
        assert not sides[0] & sides[1]
    long, notes = (
        open_source(Source(name, f"{out}/{name}/dev_long.jsonl"))
        for name in ("podcasts", "voice-notes")
    )
    assert not {c.source for c in long.clips} & {c.source for c in notes.clips}
    assert main(words) == 0
    assert "is left as it is" in capsys.readouterr().err
    (out / "podcasts" / "dev_long.jsonl").unlink()
    assert main(words) == 0
    assert tree(out) == before


def test_a_stop_midway_leaves_the_panel_as_it_was(words, tmp_path, monkeypatch) -> None:
    def stop(*given, **named):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(panel_module, "write_long", stop)
        assert main(words) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["crowd", "knesset"]
    assert main(words) == 0
    before = tree(tmp_path / "panel")
    with monkeypatch.context() as patch:
        patch.setattr(panel_module, "write_long", stop)
        assert main([*words, "--seed", "1"]) == 1
    assert tree(tmp_path / "panel") == before


def test_other_clips_that_overlap_a_test_set_make_another_panel(words, tmp_path, capsys) -> None:
    assert main(words) == 0
    overlap = tmp_path / "overlap.json"
    kept = open_source(
        Source(
            "t",
            str(tmp_path / "crowd"),
            schema=CROWD,
            without=(str(tmp_path / "panel" / CROWD / "not_for_training.jsonl"),),
        )
    )
    barred = kept.clips[0].id
    overlap.write_text(json.dumps({"train": {"overlapping": [barred]}}))
    assert main([*words, "--overlap", str(overlap)]) == 0
    assert "is left as it is" not in capsys.readouterr().err
    lists = [tmp_path / "panel" / CROWD / name for name in ("dev.jsonl", "not_for_training.jsonl")]
    ids = [{json.loads(line)["id"] for line in file.read_text().splitlines()} for file in lists]
    assert barred in ids[1] - ids[0]
    assert main([*words, "--overlap", str(overlap)]) == 0
    assert "is left as it is" in capsys.readouterr().err
    assert main(words) == 1
    assert "was made with --overlap" in capsys.readouterr().err


def test_a_panel_is_not_replaced_by_one_of_fewer_sets(words, tmp_path, capsys) -> None:
    (tmp_path / "c.py").write_text(
        "from hebasr_jax.run_config import *\n"
        "def get_config(): return Config(data=Data(train=("
        f"Source('c', {str(tmp_path / 'crowd')!r}, schema={CROWD!r}, accept_licence=True),"
        f"Source('k', {str(tmp_path / 'knesset')!r}, schema={KNESSET!r}, accept_licence=True))))\n"
    )
    config = ["panel", "--config", str(tmp_path / "c.py"), "--out", f"{tmp_path}/panel"]
    assert main(config) == 0
    before = tree(tmp_path / "panel")
    (tmp_path / "knesset").rename(tmp_path / "moved")
    for command, why in (
        (config, f"the panel there has {KNESSET}"),
        (words, "knesset: no such file or folder"),
        ([*words[:3], *words[4:]], f"the panel there has {KNESSET}"),
    ):
        capsys.readouterr()
        assert main(command) == 1
        told = capsys.readouterr().err
        assert why in told
        assert len(told.split("error: ")[1].splitlines()) <= 3
        assert tree(tmp_path / "panel") == before
    assert "no --sets names it" in told
    assert "config" not in told


def test_a_set_that_names_nothing_is_refused_or_split_by_blocks(tmp_path, capsys) -> None:
    write(tmp_path / "crowd", CROWD, [crowd(n) for n in range(48)])
    words = ["panel", "--sets", f"{CROWD}={tmp_path}/crowd", "--out", f"{tmp_path}/panel"]
    assert main(words) == 1
    told = capsys.readouterr().err.split("error: ")[1]
    assert f"--by {CROWD}=block" in told
    assert len(told.splitlines()) <= 3
    assert not (tmp_path / "panel").exists()
    assert main([*words, "--by", f"{CROWD}=block"]) == 0


def test_another_folder_is_not_replaced(words, tmp_path, capsys) -> None:
    (tmp_path / "panel").mkdir()
    (tmp_path / "panel" / "mine.txt").write_text("x")
    assert main(words) == 1
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "panel" / "mine.txt").read_text() == "x"


def test_a_list_of_another_set_is_refused(words, tmp_path, capsys) -> None:
    assert main(words) == 0
    dev = tmp_path / "panel" / CROWD / "dev.jsonl"
    dev.write_text(dev.read_text() + json.dumps({"id": "no such clip"}) + "\n")
    with pytest.raises(Exception, match="ids are not in the set"):
        open_source(Source("d", str(tmp_path / "crowd"), schema=CROWD, only=str(dev)))


def test_a_voice_note_is_as_long_the_same_each_time_and_narrower() -> None:
    noise = np.random.default_rng(0).normal(0, 3000, 32_077).astype(np.int16)
    one, two = voice_note(noise), voice_note(noise)
    assert one.dtype == np.int16
    assert len(one) == len(noise)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, noise)
    assert "OPUS" in soundfile.available_subtypes("OGG")

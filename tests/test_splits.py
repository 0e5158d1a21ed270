"""Splits: nothing that a group names is on both sides, whatever the clips; and the lists work."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from hebasr_jax.cli import main
from hebasr_jax.data.clips import Clip, ClipSet
from hebasr_jax.data.sources import open_source
from hebasr_jax.data.splits import hold_out, overlapping, stitch
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Source

RATE = 16_000


def clips_of(named: list[tuple[str, str]], length_s: float = 36.0) -> list[Clip]:
    return [
        Clip(str(i), "שלום", length_s, recording=recording, speaker=speaker)
        for i, (recording, speaker) in enumerate(named)
    ]


names = st.sampled_from(["", "a", "b", "c", "d", "e", "f"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=40), st.integers(0, 3))
def test_no_recording_and_no_speaker_is_on_both_sides(named, seed) -> None:
    clips = clips_of(named)
    try:
        split = hold_out(clips, ("recording", "speaker"), 0.05, seed=seed, barred=["3"])
    except UserError:
        return
    dev = set(split.held_out)
    assert dev
    assert "3" not in {clips[i].id for i in dev}
    groups = {int(split.group_C[i]) for i in dev}
    train = [c for i, c in enumerate(clips) if int(split.group_C[i]) not in groups]
    for field in ("recording", "speaker"):
        here = {getattr(clips[i], field) for i in dev} - {""}
        assert not here & {getattr(clip, field) for clip in train}


def test_the_hours_are_met_within_a_group_and_the_seed_decides_which() -> None:
    clips = clips_of([(f"r{i % 100}", "") for i in range(1000)])  # 10 h, groups of 6 minutes
    chosen = []
    for seed in (0, 0, 1):
        split = hold_out(clips, ("recording",), 1.0, seed=seed, barred=[])
        hours = sum(clips[i].duration_s for i in split.held_out) / 3600
        assert 1.0 <= hours <= 1.1
        chosen.append({clips[i].recording for i in split.held_out})
    assert chosen[0] == chosen[1] != chosen[2]


def test_more_clips_later_leave_the_first_groups_where_they_were() -> None:
    small = clips_of([(f"r{i % 50}", "") for i in range(500)])
    large = clips_of([(f"r{i % 50}", "") for i in range(500)] + [("new", "")] * 5)
    one, two = (hold_out(c, ("recording",), 0.5, barred=[]) for c in (small, large))
    before, after = ({small[i].recording for i in s.held_out if i < 500} for s in (one, two))
    assert len(before & after) >= len(before) - 1


def test_clips_without_a_name_are_never_held_out_and_none_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="nothing can be held out by recording"):
        hold_out(clips_of([("", "x")] * 9), ("recording",), 0.1, barred=[])
    split = hold_out(clips_of([("", "")] * 5 + [("a", "")] * 5), ("recording",), 0.05, barred=[])
    assert min(split.held_out) >= 5


def test_a_group_that_is_far_too_long_is_refused() -> None:
    with pytest.raises(UserError, match="too little"):
        hold_out(clips_of([("a", "")] * 500), ("recording",), 0.1, barred=[])


@pytest.fixture
def spoken(tmp_path):
    """24 clips of 1 s in six recordings, each clip a level of its own."""
    rows = []
    for i in range(24):
        soundfile.write(tmp_path / f"{i}.wav", np.full(RATE, 100 * i + 50, np.int16), RATE)
        rows.append({"id": f"c{i}", "audio": f"{i}.wav", "text": f"מילה {i}", "speaker": f"s{i}"})
        rows[-1]["recording"] = f"rec{i % 6}"
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_the_command_writes_lists_that_a_config_takes(spoken, capfd) -> None:
    overlap = spoken / "overlap.json"
    overlap.write_text(json.dumps({"train": {"overlapping": ["c0", "c1"]}}))
    command = ["split", "--source", f"{spoken}/m.jsonl", "--out", f"{spoken}/lists"]
    command += ["--hours", "0.0023", "--overlap", str(overlap), "--long-s", "3"]
    assert main(command) == 0
    told = capfd.readouterr().err
    assert "2 clips overlap a test set" in told
    source = Source("m", f"{spoken}/m.jsonl")
    lists = spoken / "lists"
    dev = open_source(replace(source, only=f"{lists}/dev.jsonl"))
    train = open_source(replace(source, without=(f"{lists}/not_for_training.jsonl",)))
    ids = [{clip.id for clip in s.clips} for s in (dev, train)]
    assert not ids[0] & ids[1]
    assert not {"c0", "c1"} & (ids[0] | ids[1])
    assert not {c.recording for c in dev.clips} & {c.recording for c in train.clips}
    assert len(ids[0]) + len(ids[1]) == 22
    before = (lists / "dev.jsonl").read_bytes()
    assert main(command) == 0
    assert (lists / "dev.jsonl").read_bytes() == before
    long = open_source(Source("long", f"{lists}/dev_long.jsonl"))
    words = sorted(word for clip in long.clips for word in clip.text.split("מילה") if word.strip())
    assert len(words) == len(ids[0])
    wave = long.read(0)
    numbers = [int(n) for n in long.clips[0].text.replace("מילה", "").split()]
    step = RATE + round(0.3 * RATE)  # each clip's level stands where its words do
    assert [int(wave[k * step + 8000]) for k in range(len(numbers))] == [
        100 * n + 50 for n in numbers
    ]


def test_another_split_leaves_nothing_of_the_one_before(spoken, capsys) -> None:
    lists = spoken / "lists"
    command = ["split", "--source", f"{spoken}/m.jsonl", "--out", str(lists), "--hours", "0.0023"]
    assert main([*command, "--long-s", "1"]) == 0
    many = len(list((lists / "long").iterdir()))
    assert main([*command, "--long-s", "9"]) == 0
    rows = (lists / "dev_long.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(list((lists / "long").iterdir())) == len(rows) < many
    assert main([*command, "--seed", "1"]) == 0
    assert not list(lists.rglob("dev_long*")) + list(lists.rglob("*.flac"))


@pytest.mark.parametrize("out", ["a_file", "/proc/x"])
def test_a_place_that_cannot_be_written_to_is_refused(spoken, capsys, monkeypatch, out) -> None:
    monkeypatch.chdir(spoken)
    (spoken / "a_file").write_text("mine")
    assert main(["split", "--source", "m.jsonl", "--out", out, "--hours", "0.0023"]) == 1
    told = capsys.readouterr().err.split("error: ")[1]
    assert told.startswith(f"{out}: cannot be written")
    assert len(told.splitlines()) <= 3
    assert (spoken / "a_file").read_text() == "mine"


def test_hours_that_leave_nothing_to_train_on_are_refused(spoken, capsys) -> None:
    command = ["split", "--source", f"{spoken}/m.jsonl", "--out", f"{spoken}/lists"]
    assert main([*command, "--hours", "1"]) == 1
    assert "nothing is left to train on" in capsys.readouterr().err
    assert not (spoken / "lists").exists()


def test_recordings_of_one_name_in_two_sources_are_one_group_and_never_one_stitch() -> None:
    clips = [Clip(str(i), "א", 1.0, recording="1", source="ab"[i % 2]) for i in range(8)]
    clip_set = ClipSet("s", tuple(clips), lambda index: np.zeros(RATE, np.int16), "")
    pieces = list(stitch(clip_set, range(8), 100.0))
    assert [{clips[i].source for i in piece} for piece in pieces] == [{"a"}, {"b"}]
    assert len(set(hold_out(clips, ("recording",), 1.0, barred=[]).group_C)) == 1


def test_a_file_that_tells_no_overlap_is_refused(tmp_path) -> None:
    (tmp_path / "o.json").write_text("{}")
    with pytest.raises(UserError, match="tells no overlap"):
        overlapping([tmp_path / "o.json"])

"""Quarantine: one line a clip, whatever the threads and resumes do; the limit stops the run."""

import json
import threading

import numpy as np
import pytest

from hebasr_jax.data.clips import BadClip, Clip, ClipSet
from hebasr_jax.data.quality import Quarantine, top_reasons
from hebasr_jax.errors import UserError


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_tells_all(tmp_path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    Quarantine(path, 0.5, 10).add("crowd", "קליפ 1", "no such file", "a.wav", 2, 30)
    assert _lines(path) == [
        {
            "set": "crowd",
            "id": "קליפ 1",
            "reason": "no such file",
            "detail": "a.wav",
            "epoch": 2,
            "step": 30,
        }
    ]


def test_a_clip_counts_once_whatever_the_threads(tmp_path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 1.0, 200)

    def add() -> None:
        for number in range(100):
            quarantine.add("a", str(number), "is cut")
            quarantine.add("b", str(number), "is cut")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(quarantine) == 200
    ids = {(line["set"], line["id"]) for line in _lines(tmp_path / "q.jsonl")}
    assert len(ids) == len(_lines(tmp_path / "q.jsonl")) == 200


def test_processes_that_share_the_file_count_together(tmp_path) -> None:
    first, second = (Quarantine(tmp_path / "q.jsonl", 0.02, 200) for _ in range(2))
    for number in range(2):
        first.add("a", str(number), "no such file")
        second.add("b", str(number), "is cut")
    second.add("a", "0", "no such file")
    assert len(_lines(tmp_path / "q.jsonl")) == 4
    with pytest.raises(UserError, match="5 of 200"):
        first.add("a", "2", "is cut")


def test_one_more_than_the_limit_stops_the_run_with_the_top_reasons(tmp_path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.02, 200)
    for number in range(3):
        quarantine.add("a", str(number), "no such file")
    quarantine.add("a", "3", "is cut")
    with pytest.raises(UserError) as stop:
        quarantine.add("b", "4", "is cut")
    told = str(stop.value)
    assert "5 of 200" in told
    assert "3 x no such file; 2 x is cut" in told
    assert str(tmp_path / "q.jsonl") in told
    with pytest.raises(UserError):  # also for every thread that comes later
        quarantine.add("b", "4", "is cut")


def test_after_a_resume_old_clips_count_and_are_not_written_again(tmp_path) -> None:
    path = tmp_path / "q.jsonl"
    first = Quarantine(path, 0.02, 100)
    first.add("a", "1", "is cut")
    with path.open("ab") as file:
        file.write(b'{"set": "a", "id": "2", "rea')  # killed while it wrote
    second = Quarantine(path, 0.02, 100)
    assert len(second) == 1
    second.add("a", "1", "is cut")
    second.add("a", "2", "is cut")
    whole = [line for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    assert [json.loads(line)["id"] for line in whole] == ["1", "2"]
    with pytest.raises(UserError, match="3 of 100"):
        Quarantine(path, 0.02, 100).add("a", "3", "is cut")


def test_rows_bad_at_opening_count(tmp_path) -> None:
    clips = (Clip("1", "x", 1.0),)
    bad = (("m.jsonl:2", BadClip("is not JSON", "char 3")), ("m.jsonl:3", BadClip("has no 'text'")))
    opened = ClipSet("a", clips, lambda index: np.zeros(0, np.int16), "", bad)
    quarantine = Quarantine(tmp_path / "q.jsonl", 1.0, 3)
    quarantine.add_rows([opened])
    assert [(line["id"], line["reason"]) for line in _lines(tmp_path / "q.jsonl")] == [
        ("m.jsonl:2", "is not JSON"),
        ("m.jsonl:3", "has no 'text'"),
    ]
    with pytest.raises(UserError, match="2 of 3"):
        Quarantine(tmp_path / "r.jsonl", 0.5, 3).add_rows([opened])


def test_a_file_that_cannot_be_written_is_told_and_the_count_goes_on(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    quarantine = Quarantine(tmp_path / "file" / "q.jsonl", 0.01, 100)
    quarantine.add("a", "1", "is cut")
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be written"):
        quarantine.add("a", "2", "is cut")


def test_top_reasons() -> None:
    assert top_reasons(["a", "b", "b", "c", "d", "c", "b"]) == "3 x b; 2 x c; 1 x a; ..."
    assert top_reasons([]) == ""

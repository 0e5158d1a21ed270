"""Sources: what is a clip, what is a bad row, what stops; and that reading gives the sound."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from hebasr_jax.audio import read_audio
from hebasr_jax.data.clips import BadClip
from hebasr_jax.data.sources import describe, open_source, open_sources
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source
from hebasr_jax.timestamps import Segment
from tests.conftest import SHARED

RATE = 16_000


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, samples).astype(np.int16)


def manifest(folder, *rows, name="m.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Source("set", str(folder / name))


@pytest.fixture
def wavs(tmp_path):
    """0.wav to 4.wav of 0.5 s to 0.9 s."""
    for number in range(5):
        soundfile.write(tmp_path / f"{number}.wav", noise(8000 + 1600 * number, number), RATE)
    return tmp_path


def row(number: int, **fields) -> dict:
    return {"audio": f"{number}.wav", "text": f"טקסט {number}"} | fields


def faults(clip_set) -> dict[str, str]:
    """Line numbers and reasons of a set's bad rows."""
    return {where.rsplit(":", 1)[1]: fault.reason for where, fault in clip_set.bad}


def reason_of(clip_set, index: int = 0) -> str:
    with pytest.raises(BadClip) as caught:
        clip_set.read(index)
    return caught.value.reason


def test_all_fields_of_a_row(wavs) -> None:
    given = row(
        1,
        id=7,
        duration_s=0.6,
        speaker="ש",
        recording="r",
        language="English",
        context="לפני כן",
        quality=0.9,
        segments=[{"start_s": 0, "end_s": 0.2, "text": "טקסט"}],
    )
    clip = open_source(manifest(wavs, given, "", row(0))).clips[0]
    assert (clip.id, clip.text, clip.duration_s, clip.speaker) == ("7", "טקסט 1", 0.6, "ש")
    assert (clip.recording, clip.language, clip.context) == ("r", "English", "לפני כן")
    assert clip.segments == (Segment(0.0, 0.2, "טקסט"),)
    assert clip.quality == 0.9


def test_ids_durations_and_samples_without_being_told(wavs) -> None:
    opened = open_source(manifest(wavs, *(row(number) for number in range(5))))
    assert [clip.id for clip in opened.clips] == [f"{number}.wav" for number in range(5)]
    assert [clip.duration_s for clip in opened.clips] == [0.5, 0.6, 0.7, 0.8, 0.9]
    for number in range(5):
        assert np.array_equal(opened.read(number), noise(8000 + 1600 * number, number))
    assert opened.read(0).dtype == np.int16
    assert "5 clips" in describe(opened)
    assert "no row lost" in describe(opened)


BAD_ROWS = [
    ('{"audio": "0.wav", "text"', "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[1, 2]", "is not a JSON object"),
    ({"text": "x"}, "has no 'audio'"),
    ({"audio": "0.wav", "sentence": "x"}, "has no 'text'"),
    ({"audio": "0.wav", "text": None}, "has no 'text'"),
    ({"audio": "0.wav", "text": 5}, "'text' is not a string"),
    ({"audio": ["0.wav"], "text": "x"}, "'audio' is not a string"),
    ('{"audio": "0.wav", "text": "\\ud800"}', "'text' has half a surrogate pair"),
    (row(0, duration_s=-1), "duration is not positive"),
    (row(0, duration_s=0), "duration is not positive"),
    (row(0, duration_s="0.5"), "'duration_s' is not a number"),
    ('{"audio": "0.wav", "text": "x", "duration_s": NaN}', "'duration_s' is not a number"),
    (row(0, start_s=0.1), "start_s and end_s belong together"),
    (row(0, start_s=0.3, end_s=0.1), "start_s and end_s are out of order"),
    (row(0, start_s=0.0, end_s=0.1, duration_s=5), "duration is not end_s - start_s"),
    (row(9), "no such file"),
    ({"audio": ".", "text": "x"}, "no such file"),
    ({"audio": "../0.wav", "text": "x"}, "audio lies outside the folder of the manifest"),
    ({"audio": "empty.wav", "text": "x"}, "is empty (zero bytes)"),
    ({"audio": "text.wav", "text": "x"}, "cannot be read as sound"),
    (row(2), "has the id of another row"),
    (row(3, segments=[{"start_s": 0.2, "end_s": 0.1, "text": "x"}]), "segments overlap, are out"),
    (row(3, segments=[{"start_s": -1, "end_s": 0.1, "text": "x"}]), "segments overlap, are out"),
    (row(3, segments=[{"start_s": 0, "end_s": 9, "text": "x"}]), "segments end after the clip"),
    (row(3, segments=[{"start_s": 0, "text": "x"}]), "a segment lacks start_s"),
    (row(3, segments="x"), "segments are not a list"),
    (row(3, quality="high"), "'quality' is not a number"),
]


def test_each_bad_row_is_named_by_its_line_and_the_others_stay(wavs) -> None:
    (wavs / "empty.wav").write_bytes(b"")
    (wavs / "text.wav").write_text("this is no sound " * 50)
    bad = [bad for bad, _ in BAD_ROWS]
    opened = open_source(manifest(wavs, row(2), *bad, row(4)))
    assert [clip.id for clip in opened.clips] == ["2.wav", "4.wav"]
    found = faults(opened)
    assert len(found) == len(BAD_ROWS)
    for line, (_, reason) in enumerate(BAD_ROWS, start=2):
        assert found[str(line)].startswith(reason), line
    assert np.array_equal(opened.read(1), noise(14400, 4))
    assert f"{len(BAD_ROWS)} rows lost" in describe(opened)


def test_a_set_without_a_clip_is_an_error_with_counts_and_the_first_line(wavs) -> None:
    rows = [{"audio": "0.wav", "sentence": "x"}, {"audio": "1.wav", "sentence": "y"}, "{"]
    with pytest.raises(UserError) as caught:
        open_source(manifest(wavs, *rows))
    told = str(caught.value)
    assert "none of its 3 rows" in told
    assert "2 x has no 'text'; 1 x is not JSON" in told
    assert "m.jsonl:1: has no 'text': its fields are audio, sentence" in told
    mapped = replace(manifest(wavs, *rows), columns=Columns(text="sentence"))
    assert [clip.text for clip in open_source(mapped).clips] == ["x", "y"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: (folder / "m.jsonl").write_text(""), "is empty: it has no row"),
        (lambda folder: (folder / "m.jsonl").mkdir(), "neither parquet files nor"),
        (lambda folder: (folder / "m.jsonl").write_bytes(os.urandom(9999)), "rows is a clip"),
        (lambda folder: None, "no such file or folder"),
    ],
)
def test_a_manifest_that_is_none(tmp_path, make, told) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=told):
        open_source(Source("set", str(tmp_path / "m.jsonl")))


def test_split_and_columns(wavs) -> None:
    rows = [row(n, split="dev" if n % 2 else "train", meta={"who": f"s{n}"}) for n in range(5)]
    source = replace(manifest(wavs, *rows), split="dev", columns=Columns(speaker="meta.who"))
    assert [clip.speaker for clip in open_source(source).clips] == ["s1", "s3"]
    with pytest.raises(UserError, match="no row has the split 'test'\nSplits there: dev, train"):
        open_source(replace(source, split="test"))
    with pytest.raises(UserError, match=r"no row has a field 'meta.whom'"):
        open_source(replace(source, columns=Columns(speaker="meta.whom")))


def test_a_changed_set_has_another_fingerprint(wavs) -> None:
    rows = [row(n, duration_s=0.5 + 0.1 * n) for n in range(3)]
    first = open_source(manifest(wavs, *rows)).fingerprint
    assert open_source(manifest(wavs, *rows)).fingerprint == first
    changes = [
        rows[:2],
        rows[::-1],
        [rows[0] | {"text": "אחר"}, *rows[1:]],
        [rows[0] | {"segments": [{"start_s": 0, "end_s": 0.1, "text": "א"}]}, *rows[1:]],
        [rows[0] | {"start_s": 0.0, "end_s": 0.5}, *rows[1:]],
        [rows[0] | {"audio": "3.wav", "id": "0.wav"}, *rows[1:]],
    ]
    prints = {first, *(open_source(manifest(wavs, *changed)).fingerprint for changed in changes)}
    soundfile.write(wavs / "0.wav", noise(8001), RATE)
    prints.add(open_source(manifest(wavs, *rows)).fingerprint)
    assert len(prints) == len(changes) + 2


def test_false_durations_and_damaged_sound(wavs) -> None:
    soundfile.write(wavs / "cut.flac", noise(RATE), RATE)
    whole = (wavs / "cut.flac").read_bytes()
    (wavs / "cut.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(wavs / "nan.wav", np.full(8000, np.nan, np.float32), RATE, subtype="FLOAT")
    (wavs / "text.wav").write_text("this is no sound " * 50)
    rows = [
        row(0, duration_s=0.1),
        row(1, duration_s=9.0),
        {"audio": "cut.flac", "text": "x", "duration_s": 1.0},
        {"audio": "nan.wav", "text": "x", "duration_s": 0.5},
        {"audio": "text.wav", "text": "x", "duration_s": 0.5},
        row(2, duration_s=0.6999),
    ]
    opened = open_source(manifest(wavs, *rows))
    reasons = [reason_of(opened, index) for index in range(5)]
    assert reasons == [
        "lasts longer than its row says",
        "is shorter than its row says",
        "is cut or damaged",
        "has samples that are NaN or infinite",
        "cannot be read as sound",
    ]
    assert np.array_equal(opened.read(5), noise(11200, 2))  # rounding cuts nothing off
    (wavs / "2.wav").unlink()  # after opening
    assert reason_of(opened, 5) == "no such file"


def test_a_bomb_stops_at_the_length_the_row_tells(tmp_path) -> None:
    with soundfile.SoundFile(tmp_path / "bomb.flac", "w", 48_000, 2) as file:
        for _ in range(60):
            file.write(np.zeros((48_000 * 10, 2), np.int16))
    opened = open_source(manifest(tmp_path, {"audio": "bomb.flac", "text": "", "duration_s": 1}))
    read = []
    original = soundfile.SoundFile.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            soundfile.SoundFile, "read", lambda *a, **k: read.append(1) or original(*a, **k)
        )
        assert reason_of(opened) == "lasts longer than its row says"
    assert len(read) <= 2


def test_other_rates_channels_and_one_sample(tmp_path) -> None:
    time_s = np.arange(44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 440 * time_s)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, 0.5 * tone], 1), 44_100, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", np.array([123], np.int16), RATE)
    soundfile.write(tmp_path / "c.wav", np.array([0.5, -1.0, 1.0]), RATE, subtype="FLOAT")
    rows = [{"audio": f"{name}.wav", "text": ""} for name in "abc"]
    opened = open_source(manifest(tmp_path, *rows))
    wave = opened.read(0)
    expected = 0.375 * 32768 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert wave.shape == (RATE,)
    assert np.abs(wave - expected)[500:-500].max() < 4
    assert opened.read(1).tolist() == [123]
    assert opened.read(2).tolist() == [16384, -32768, 32767]


@pytest.mark.parametrize(
    ("suffix", "rate"), [("wav", 16_000), ("flac", 44_100), ("mp3", 16_000), ("ogg", 48_000)]
)
def test_a_piece_is_that_part_of_the_whole_recording(tmp_path, suffix, rate) -> None:
    wave = np.cumsum(noise(7 * rate)).astype(np.float64)
    wave = 0.4 * wave / np.abs(wave).max() + 0.01 * noise(7 * rate, 1) / 9000
    soundfile.write(tmp_path / f"long.{suffix}", wave, rate)
    whole = read_audio(tmp_path / f"long.{suffix}", max_seconds=8.0) * 32768
    pieces = [(0.0, 1.0), (2.515, 4.25), (5.9, 6.9)]
    rows = [
        {"audio": f"long.{suffix}", "text": "x", "start_s": start_s, "end_s": end_s}
        for start_s, end_s in [*pieces, (6.5, 9.0)]
    ]
    opened = open_source(manifest(tmp_path, *rows))
    assert opened.clips[1].id == f"long.{suffix}@2.515-4.25"
    assert opened.clips[1].duration_s == pytest.approx(1.735)
    for index, (start_s, end_s) in enumerate(pieces):
        part = whole[round(start_s * RATE) : round(end_s * RATE)]
        assert len(opened.read(index)) == len(part)
        assert np.abs(opened.read(index) - part).max() < (1 if rate == RATE else 3)
    assert reason_of(opened, 3) == "is shorter than its row says"


def write_parquet(path, numbers, *, group=2, text="text", audio=None, **columns) -> None:
    """Clips `noise(8000 + number, number)` as FLAC in a struct of bytes and path."""
    sounds = []
    for number in numbers:
        soundfile.write(path.with_suffix(".flac"), noise(8000 + number, number), RATE)
        sounds.append({"bytes": path.with_suffix(".flac").read_bytes(), "path": f"{number}.flac"})
    sounds = audio(sounds) if audio else sounds
    texts = [f"טקסט {number}" for number in numbers]
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"audio": sounds, text: texts, **columns}), path, row_group_size=group)


def test_parquet_file_folder_and_glob(tmp_path) -> None:
    write_parquet(tmp_path / "a.parquet", range(5))
    write_parquet(
        tmp_path / "b.parquet", range(5, 8), audio=lambda rows: [r["bytes"] for r in rows]
    )
    folder, one = open_sources(
        [Source("f", str(tmp_path)), Source("o", str(tmp_path / "[a-z].parquet"))]
    )
    assert [clip.id for clip in folder.clips] == [clip.id for clip in one.clips]
    assert folder.fingerprint == one.fingerprint
    assert folder.clips[5].id == "b.parquet#0"
    for number in np.random.default_rng(0).permutation(8):
        assert folder.clips[number].text == f"טקסט {number}"
        assert folder.clips[number].duration_s == (8000 + number) / RATE
        assert np.array_equal(folder.read(number), noise(8000 + number, number))


def test_parquet_columns_that_are_not_there(tmp_path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, range(3), text="sentence", meta=[{"duration": 0.5, "who": 3}] * 3)
    with pytest.raises(UserError) as caught:
        open_source(Source("set", str(file)))
    told = str(caught.value)
    assert "has no column 'text' for the text\nIts columns are audio, sentence, meta." in told
    assert "columns.text" in told
    columns = Columns(text="sentence", duration_s="meta.duration", speaker="meta.who")
    clips = open_source(Source("set", str(file), columns=columns)).clips
    assert [(clip.text, clip.duration_s, clip.speaker) for clip in clips[:1]] == [
        ("טקסט 0", 0.5, "3")
    ]
    for name, told in [("sound", "no column 'sound' for the audio"), ("sentence", "holds string")]:
        with pytest.raises(UserError, match=told):
            open_source(Source("set", str(file), columns=replace(columns, audio=name)))


def test_parquet_that_is_damaged(tmp_path) -> None:
    (tmp_path / "no.parquet").write_bytes(b"PAR1" + os.urandom(500))
    with pytest.raises(UserError, match="is no readable parquet file"):
        open_source(Source("set", str(tmp_path)))
    (tmp_path / "no.parquet").unlink()
    duration_s = [0.5, 0.5, 0.5]
    file = tmp_path / "a.parquet"
    write_parquet(
        file,
        range(3),
        duration_s=duration_s,
        audio=lambda rows: [rows[0], {"bytes": None, "path": "1.flac"}, None],
    )
    opened = open_source(Source("set", str(file)))
    assert np.array_equal(opened.read(0), noise(8000))
    assert [reason_of(opened, index) for index in (1, 2)] == ["has no audio bytes"] * 2
    beyond = {"audio": "a.parquet#3", "text": "x", "duration_s": 1}
    assert reason_of(open_source(manifest(tmp_path, beyond))) == "no such row in the parquet file"
    again = open_source(Source("set", str(file)))
    file.write_bytes(b"gone")
    assert reason_of(again) == "parquet file cannot be read"
    assert np.array_equal(opened.read(0), noise(8000))  # what was read stays


def test_row_groups_are_read_once_and_memory_is_bounded(tmp_path, monkeypatch) -> None:
    from hebasr_jax.data import parquet

    write_parquet(tmp_path / "a.parquet", range(6))
    loads: list[int] = []
    load = parquet._load
    monkeypatch.setattr(parquet, "_load", lambda *given: loads.append(given[2]) or load(*given))
    opened = open_source(Source("set", str(tmp_path)))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(opened.read, list(range(6)) * 5))
    assert sorted(loads) == [0, 1, 2]
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 1)
    opened = open_source(Source("set", str(tmp_path)))
    loads.clear()
    for index in (0, 2, 1, 3):
        opened.read(index)
    assert loads == [0, 1, 0, 1]


def test_threads_read_what_one_thread_reads_and_leave_no_file_open(wavs) -> None:
    write_parquet(wavs / "p.parquet", range(6))
    rows = [{"audio": f"p.parquet#{n}", "text": "x"} for n in range(6)]
    pieces = [row(n, start_s=0.1, end_s=0.3) for n in range(5)]
    opened = open_source(manifest(wavs, *rows, *pieces, *(row(n) for n in range(5))))
    alone = [opened.read(index) for index in range(len(opened.clips))]
    before = len(os.listdir("/proc/self/fd"))
    wrong: list[int] = []

    def read(seed: int) -> None:
        for index in np.random.default_rng(seed).integers(0, len(alone), 60):
            if not np.array_equal(opened.read(int(index)), alone[index]):
                wrong.append(int(index))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.shared
def test_real_speech_by_manifest_and_by_parquet() -> None:
    folder = SHARED / "data" / "he_torah_chant"
    by_manifest = open_source(Source("m", str(folder / "manifest.jsonl"), split="test"))
    by_parquet = open_source(Source("p", str(folder / "test.parquet")))
    assert not by_manifest.bad + by_parquet.bad
    assert by_manifest.clips == by_parquet.clips
    assert len(by_manifest.clips) == 222
    for index in range(0, 222, 20):
        wave = by_manifest.read(index)
        assert np.array_equal(wave, by_parquet.read(index))
        assert abs(len(wave) / RATE - by_manifest.clips[index].duration_s) < 0.01
        assert np.abs(wave).max() > 1000

"""Pseudo-labels: cut at pauses, heard by two systems, kept where they agree, the same after a kill.

faster-whisper is an extra; a module of its interface stands in, whose text the sound's level tells.
"""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hub_rows import write
from stand_in_whisper import installed

from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.sources import open_source
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source
from hebasr_jax.tiny import write_tiny_model

# The level of a sound, in steps of 2 %, is the line of `texts` that a system writes.
STAND_IN = """
from types import SimpleNamespace
calls = []
class WhisperModel:
    def __init__(self, path, *, local_files_only):
        self.texts = open(path + "/model.bin").read().split("|")
        self.model = SimpleNamespace(device="cpu", compute_type="int8", is_multilingual=True)
    def transcribe(self, wave, **options):
        calls.append(len(wave))
        text = self.texts[round(float(abs(wave).max()) * 50) - 1] if abs(wave).max() else ""
        tokens = [1] * 60 if text == "loop" else [*range(len(text))]
        return (SimpleNamespace(text=text, tokens=tokens) for text in [text]), None
"""
HEARD = ("שלום לכולם", "מה שלומך היום", "", "loop", "אין עוד דבר", "ועוד טקסט ארוך")
SECOND = ("שלום לכולם", "מה שלומך אתמול", "", "loop", "אין עוד דבר!", "משהו אחר לגמרי")


@pytest.fixture
def whisper(tmp_path, monkeypatch):
    yield from installed(tmp_path / "packages", STAND_IN, monkeypatch)


def model(folder: Path, texts: tuple[str, ...]) -> str:
    folder.mkdir()
    (folder / "model.bin").write_text("|".join(texts))
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text("{}")
    return f"faster-whisper:{folder}"


def tone(line: int, seconds: float) -> np.ndarray:
    """A sound that has a system write its line of this number."""
    return np.tile(np.array([1, -1]) * (line + 1) / 50, round(seconds * 8000)) * 0.999


@pytest.fixture
def made(tmp_path, whisper) -> dict:
    """Six short clips, silence, and a recording with two pauses; no row has a text."""
    sounds = [tone(line, 1.0) for line in range(6)] + [np.zeros(16000)]
    pause = np.zeros(8000)
    long = np.concatenate([tone(0, 3.0), pause, tone(1, 3.0), pause, tone(4, 3.0)])
    rows = []
    for number, sound in enumerate([*sounds, long]):
        soundfile.write(tmp_path / f"{number}.wav", sound, 16000)
        rows.append({"audio": f"{number}.wav", "id": f"c{number}", "speaker": "s"})
    source = tmp_path / "audio.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = model(tmp_path / "a", HEARD), model(tmp_path / "b", SECOND)
    return {"source": str(source), "pseudo_label": first, "second": second, "piece_s": 4.0}


def label(out: Path, made: dict, **changes) -> Path:
    settings = {"name": "audio", "out": out, "max_cer": 0.2} | made | changes
    assert Prepare(**settings).run() == 0
    return out / "audio"


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def test_what_two_systems_agree_on_is_kept(made, tmp_path) -> None:
    folder = label(tmp_path / "out", made)
    found = open_source(Source("audio", str(folder)))
    texts = {clip.id: clip.text for clip in found.clips}
    long = {name: text for name, text in texts.items() if name.startswith("c7@")}
    assert {k: v for k, v in texts.items() if k not in long} == {"c0": HEARD[0], "c4": HEARD[4]}
    assert [*long.values()] == [HEARD[0], HEARD[4]]
    assert all(clip.pseudo_label and clip.speaker == "s" for clip in found.clips)
    assert {clip.recording for clip in found.clips} == {"c0", "c4", "c7"}
    whole = soundfile.read(tmp_path / "7.wav", dtype="int16")[0]
    for index, clip in enumerate(found.clips):
        if clip.id in long:  # the shard holds just what the systems heard
            start = round(float(clip.id.split("@")[1]) * 16000)
            assert np.array_equal(found.read(index), whole[start:][: len(found.read(index))])
    removed = {row["id"]: row for row in lines(folder / "removed.jsonl")}
    assert {name: removed[name]["reason"] for name in ("c1", "c2", "c3", "c5", "c6")} == {
        "c1": "systems disagree",
        "c2": "empty",
        "c3": "looks like a loop",
        "c5": "systems disagree",
        "c6": "is silent",
    }
    assert removed["c1"]["cer"] == pytest.approx(4 / 14, abs=1e-3)  # only the vav of both is kept
    assert removed["c2"]["cer"] is None
    told = json.loads((folder / "labels.json").read_bytes())
    assert told["pieces"] == 10
    assert told["kept"]["pieces"] == 4
    assert told["left_out"]["systems disagree"]["pieces"] == 3
    hours = told["kept"]["hours"] + sum(row["hours"] for row in told["left_out"].values())
    assert hours == pytest.approx(told["hours"]) == pytest.approx(17 / 3600)
    assert sum(told["cer"]["pieces"]) == 7


def test_pieces_make_the_recording_and_silence_is_not_heard(made, tmp_path, whisper) -> None:
    folder = label(tmp_path / "out", made)
    pieces = lines(folder / "labels" / "pieces.jsonl")[7]["pieces"]
    assert [piece["start_s"] for piece in pieces[1:]] == [piece["end_s"] for piece in pieces[:-1]]
    assert (pieces[0]["start_s"], pieces[-1]["end_s"]) == (0.0, 10.0)
    assert all(piece["end_s"] - piece["start_s"] <= 4.0 for piece in pieces)
    assert "c6" not in {row["id"] for row in lines(folder / "labels" / "first.jsonl")}


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    made, tmp_path, whisper, monkeypatch
) -> None:
    monkeypatch.setattr("hebasr_jax.data.pseudo_label._CALL_S", (2.0, 2.0))
    whole = content(label(tmp_path / "whole", made))
    assert content(label(tmp_path / "again", made)) == whole
    for name in ("pieces", "first", "second"):
        full = whole[f"labels/{name}.jsonl"]
        for size in (0, full.index(b"\n") + 9, len(full) * 2 // 3, len(full) - 1):
            out = tmp_path / f"{name}{size}"
            shutil.copytree(tmp_path / "whole" / "audio" / "labels", out / "audio" / "labels")
            (out / "audio" / "labels" / f"{name}.jsonl").write_bytes(full[:size])
            whisper.calls.clear()
            assert content(label(out, made)) == whole
            heard = len(whisper.calls) - 2  # each model is warmed up once
            assert 0 <= heard < 18 if name != "pieces" else heard == 0


def test_a_kill_while_the_second_listens(made, tmp_path, whisper, monkeypatch) -> None:
    monkeypatch.setattr("hebasr_jax.data.pseudo_label._CALL_S", (2.0, 2.0))
    whole = content(label(tmp_path / "whole", made))
    hears, count = whisper.WhisperModel.transcribe, 0

    def stops(self, wave, **options):
        nonlocal count
        count += 1
        if count > 14:
            raise KeyboardInterrupt
        return hears(self, wave, **options)

    with monkeypatch.context() as during:
        during.setattr(whisper.WhisperModel, "transcribe", stops)
        with pytest.raises(KeyboardInterrupt):
            label(tmp_path / "out", made)
    assert not list((tmp_path / "out").rglob("*.arrayrecord"))
    assert content(label(tmp_path / "out", made)) == whole


def test_labels_of_something_else_are_refused(made, tmp_path) -> None:
    folder = label(tmp_path / "out", made)
    before = content(folder)
    (tmp_path / "a" / "model.bin").write_text("|".join(SECOND[::-1]))
    with pytest.raises(UserError, match=r"first.jsonl: was made by another model.*system changed"):
        label(tmp_path / "out", made)
    (tmp_path / "a" / "model.bin").write_text("|".join(HEARD))
    with pytest.raises(UserError, match=r"cutting.* changed"):
        label(tmp_path / "out", made, piece_s=3.0)
    with pytest.raises(UserError, match="begun with another source or other settings"):
        label(tmp_path / "out", made, max_cer=0.5)
    label(tmp_path / "out", made)
    assert content(folder) == before


def test_labels_serve_another_threshold(made, tmp_path, whisper) -> None:
    folder = label(tmp_path / "out", made)
    shutil.copytree(folder / "labels", tmp_path / "other" / "audio" / "labels")
    whisper.calls.clear()
    other = label(tmp_path / "other", made, max_cer=0.4)
    assert whisper.calls == [16000, 16000]  # the warm-ups
    assert json.loads((other / "labels.json").read_bytes())["kept"]["pieces"] == 6


def test_the_second_may_be_a_transcript(made, tmp_path) -> None:
    second = tmp_path / "second.jsonl"
    rows = [{"id": "c0", "text": "שָׁלוֹם, לכולם!"}, {"id": "c1", "text": "אחר"}]
    second.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = label(tmp_path / "out", made, second=str(second))
    assert [clip.id for clip in open_source(Source("audio", str(folder))).clips] == ["c0"]
    removed = {row["id"]: row["reason"] for row in lines(folder / "removed.jsonl")}
    assert removed["c4"] == "has no second text"
    second.write_text(json.dumps({"id": "other", "text": "א"}))
    with pytest.raises(UserError, match=r"none of the pieces\n.*'c0'.*'other'"):
        label(tmp_path / "new", made, second=str(second))


def test_texts_of_the_source_count_for_nothing(made, tmp_path) -> None:
    folder = label(tmp_path / "out", made)
    again = label(tmp_path / "again", made | {"source": str(folder)}, normalizer="hebrew-v1")
    rows = [
        json.loads(line) | {"text": None} for line in Path(made["source"]).read_text().splitlines()
    ]
    Path(made["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    nulls = label(tmp_path / "nulls", made)
    for one in (again, nulls):
        texts = [clip.text for clip in open_source(Source("audio", str(one))).clips]
        assert texts == [HEARD[0], HEARD[4]] * 2


def test_our_own_model_listens_as_in_transcribe(made, tmp_path) -> None:
    from hebasr_jax.transcribe import load_recognizer, transcribe

    write_tiny_model(tmp_path / "tiny")
    rows = [json.loads(line) for line in Path(made["source"]).read_text().splitlines()][:2]
    Path(made["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = made["pseudo_label"]
    settings = made | {"pseudo_label": str(tmp_path / "tiny"), "second": second}
    with pytest.raises(UserError, match="no piece of 2 is kept"):
        label(tmp_path / "out", settings)
    waves = [soundfile.read(tmp_path / f"{n}.wav", dtype="int16")[0] for n in (0, 1)]
    results = transcribe(load_recognizer(str(tmp_path / "tiny")), waves)
    found = lines(tmp_path / "out" / "audio" / "labels" / "first.jsonl")
    assert [row["text"] for row in found] == [result.transcript.text for result in results]
    assert [row["finished"] for row in found] == [result.finished for result in results]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"second": ""}, "belong together"),
        ({"pseudo_label": ""}, "belong together"),
        ({"shard": "1/2"}, "--shard is not for --pseudo-label"),
        ({"max_cer": 1.5}, "no error rate"),
        ({"second": "faster-whisper:absent/model/none"}, "absent/model/none"),
    ],
)
def test_flags_that_cannot_be_followed(made, tmp_path, changes, told) -> None:
    with pytest.raises(UserError, match=told) as fault:
        label(tmp_path / "out", made, **changes)
    assert len(str(fault.value).splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_a_system_does_not_confirm_itself(made, tmp_path) -> None:
    with pytest.raises(UserError, match="agrees with itself"):
        label(tmp_path / "out", made | {"second": made["pseudo_label"]})
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    with pytest.raises(UserError, match="the same model"):
        label(tmp_path / "out", made | {"second": f"faster-whisper:{tmp_path / 'copy'}"})


def test_sound_that_cannot_be_read_is_listed_or_stops_it(made, tmp_path) -> None:
    (tmp_path / "5.wav").write_bytes(b"RIFF no sound at all")
    with pytest.raises(UserError, match="1 recordings cannot be read"):
        label(tmp_path / "out", made)
    folder = label(tmp_path / "out", made, max_bad_share=0.5)
    removed = {row["id"]: row["reason"] for row in lines(folder / "removed.jsonl")}
    assert len(removed) == 6


def test_shards_of_something_else_keep_what_is_told_of_them(made, tmp_path) -> None:
    folder = label(tmp_path / "out", made)
    before = content(folder)
    with pytest.raises(UserError, match="begun with another source or other settings"):
        label(tmp_path / "out", made, max_cer=0.5)
    assert content(folder) == before
    with pytest.raises(UserError, match="begun with another source or other settings"):
        label(tmp_path / "out", made, format="pcm")
    assert content(folder) == before
    plain = tmp_path / "plain"  # shards without labels are refused before anything listens
    given = {"source": str(folder), "name": "audio"}
    assert Prepare(plain, **given).run() == 0
    assert json.loads((plain / "audio" / "origin.json").read_bytes())["pseudo_labels"]
    (plain / "audio" / "origin.json").unlink()
    kept = content(plain)
    with pytest.raises(UserError, match="not pseudo-labelled shards of this sound"):
        label(plain, made)
    assert content(plain) == kept


def test_rows_left_out_on_purpose_are_listed_too(made, tmp_path) -> None:
    without = tmp_path / "without.jsonl"
    without.write_text('{"id": "c0", "reason": "music"}\n')
    folder = label(tmp_path / "out", made, without=(str(without),))
    removed = {row["id"]: row["reason"] for row in lines(folder / "removed.jsonl")}
    assert removed["c0"] == "music"
    assert removed["c1"] == "systems disagree"


@pytest.mark.parametrize("schema", ["", "audio-v2", "crowd-transcribe-v5"])
def test_parquet_without_texts_is_labelled(made, tmp_path, schema) -> None:
    rows = []
    for line in (0, 1, 4):
        file = io.BytesIO()
        soundfile.write(file, tone(line, 1.0), 16000, format="WAV")
        rows.append({"audio": {"bytes": file.getvalue(), "path": f"{line}.wav"}, "entry": "e"})
    write(tmp_path / "copy", schema, rows)
    folder = label(tmp_path / "out", made | {"source": str(tmp_path / "copy"), "schema": schema})
    found = open_source(Source("audio", str(folder)))
    assert [clip.text for clip in found.clips] == [HEARD[0], HEARD[4]]
    told = json.loads((folder / "origin.json").read_bytes())
    assert (told["hub"] or "") == (schema and f"ivrit-ai/{schema}")
    assert told["clips"] == 2


def test_flags_of_speech_are_of_no_other_mode(tmp_path) -> None:
    (tmp_path / "t.txt").write_text("א")
    for changes, told in [
        ({"pseudo_label": "a", "second": "b"}, "--synthesize and --pseudo-label exclude"),
        ({"ray": "local"}, "--ray is not for --synthesize"),
        ({"schema": "kan"}, "--schema is not for --synthesize"),
        ({"max_cer": 0.2}, "--max-cer is not for --synthesize"),
    ]:
        with pytest.raises(UserError, match=told):
            Prepare(tmp_path / "o", synthesize=tmp_path / "t.txt", name="a", **changes).run()
    with pytest.raises(UserError, match="--split is not for --config"):
        Prepare(tmp_path / "o", Path("c.py"), split="dev").run()
    with pytest.raises(UserError, match=r"--columns is not for --config"):
        Prepare(None, Path("c.py"), columns=Columns(text="t")).run()
    with pytest.raises(UserError, match="--ray is not for --pseudo-label"):
        Prepare(tmp_path / "o", source="s", pseudo_label="a", second="b", ray="local").run()
    assert not (tmp_path / "o").exists()


def test_the_card_counts_the_texts_that_models_wrote(made, tmp_path) -> None:
    from hebasr_jax.finish import _labels

    folder = label(tmp_path / "out", made)
    clips = open_source(Source("audio", str(folder))).clips
    told = _labels(json.loads((folder / "origin.json").read_bytes()), clips)
    assert told == "a, kept where b has at most 20% CER to it (4 of 4 clips)"
    assert _labels({}, clips) == "a model that is not named (4 of 4 clips)"
    assert _labels({}, [replace(clip, pseudo_label=False) for clip in clips]) is None

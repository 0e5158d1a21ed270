"""Each known set as documented, and the ways in which a copy of it may differ."""

import json
import shutil
from dataclasses import replace

import pytest
from hub_rows import FIRST, FLAGS, RATE, a_slice, check_sounds, crowd, write
from stand_in_hub import child, served

from hebasr_jax.audit_command import Audit
from hebasr_jax.data.adapters import ADAPTERS, filled, find_adapter
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.sources import describe, open_source
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source
from hebasr_jax.timestamps import Segment

# --- crowd-transcribe ------------------------------------------------------------------------


def test_crowd_transcribe_keeps_its_sentences_and_counts_its_flags(tmp_path) -> None:
    """Bug 1: the text column was not known, and None became an empty text."""
    flagged = [crowd(number + 3, None, flag) for number, flag in enumerate(sorted(FLAGS))]
    rows = [crowd(0), crowd(1), crowd(2), *flagged, crowd(9, "  "), crowd(0), crowd(10)]
    rows[1]["sentence"] = None
    clip_set = open_source(write(tmp_path, "crowd-transcribe-v5", rows))
    kept = [0, 2, 4, 5, 10]  # noise and several speakers stay
    assert [clip.id for clip in clip_set.clips][:4] == ["u0", "u2", "u4", "u5"]
    assert [clip.text for clip in clip_set.clips] == [f"משפט {number}" for number in kept]
    check_sounds(clip_set, [0, 2, 4, 5, 11], [1.0] * 5)
    assert [fault.reason for _, fault in clip_set.bad] == ["'sentence' is null"]
    reasons = dict(clip_set.removed)
    assert {reasons[f"u{n}"] for n in (3, 6, 7, 8)} == {
        f"is flagged {flag}" for flag in FLAGS - {"noisy", "multiple_speakers"}
    }
    assert reasons["u9"].startswith("has an empty text")
    assert reasons["u0"] == "is a clip that was transcribed before"
    told = describe(clip_set)
    assert "1 rows lost: 1 x 'sentence' is null" in told
    assert "6 left out: " in told
    assert "1 x is flagged skipped" in told
    assert "has no column" not in told


def test_a_renamed_text_column_is_an_error_that_names_the_columns(tmp_path) -> None:
    """Bug 18: text, transcript or sentence; nobody guesses."""
    rows = [{"phrase": row.pop("sentence")} | row for row in (crowd(0), crowd(1))]
    source = write(tmp_path, "crowd-transcribe-v5", rows)
    with pytest.raises(UserError) as caught:
        open_source(source)
    told = str(caught.value).splitlines()
    assert len(told) == 3
    assert "no column 'sentence' for the text" in told[0]
    assert "phrase" in told[1]
    assert "columns.text" in told[2]
    mended = replace(source, columns=Columns(text="phrase"))
    assert [clip.text for clip in open_source(mended).clips] == ["משפט 0", "משפט 1"]
    with pytest.raises(UserError, match="no column 'who' for the speaker"):
        open_source(replace(mended, columns=Columns(text="phrase", speaker="who")))
    usual = write(tmp_path / "b", "crowd-transcribe-v5", [{"text": "א"}])
    assert open_source(usual).clips[0].text == "א"


def test_a_struct_that_lacks_fields_is_told_once(tmp_path) -> None:
    rows = [crowd(number) for number in range(4)]
    for row in rows:
        del row["extra_data"]["skipped"], row["extra_data"]["duration"]
        row["extra_data"]["noisy"] = None
    rows[1]["extra_data"] = None
    clip_set = open_source(write(tmp_path, "crowd-transcribe-v5", rows))
    assert len(clip_set.clips) == 4
    assert clip_set.clips[1].duration_s == 1.0  # measured
    lacking = ["has no column extra_data.duration", "has no column extra_data.skipped"]
    assert sorted(clip_set.notes) == lacking
    assert describe(clip_set).count("extra_data.skipped") == 1


def test_parts_that_are_for_tests_are_not_read(tmp_path) -> None:
    """A whole copy of a set lies in one folder: KAN's validation part is a test set."""
    write(tmp_path / "data", "kan", [{"sentence": "מבחן"}], "validation")
    source = write(tmp_path / "data", "kan", [{"sentence": "אימון"}])
    source = replace(source, path=str(tmp_path))
    assert [clip.text for clip in open_source(source).clips] == ["אימון"]
    assert open_source(replace(source, split="train")).clips == open_source(source).clips
    with pytest.raises(UserError, match="has no part 'validation' of kan to train on"):
        open_source(replace(source, split="validation"))
    held = replace(source, path=str(tmp_path / "data" / "validation-00000-of-00001.parquet"))
    with pytest.raises(UserError, match=r"has no part 'train'(.|\n)*are of validation"):
        open_source(held)
    by_row = [{"sentence": "א", "split": "train"}, {"sentence": "ב", "split": "validation"}]
    rows = write(tmp_path / "x", "kan", by_row)
    (tmp_path / "x" / "train-00000-of-00001.parquet").rename(tmp_path / "x" / "all.parquet")
    assert [c.text for c in open_source(replace(rows, split="train")).clips] == ["א"]


def test_sound_that_was_decoded_is_refused(tmp_path) -> None:
    """Bug 18: rows without bytes were skipped one by one, until none was left."""
    rows = [{"audio": {"array": [0.0, 0.1], "sampling_rate": RATE}, "sentence": "א"}]
    with pytest.raises(UserError, match="not encoded audio"):
        open_source(write(tmp_path, "kan", rows))


# --- whisper schema --------------------------------------------------------------------------


SLICES = [
    a_slice(0.0, FIRST),
    a_slice(6.0, "<|0.00|>המשך<|1.00|><|3.00|>", FIRST),  # ends within a segment
    a_slice(9.0, "<|1.00|>"),  # nothing but the beginning of one
    a_slice(12.0, ""),
    a_slice(18.0, None),
    a_slice(24.0, "<|0.00|>סוף<|5.00|>", "<|0.00|>לפני<|1.00|>", quality_score=0.4),
]


@pytest.mark.parametrize("schema", ["crowd-recital", "knesset-plenums"])
def test_whisper_slices_become_texts_segments_and_contexts(tmp_path, schema) -> None:
    clip_set = open_source(write(tmp_path, schema, SLICES, seconds=6.0, kind="MP3"))
    first, cut, last = clip_set.clips
    assert [clip.id for clip in clip_set.clips] == ["s1@0.00", "s1@6.00", "s1@24.00"]
    assert [clip.text for clip in clip_set.clips] == ["שלום לכולם אני פותח", "המשך", "סוף"]
    assert first.segments == (Segment(0.0, 2.0, "שלום לכולם"), Segment(2.5, 4.0, "אני פותח"))
    assert cut.segments == (Segment(0.0, 1.0, "המשך"),)
    # Bug 10: what came before is the context and no part of the text.
    assert [clip.context for clip in clip_set.clips] == ["", "שלום לכולם אני פותח", "לפני"]
    assert {(clip.recording, clip.source) for clip in clip_set.clips} == {("s1", "plenum")}
    assert last.quality == pytest.approx(0.4)
    # The sound of the words that are missing is not heard either.
    check_sounds(clip_set, [0, 1, 5], [6.0, 3.0, 6.0])
    assert [fault.reason for _, fault in clip_set.bad] == ["'transcript' is null"]
    removed = dict(clip_set.removed)
    assert set(removed) == {"s1@9.00", "s1@12.00"}
    assert removed["s1@9.00"] == "holds only the beginning of a segment"
    assert removed["s1@12.00"].startswith("has an empty text")


def test_a_slice_without_stamps_or_predecessor(tmp_path) -> None:
    plain = a_slice(0.0, "בלי זמנים") | {"has_timestamps": False, "prev_transcript": "לא לקחת"}
    bare = a_slice(6.0, FIRST)
    del bare["metadata"]["seek"]
    rows = [plain, bare, a_slice(12.0, "<|3.00|>א<|1.00|>"), a_slice(18.0, "<|0.00|>א<|9.00|>")]
    clip_set = open_source(write(tmp_path, "knesset-plenums", rows, seconds=6.0))
    clips = clip_set.clips
    assert [where.rsplit("#", 1)[1] for where, _ in clip_set.bad] == ["2", "3"]  # stamps
    assert (clips[0].text, clips[0].segments, clips[0].context) == ("בלי זמנים", (), "")
    assert clips[1].id == "train-00000-of-00001.parquet#1"
    rows = rows[:2]
    for row in rows:
        del row["metadata"], row["has_prev"]
    clip_set = open_source(write(tmp_path / "b", "knesset-plenums", rows, seconds=6.0))
    assert len(clip_set.clips) == 2
    assert clip_set.clips[0].quality is None
    assert "has no column metadata.quality_score" in clip_set.notes


# --- the other sets --------------------------------------------------------------------------

OTHERS = {
    # Columns that are not documented have the usual names here.
    "knesset-committees": [
        {"text": "א", "id": "c0", "speaker": "p1", "quality": 0.8, "language": "he"},
        {"text": "ב", "id": "c1", "speaker": "p2", "quality": 0.0, "language": "he"},
    ],
    "hebdb": [{"text": "א", "id": "h0"}, {"text": "ב", "id": "h1"}],
    "fleurs": [
        {"raw_transcription": "א", "transcription": "x", "id": 7, "language": "Hebrew"},
        {"raw_transcription": "ב", "transcription": "x", "id": 7, "language": "Hebrew"},
    ],
    "common-voice": [{"sentence": "א", "locale": "he"}, {"sentence": "ב", "locale": "he"}],
    "kan": [{"sentence": "א"}, {"sentence": "ב"}],
    "saspeech-automatic": [{"text": "א"}, {"text": "ב"}],
}


@pytest.mark.parametrize("schema", OTHERS)
def test_plain_sets(tmp_path, schema) -> None:
    kind = "OGG" if schema == "hebdb" else "FLAC"
    source = write(tmp_path, schema, OTHERS[schema], kind=kind)
    clip_set = open_source(source)
    assert [clip.text for clip in clip_set.clips] == ["א", "ב"]
    assert len({clip.id for clip in clip_set.clips}) == 2
    assert {clip.language for clip in clip_set.clips} == {""}
    assert not clip_set.bad + clip_set.removed
    assert not clip_set.notes
    check_sounds(clip_set, [0, 1], [1.0, 1.0])
    if schema == "knesset-committees":
        assert [clip.quality for clip in clip_set.clips] == [0.8, 0.0]
        assert [clip.speaker for clip in clip_set.clips] == ["p1", "p2"]


def test_audio_v2_has_no_text_and_is_no_silence(tmp_path) -> None:
    source = write(tmp_path, "audio-v2", [{"entry": "e0"}, {"entry": "e1"}], kind="MP3")
    with pytest.raises(UserError, match="has no text to train on"):
        open_source(source)
    clips = open_source(replace(source, columns=Columns(recording="entry")), unlabelled=True)
    assert [(clip.text, clip.recording) for clip in clips.clips] == [("", "e0"), ("", "e1")]
    assert clips.clips[0].duration_s == pytest.approx(1.0, abs=0.15)  # MP3 pads


NEED_A_FLAG = {"knesset-committees", "kan", "saspeech-automatic"}


@pytest.mark.parametrize("schema", [adapter.name for adapter in ADAPTERS])
def test_a_licence_that_is_not_free_has_to_be_accepted(tmp_path, schema) -> None:
    """Before anything is read: the path does not exist."""
    adapter, source = find_adapter(schema), Source("set", str(tmp_path / "no"), schema=schema)
    assert filled(source).licence == adapter.licence
    assert filled(source).hub == (adapter.hub or None)
    assert filled(replace(source, licence="mine")).licence == "mine"
    with pytest.raises(UserError) as caught:
        open_source(source, unlabelled=True)
    told = str(caught.value)
    assert ("accept_licence" in told) == (schema in NEED_A_FLAG)
    assert ("no such file" in told) == (schema not in NEED_A_FLAG)
    if schema in NEED_A_FLAG:
        assert len(told.splitlines()) == 3
        assert told.startswith(f"set ({adapter.hub or schema}): its licence is ")
    with pytest.raises(UserError, match="no such file"):
        open_source(replace(source, accept_licence=True), unlabelled=True)


def test_a_schema_that_is_not_known() -> None:
    with pytest.raises(UserError, match=r"Known are .*\nDid you mean knesset-plenums\?"):
        open_source(Source("set", "x", schema="knesset-plenum"))


# --- from the hub, and to shards -------------------------------------------------------------

FETCH = """
import json, sys
from hebasr_jax.data.adapters import find_adapter
from hebasr_jax.data.sources import open_source
from hebasr_jax.hub import find_dataset
from hebasr_jax.run_config import Source
adapter = find_adapter("knesset-plenums")
found = find_dataset(adapter.hub, adapter.config, adapter.splits[0])
clips = open_source(Source("k", adapter.hub, schema=adapter.name), files=found.paths)
rows = [[clip.id, clip.text, len(clips.read(i))] for i, clip in enumerate(clips.clips)]
print(json.dumps([found.revision, rows]))
"""


def test_a_set_that_a_hub_serves(tmp_path) -> None:
    write(tmp_path / "set", "knesset-plenums", SLICES, seconds=6.0, kind="MP3")
    files = {f"data/{f.name}": f.read_bytes() for f in (tmp_path / "set").iterdir()}
    files["data/test-00000-of-00001.parquet"] = b"is not fetched"
    with served(None) as hub:
        sha = hub.push_dataset("ivrit-ai/knesset-plenums-whisper-training", files)
        done = child(tmp_path / "home", hub, "-c", FETCH)
    assert done.returncode == 0, done.stderr
    revision, rows = json.loads(done.stdout)
    assert revision == sha
    assert rows == [
        ["s1@0.00", "שלום לכולם אני פותח", 6 * RATE],
        ["s1@6.00", "המשך", 3 * RATE],
        ["s1@24.00", "סוף", 6 * RATE],
    ]


def test_shards_hold_what_the_adapter_made(tmp_path, capsys) -> None:
    rows = [*SLICES[:4], *(a_slice(30.0 + 6 * n, FIRST, quality_score=0.0) for n in range(2))]
    source = write(tmp_path / "raw", "knesset-plenums", rows, seconds=6.0, kind="MP3")
    command = Prepare(
        out=tmp_path / "out",
        source=source.path,
        name="knesset",
        schema="knesset-plenums",
        normalizer="hebrew-v1",
    )
    assert command.run() == 0
    assert "2 left out" in capsys.readouterr().err
    folder = tmp_path / "out" / "knesset"
    listed = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == ["s1@9.00", "s1@12.00"]
    shutil.rmtree(tmp_path / "raw")
    prepared = replace(source, path=str(folder))
    again = open_source(prepared)  # a schema does not touch what was prepared with it
    assert [clip.quality for clip in again.clips][2:] == [0.0, 0.0]
    assert [clip.context for clip in again.clips][:2] == ["", "שלום לכולם אני פותח"]
    assert again.clips[1].segments == (Segment(0.0, 1.0, "המשך"),)
    check_sounds(again, [0, 1, 4, 5], [6.0, 3.0, 6.0, 6.0])
    best = open_source(replace(prepared, min_quality=0.5))
    assert len(best.clips) == 2


def test_prepare_stops_when_too_many_texts_are_null(tmp_path) -> None:
    rows = [crowd(number) for number in range(10)]
    rows[3]["sentence"] = None
    source = write(tmp_path / "raw", "crowd-transcribe-v5", rows)
    command = Prepare(
        out=tmp_path / "out", source=source.path, name="crowd", schema="crowd-transcribe-v5"
    )
    with pytest.raises(UserError, match=r"1 of 10 clips are bad(.|\n)*'sentence' is null"):
        command.run()
    assert replace(command, max_bad_share=0.2).run() == 0


def test_a_licence_is_accepted_for_the_sets_of_a_config_too(tmp_path) -> None:
    rows = [{"sentence": f"משפט {n}"} for n in range(3)]
    source = write(tmp_path / "copy", "kan", rows)
    config = tmp_path / "config.py"
    config.write_text(
        "from hebasr_jax.run_config import Config, Data, Source\n"
        f"kan = Source('kan', {source.path!r}, schema='kan')\n"
        "def get_config(): return Config(data=Data(train=(kan,)))\n"
    )
    out = tmp_path / "out"
    for make in (Prepare(out, config), Audit(out, config)):
        with pytest.raises(UserError, match="its licence is not stated"):
            make.run()
        assert not out.exists()
    assert Prepare(out, config, accept_licence=True).run() == 0
    told = json.loads((out / "train" / "kan" / "origin.json").read_bytes())
    assert told == {
        "schema": "kan",
        "hub": "imvladikon/hebrew_speech_kan",
        "licence": None,
        "split": "train",
        "clips": 3,
        "bad": 0,
        "removed": 0,
    }
    assert Audit(tmp_path / "audit", config, accept_licence=True).run() == 0
    with pytest.raises(UserError, match="--schema is not for --config"):
        Audit(out, config, schema="kan").run()
    with pytest.raises(UserError, match="--columns is not for --config"):
        Audit(out, config, columns=Columns(text="sentence")).run()

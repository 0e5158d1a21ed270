"""Prepared shards hold what the source gives; kills, changes and full disks leave nothing false."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hebasr_jax.data.clips import BadClip
from hebasr_jax.data.prepare import plan_set, prepare_set, shard_clips
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.shard_folder import alone
from hebasr_jax.data.shards import unpack
from hebasr_jax.data.sources import open_source
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source

RATE = 16_000
CLIPS = 24
SHARD_MB = 0.12  # of 24 clips of half a second: 3 shards


@pytest.fixture
def source(tmp_path):
    """A manifest of 24 clips of 0.5 s, two of them pieces, at several rates, with all fields."""
    rows = []
    for number in range(CLIPS):
        rate = (16_000, 44_100, 8_000)[number % 3]
        wave = np.random.default_rng(number).uniform(-0.3, 0.3, rate)
        soundfile.write(tmp_path / f"{number}.wav", wave, rate)
        row = {"audio": f"{number}.wav", "text": f"טקסט {number}", "speaker": "ש", "context": "ל"}
        segments = [{"start_s": 0.1, "end_s": 0.25, "text": "טקסט"}]
        rows.append(row | {"start_s": 0.25, "end_s": 0.75, "segments": segments})
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Source("crowd", str(tmp_path / "m.jsonl"))


def prepare(given: Source, out: Path, **changes) -> Path:
    """The folder of the prepared set."""
    flags = {"source": given.path, "name": "crowd", "shard_mb": SHARD_MB, "processes": 1}
    flags |= changes
    assert Prepare(out, **flags).run() == 0
    return out / "crowd"


def equal(left, right) -> bool:
    return left.clips == right.clips and all(
        np.array_equal(left.read(index), right.read(index)) for index in range(len(left.clips))
    )


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["pcm", "flac"])
def test_shards_hold_exactly_what_the_source_gives(source, tmp_path, kind) -> None:
    folder = prepare(source, tmp_path / "out", format=kind)
    given, prepared = open_source(source), open_source(Source("crowd", str(folder)))
    assert equal(given, prepared)
    assert given.clips[0].segments
    assert not prepared.bad
    assert len(list(folder.glob("*.arrayrecord"))) == 3
    assert not [file for file in folder.iterdir() if "partial" in file.name]
    assert not (folder / "quarantine.jsonl").exists()


def test_a_prepared_set_is_prepared_again_as_it_is(source, tmp_path) -> None:
    first = prepare(source, tmp_path / "out", format="flac")
    again = prepare(Source("crowd", str(first)), tmp_path / "again", format="pcm")
    assert equal(open_source(source), open_source(Source("crowd", str(again))))


def test_parts_make_the_whole_and_lacking_ones_are_named(source, tmp_path) -> None:
    whole = prepare(source, tmp_path / "whole")
    for part in (3, 1):
        folder = prepare(source, tmp_path / "parts", shard=f"{part}/3")
    with pytest.raises(UserError, match=r"1 of 3 shards are missing.*\nThey are 00001-of-00003"):
        open_source(Source("crowd", str(folder)))
    prepare(source, tmp_path / "parts", shard="2/3")
    assert content(folder) == content(whole)
    prepare(source, tmp_path / "other", shard="1/2")
    assert content(prepare(source, tmp_path / "other", shard="2/2")) == content(whole)


def test_cutting_into_shards_is_even_and_whole(source) -> None:
    opened = open_source(source)
    for shards in (1, 2, 3, 7, CLIPS):
        ranges = shard_clips(opened, shards)
        assert [index for part in ranges for index in part] == list(range(CLIPS))
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    assert plan_set(opened, "pcm", 1e-6).shards == CLIPS
    assert plan_set(opened, "pcm", 1e6).shards == 1


def test_killed_between_and_within_shards_the_same_command_goes_on(source, tmp_path) -> None:
    """A child is killed while it reads the 13th clip; its first shard stays untouched."""
    code = """
        import os, signal, sys
        from hebasr_jax.data import shard_work, shards
        from hebasr_jax.data.prepare_command import Prepare
        from pathlib import Path
        packed = []
        def pack(*given):
            packed.append(1)
            if len(packed) == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            return shards.pack(*given)
        shard_work.pack = pack
        given = dict(source=sys.argv[1], name="crowd", shard_mb=0.12, processes=1)
        Prepare(Path(sys.argv[2]), **given).run()
    """
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(code), source.path, str(out)]
    assert subprocess.run(command, env=_path()).returncode == -signal.SIGKILL
    folder = out / "crowd"
    kept = folder / "00000-of-00003.arrayrecord"
    before = kept.stat()
    assert [file.name for file in folder.glob("*.arrayrecord")] == [kept.name]
    assert [file.name for file in folder.iterdir() if "partial" in file.name]
    with pytest.raises(UserError, match="2 of 3 shards are missing"):
        open_source(Source("crowd", str(folder)))
    assert content(prepare(source, out)) == content(prepare(source, tmp_path / "whole"))
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_damaged_shard_is_noticed_by_reading_and_made_again_by_prepare(source, tmp_path) -> None:
    folder = prepare(source, tmp_path / "out", format="pcm")
    good = content(folder)
    shard = folder / "00001-of-00003.arrayrecord"
    damaged = bytearray(good[shard.name])
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    opened, bad = open_source(Source("crowd", str(folder))), []
    for index in range(CLIPS):
        try:
            opened.read(index)
        except BadClip as fault:
            bad.append((index, fault.reason))
    assert [reason for _, reason in bad] == ["shard cannot be read"]
    assert 8 <= bad[0][0] < 16
    assert content(prepare(source, tmp_path / "out", format="pcm")) == good
    shard.write_bytes(good[shard.name][:-1])
    with pytest.raises(UserError, match="missing or not whole"):
        open_source(Source("crowd", str(folder)))


def test_a_changed_source_or_setting_is_refused(source, tmp_path) -> None:
    folder = prepare(source, tmp_path / "out")
    good = content(folder)
    for changes in ({"format": "pcm"}, {"shard_mb": 0.2}):
        with pytest.raises(UserError, match="other settings"):
            prepare(source, tmp_path / "out", **changes)
    text = Path(source.path).read_text(encoding="utf-8")
    Path(source.path).write_text(text.replace('"speaker"', '"speaker_id"', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"fingerprint .* is now"):
        prepare(source, tmp_path / "out")
    assert content(folder) == good


def test_bad_clips_are_left_out_and_put_down_up_to_the_limit(source, tmp_path) -> None:
    Path(source.path).with_name("5.wav").write_bytes(b"this is no sound")
    with Path(source.path).open("a", encoding="utf-8") as file:
        file.write("\nthis is no row\n")
    with pytest.raises(UserError, match=r"1 of 25 clips are bad.*\n1 x is not JSON"):
        prepare(source, tmp_path / "out")
    for _ in range(2):
        folder = prepare(source, tmp_path / "out", max_bad_share=0.1)
    lines = (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["reason"] for row in rows] == ["is not JSON", "piece of a recording cannot be read"]
    assert rows[1]["id"] == "5.wav@0.25-0.75"
    mended = Path(source.path).read_text(encoding="utf-8").removesuffix("this is no row\n")
    Path(source.path).write_text(mended, encoding="utf-8")
    prepare(source, tmp_path / "out", max_bad_share=1.5 / CLIPS)
    assert len((folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    ids = [clip.id for clip in open_source(Source("crowd", str(folder))).clips]
    assert ids == [f"{number}.wav@0.25-0.75" for number in range(CLIPS) if number != 5]


def test_a_full_disk_leaves_nothing_half_written_and_says_so(source, tmp_path) -> None:
    """A limit on the size of files stands in for the full disk."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        from hebasr_jax.data.prepare_command import Prepare
        from hebasr_jax.errors import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            given = dict(source=sys.argv[1], name="crowd", shard_mb=0.12, format="pcm")
            Prepare(Path(sys.argv[2]), **given).run()
        except UserError as error:
            print(error)
    """
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(code), source.path, str(out)]
    done = subprocess.run(command, env=_path(), capture_output=True, text=True)
    assert re.search("cannot be written\n.*File too large\n.*finished shards are kept", done.stdout)
    assert [file.name for file in (out / "crowd").iterdir()] == ["set.json"]
    assert equal(
        open_source(source), open_source(Source("c", str(prepare(source, out, format="pcm"))))
    )


def test_too_little_space_is_told_before_work_begins(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    with pytest.raises(UserError, match=r"may need 0\.4 MB, and 0\.0 MB are free"):
        prepare(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out" / "crowd").iterdir()] == ["set.json"]


class _Usage:
    free = 1000


def test_flags_that_do_not_go_together(source, tmp_path) -> None:
    for changes, told in [
        ({"source": None}, "give --config, or --source"),
        ({"config": Path("c.py")}, "give --config, or --source"),
        ({"name": None}, "cannot name a folder"),
        ({"name": "../x"}, "cannot name a folder"),
        ({"shard": "0/2"}, "--shard 0/2 is no part"),
        ({"shard": "3/2"}, "--shard 3/2 is no part"),
        ({"shard_mb": 0.0}, "must be positive"),
        ({"max_bad_share": -0.1}, "max-bad-share is a share"),
        ({"max_bad_share": 1.5}, "max-bad-share is a share"),
        ({"max_bad_share": float("nan")}, "max-bad-share is a share"),
        ({"voice_command": "cat {out}"}, "--voice-command is not for --source"),
        ({"licence": "CC0"}, "--licence is not for --source"),
        ({"piece_s": 5.0}, "--piece-s is not for --source"),
        ({"seed": 3}, "--seed is not for --source"),
    ]:
        with pytest.raises(UserError, match=told):
            prepare(source, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_the_sets_of_a_config(source, tmp_path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        "from hebasr_jax.run_config import Config, Data, Source\n"
        f"crowd = Source('crowd', {source.path!r})\n"
        "def get_config() -> Config:\n"
        "    return Config(data=Data(train=(crowd,), dev=(crowd,)))\n"
    )
    assert Prepare(tmp_path / "out", config).run() == 0
    for use in ("train", "dev"):
        prepared = open_source(Source("crowd", str(tmp_path / "out" / use / "crowd")))
        assert equal(prepared, open_source(source))
    with pytest.raises(UserError, match=f"Prepared sets below it: .*dev{os.sep}crowd"):
        open_source(Source("crowd", str(tmp_path / "out")))


def test_lines_tell_progress_when_there_is_no_terminal(
    source, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("hebasr_jax.data.prepare_command._TELL_EVERY_S", -1.0)
    prepare(source, tmp_path / "out", columns=Columns())
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "crowd: 24 clips, 0.00 h; no row lost"
    assert re.fullmatch(r"crowd: 0\.00 of 0\.00 h, [\d,]+ s of audio a second", told[1])
    assert told[-1].endswith("all 3 shards are there; its path can stand in a config")


def test_a_record_that_is_not_ours() -> None:
    for record in (b"", b"\x02\0\0\0{}", b"\xff\xff\xff\xffx"):
        with pytest.raises((ValueError, KeyError)):
            unpack(record)


def test_all_clips_of_a_shard_may_be_bad(source, tmp_path) -> None:
    opened = open_source(source)
    for number in range(8):
        Path(source.path).with_name(f"{number}.wav").write_bytes(b"this is no sound")
    plan = plan_set(opened, "pcm", SHARD_MB)
    assert prepare_set(opened, tmp_path / "out", plan, max_bad_share=0.5) == []
    prepared = open_source(Source("crowd", str(tmp_path / "out")))
    assert [clip.id for clip in prepared.clips] == [clip.id for clip in opened.clips[8:]]
    assert np.array_equal(prepared.read(0), opened.read(8))


def _path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def test_the_share_of_bad_clips_is_that_of_the_whole_job_in_every_part(source, tmp_path) -> None:
    def spoil(*numbers: int) -> None:
        for number in numbers:
            Path(source.path).with_name(f"{number}.wav").write_bytes(b"this is no sound")

    with Path(source.path).open("a", encoding="utf-8") as file:
        file.write("\nthis is no row\n")
    spoil(5)
    for part in (1, 2, 3, 4):  # two of 25 are bad; of three shards one part has none
        prepare(source, tmp_path / "out", shard=f"{part}/4", max_bad_share=0.085)
    assert len(open_source(Source("crowd", str(tmp_path / "out" / "crowd"))).clips) == CLIPS - 1
    spoil(10, 20)
    for part in (3, 1):
        prepare(source, tmp_path / "more", shard=f"{part}/3", max_bad_share=0.125)
    with pytest.raises(UserError, match=r"4 of 25 clips are bad, more than the 3"):
        prepare(source, tmp_path / "more", shard="2/3", max_bad_share=0.125)


def test_lists_of_bad_clips_of_another_cutting_do_not_stay(source, tmp_path) -> None:
    Path(source.path).with_name("5.wav").write_bytes(b"this is no sound")
    for shard in ("1/2", "2/3", "1/3"):
        folder = prepare(source, tmp_path / "out", shard=shard, max_bad_share=0.1)
    assert [file.name for file in folder.glob("quarantine*")] == ["quarantine-1-of-3.jsonl"]
    prepare(source, tmp_path / "out", max_bad_share=0.1)
    assert [file.name for file in folder.glob("quarantine*")] == ["quarantine.jsonl"]


def test_a_part_is_made_by_one_job_at_a_time(source, tmp_path) -> None:
    with alone(tmp_path / "out" / "crowd", 1, 2):
        with pytest.raises(
            UserError, match=rf"crowd is in use\n.*process {os.getpid()} on "
        ) as told:
            prepare(source, tmp_path / "out", shard="1/2")
        assert len(str(told.value).splitlines()) <= 3
        for other in ("1/1", "2/3"):
            with pytest.raises(UserError, match="crowd is in use"):
                prepare(source, tmp_path / "out", shard=other)
        prepare(source, tmp_path / "out", shard="2/2")
    (tmp_path / "out" / "crowd" / ".part-1-of-2.lock").write_text("process 1 on another\n")  # dead
    folder = prepare(source, tmp_path / "out")
    assert not [*folder.glob(".*")]
    with alone(tmp_path / "new" / "crowd", 1, 1):
        pass
    assert not (tmp_path / "new").exists()


def test_origin_goes_with_shards_and_not_to_those_of_something_else(source, tmp_path) -> None:
    def origin(folder: Path) -> dict:
        return json.loads((folder / "origin.json").read_bytes())

    first = prepare(source, tmp_path / "out")
    assert not (first / "origin.json").exists()  # nothing is known
    told = {"hub": "a/b", "revision": "c1", "licence": "L", "split": "validation", "format": "pcm"}
    (first / "origin.json").write_text(json.dumps(told))
    shards = Source("crowd", str(first))
    left_out = tmp_path / "out.jsonl"
    left_out.write_text(json.dumps({"id": open_source(shards).clips[0].id, "reason": "noise"}))
    again = prepare(shards, tmp_path / "again", without=(str(left_out),), split="validation")
    assert origin(again) == {
        "hub": "a/b",
        "revision": "c1",
        "licence": "L",
        "split": "validation",
        "without": ["out.jsonl"],
        "clips": CLIPS - 1,
        "bad": 0,
        "removed": 1,
    }
    before = content(again)
    with pytest.raises(UserError, match="other settings"):
        prepare(source, tmp_path / "again")
    assert content(again) == before
    for file in again.glob("*.arrayrecord"):
        file.unlink()
    assert not (prepare(source, tmp_path / "again") / "origin.json").exists()


def test_speech_that_is_all_there_is_tidied_up_after(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(RATE, 0.3), RATE)
    texts = tmp_path / "texts.JSONL"
    texts.write_text('{"text": "שלום", "ipa": "a"}\n{"id": "no", "text": "כן"}\n', encoding="utf-8")
    flags = {"source": None, "synthesize": texts, "voice_command": f"cp {tmp_path}/a.wav {{out}}"}
    folder = prepare(Source("", ""), tmp_path / "o", spoken="ipa", **flags)
    made = content(folder)
    assert b"has no 'ipa'" in made["removed.jsonl"]
    (folder / "removed.jsonl").unlink()
    (folder / ".speech").mkdir()
    prepare(Source("", ""), tmp_path / "o", spoken="ipa", **flags)
    assert content(folder) == made
    texts.with_suffix(".json").write_text('{\n "text": "שלום"\n}', encoding="utf-8")
    flags["synthesize"] = texts.with_suffix(".json")
    with pytest.raises(UserError, match=r"texts.json: is not JSONL\nIts first line is not JSON"):
        prepare(Source("", ""), tmp_path / "p", **flags)
    texts.with_suffix(".json").write_text('{"text": "שלום"}', encoding="utf-8")
    folder = prepare(Source("", ""), tmp_path / "p", **flags)
    assert [clip.text for clip in open_source(Source("said", str(folder))).clips] == ["שלום"]

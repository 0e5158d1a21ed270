"""Bad input, faults 19 to 28 of the list: each is read, or put aside with its reason, in bounds."""

import gzip
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from memory import peak_anonymous
from mutants import LENGTH_S
from test_audio import run_child, speechlike, tone, with_flac_length, write_av
from test_sources import faults, manifest, reason_of

from hebasr_jax.audio import read_audio
from hebasr_jax.cli import main
from hebasr_jax.config import layout_of, model_config, read_config
from hebasr_jax.data.normalize import normalize_hebrew
from hebasr_jax.data.sources import open_source
from hebasr_jax.errors import UserError
from hebasr_jax.metrics import normalize_ivrit, normalize_tolerant
from hebasr_jax.run_config import Source
from hebasr_jax.tiny import write_tiny_model
from hebasr_jax.weights import load_params

ROOT = Path(__file__).parents[1]
RATE = 16_000
TEXTS = {
    "empty": "",
    "points": "\u05b0\u05b8\u05bc\u05c1" * 9,
    "directions": "\u202eאב\u202c \u2066ג\u2069 \u200f",
    "surrogate": "א\ud800ב",
    "long": "שלום " * 20_000,
    "mixed forms": "שׁ\u05e9\u05c1 \ufb2a e\u0301 é",
    "arabic": "مرحبا بالعالم",
    "latin": "Hello, WORLD",
    "nothing shown": "\u200b\ufeff\x00\x1f",
}


# --- 19: odd files that are whole --------------------------------------------------------------


def test_odd_files_are_clips_or_bad_rows_with_their_reason(tmp_path) -> None:
    """What comes in: its length at 16 kHz. What does not: why, once read or measured."""
    kept = {
        "one.wav": (np.full(1, 0.5), RATE, "PCM_16", 1),
        "zeros.flac": (np.zeros(RATE), RATE, "PCM_16", RATE),
        "eight.wav": (np.tile(tone(48_000, 48_000)[:, None], 8), 48_000, "PCM_16", RATE),
        "slow.wav": (tone(8_000, 8_000), 8_000, "PCM_U8", RATE),
        "fast.flac": (tone(192_000, 192_000), 192_000, "PCM_24", RATE),
        "wide.wav": (tone(RATE), RATE, "DOUBLE", RATE),
    }
    for name, (wave, rate, subtype, _) in kept.items():
        soundfile.write(tmp_path / name, wave, rate, subtype)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"none.{suffix}", np.zeros(0), RATE)
    bad = np.zeros(RATE)
    bad[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", bad, RATE, "FLOAT")
    names = [*kept, "none.wav", "none.flac", "nan.wav"]
    opened = open_source(manifest(tmp_path, *({"audio": n, "text": "א"} for n in names)))
    assert [clip.id for clip in opened.clips] == [*kept, "nan.wav"]
    for index, (*_, samples) in enumerate(kept.values()):
        assert len(opened.read(index)) == samples
    assert not opened.read(1).any()
    assert "NaN" in reason_of(opened, len(kept))
    empty = faults(opened)
    assert re.fullmatch("holds no sound.*|is empty.*", empty["7"])
    assert re.fullmatch("holds no sound.*|is empty.*", empty["8"])


OPEN_TEN_HOURS = """
import json, resource
from hebasr_jax.data.sources import open_source
from hebasr_jax.data.clips import BadClip
from hebasr_jax.run_config import Source
from hebasr_jax.tiny import write_tiny_model
from hebasr_jax.weights import load_params
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
opened = open_source(Source("s", sys.argv[1]))
for index in range(len(opened.clips)):
    try:
        opened.read(index)
    except BadClip:
        pass
told = {where.rsplit(":", 1)[1]: fault.reason for where, fault in opened.bad}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"bad": told, "clips": len(opened.clips), "mib": (peak - before) // 1024}))
"""


def test_ten_hours_of_silence_cost_nothing_whatever_their_row_says(tmp_path) -> None:
    """21: a piece without an end took 5.5 GiB and 17 s before rows were bounded."""
    rate, bomb = 4_000, tmp_path / "bomb.flac"
    soundfile.write(bomb, np.zeros(rate * 36_000, np.int16), rate)
    assert bomb.stat().st_size < 600_000
    rows = [
        {"audio": "bomb.flac", "text": "א"},
        {"audio": "bomb.flac", "text": "א", "start_s": 0.0, "end_s": 1e9},
        {"audio": "bomb.flac", "text": "א", "duration_s": 36_000},
        {"audio": "bomb.flac", "text": "א", "duration_s": 2.0, "id": "short"},
        {"audio": "bomb.flac", "text": "א", "start_s": 5.0, "end_s": 6.0},
    ]
    source = manifest(tmp_path, *rows)
    told = json.loads(run_child(OPEN_TEN_HOURS, Path(source.path)))
    assert told["bad"] == dict.fromkeys("123", "lasts over 4 hours")
    assert told["clips"] == 2
    assert told["mib"] < 64


# --- 20: what a header claims ------------------------------------------------------------------


CLAIMS = """
import json, resource
from hebasr_jax.data.clips import BadClip
from hebasr_jax.data.decode import read_piece, read_sound
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
told = {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    readers = (
        lambda: read_audio(file, max_seconds=1e6),
        lambda: read_sound(file, 1.0, "x"),
        lambda: read_piece(file, 0.5, 3e5, "x"),
    )
    for reader in readers:
        try:
            told.setdefault(file.name, []).append(len(reader()))
        except (UserError, BadClip) as error:
            told.setdefault(file.name, []).append(str(error).split(":")[-1][:60] and "refused")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(told | {"mib": (peak - before) // 1024}))
"""


def test_a_header_that_claims_billions_of_samples_allocates_none_of_them(tmp_path) -> None:
    for kind in ("wav", "flac", "mp3"):
        soundfile.write(tmp_path / f"a.{kind}", tone(RATE), RATE)
    wav, flac, mp3 = ((tmp_path / f"a.{kind}").read_bytes() for kind in ("wav", "flac", "mp3"))
    (tmp_path / "wav").mkdir()
    folder = tmp_path / "wav"
    for name, size in (("30.wav", 1 << 30), ("31.wav", (1 << 31) - 2), ("32.wav", (1 << 32) - 2)):
        head = struct.pack("<I", size)
        (folder / name).write_bytes(wav[:4] + head + wav[8:40] + head + wav[44:])
    (folder / "31.flac").write_bytes(with_flac_length(flac, 1 << 31))
    frames = mp3.find(b"Info") + 8 if b"Info" in mp3 else mp3.find(b"Xing") + 8
    (folder / "31.mp3").write_bytes(mp3[:frames] + struct.pack(">I", 1 << 31) + mp3[frames + 4 :])
    told = json.loads(run_child(CLAIMS, folder))
    assert told.pop("mib") < 64
    assert told["30.wav"] == told["31.flac"] == ["refused"] * 3
    # Sizes that a writer to a pipe leaves: all that is there is read.
    assert told["31.wav"] == told["32.wav"] == [RATE, RATE, "refused"]
    assert told["31.mp3"][0] == pytest.approx(RATE, abs=1200)


def test_links_that_lead_to_themselves_end_at_once(tmp_path) -> None:
    (tmp_path / "a.wav").symlink_to("b.wav")
    (tmp_path / "b.wav").symlink_to("a.wav")
    soundfile.write(tmp_path / "c.wav", tone(RATE), RATE)
    opened = open_source(manifest(tmp_path, *({"audio": f"{n}.wav", "text": "א"} for n in "abc")))
    assert faults(opened) == dict.fromkeys("12", "no such file")
    with pytest.raises(UserError, match="no such file"):
        read_audio(tmp_path / "a.wav", max_seconds=9.0)
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "again").symlink_to(tmp_path / "sets")
    row = {"audio": [{"bytes": (tmp_path / "c.wav").read_bytes()}], "text": ["א"]}
    pq.write_table(pa.table(row), tmp_path / "sets" / "a.parquet")
    assert len(open_source(Source("s", str(tmp_path / "sets"))).clips) == 1
    for path in (tmp_path / "a.wav", tmp_path / "sets" / "again" / "no"):
        with pytest.raises(UserError):
            open_source(Source("s", str(path)))


def test_a_file_that_may_not_be_read_is_a_bad_row(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    opened = open_source(manifest(tmp_path, {"audio": "a.wav", "text": "א", "duration_s": 1}))
    (tmp_path / "a.wav").unlink()
    (tmp_path / "a.wav").mkdir()
    assert "is a folder" in reason_of(opened)


# --- 21: small files that unpack to large ones -------------------------------------------------


def test_hours_of_ogg_and_mp3_stop_at_the_row(tmp_path) -> None:
    wave = np.zeros(RATE * 60, np.float32)
    for name, subtype in (("a.ogg", "VORBIS"), ("b.ogg", "OPUS"), ("c.mp3", None)):
        kind = "OGG" if subtype else "MP3"
        with soundfile.SoundFile(tmp_path / name, "w", RATE, 1, subtype, format=kind) as sound:
            for _ in range(2):
                sound.write(wave)
    names = sorted(file.name for file in tmp_path.iterdir())
    rows = [{"audio": name, "text": "", "duration_s": 1.0} for name in names]
    opened = open_source(manifest(tmp_path, *rows))
    assert {reason_of(opened, n) for n in range(3)} == {"lasts longer than its row says"}


def test_a_text_without_an_end_is_a_bad_row(tmp_path) -> None:
    """A parquet file of 100 kB can hold gigabytes of text: one word a million times."""
    sound = io.BytesIO()
    soundfile.write(sound, tone(RATE), RATE, format="WAV")
    texts = ["א" * 250_000, "א" * 250_001, "א"]
    audio = [{"bytes": sound.getvalue()}] * 3
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"audio": audio, "text": texts}), file, compression="zstd")
    assert file.stat().st_size < 100_000
    opened = open_source(Source("s", str(file)))
    assert [len(clip.text) for clip in opened.clips] == [250_000, 1]
    assert [fault.reason for _, fault in opened.bad] == ["'text' has over 250,000 characters"]


# --- 22: mutated files -------------------------------------------------------------------------


def test_mutated_files_never_hang_or_kill_the_reader(tmp_path) -> None:
    """A few of many: `python tests/mutants.py FOLDER 10000 1` is for the night."""
    for kind in ("wav", "flac", "ogg", "mp3", "aiff", "au", "w64", "rf64"):
        soundfile.write(tmp_path / f"a.{kind}", speechlike(LENGTH_S), RATE, format=kind.upper())
    soundfile.write(tmp_path / "a.opus", speechlike(LENGTH_S), RATE, "OPUS", format="OGG")
    write_av(tmp_path / "a.m4a", "aac", RATE, speechlike(LENGTH_S))
    write_av(tmp_path / "a.webm", "libopus", 48_000, speechlike(LENGTH_S, 48_000))
    told = mutants(tmp_path, 440)
    assert all(sum(counts.values()) == 440 for counts in told["readers"].values())
    assert min(min(counts.values()) for counts in told["readers"].values()) > 40
    assert told["peak_mib"] < 600


def test_mutated_parquet_files_never_hang_or_kill_the_reader(tmp_path) -> None:
    wave = io.BytesIO()
    soundfile.write(wave, speechlike(LENGTH_S), RATE, format="FLAC")
    rows = [{"id": str(n), "text": "שלום", "audio": {"bytes": wave.getvalue()}} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    told = mutants(tmp_path, 200)
    assert sum(told["readers"]["set"].values()) == 200
    assert min(told["readers"]["set"].values()) > 0
    assert told["peak_mib"] < 3000  # a page may say that it unpacks to 2 GiB


def mutants(folder: Path, count: int) -> dict[str, Any]:
    """What tests/mutants.py tells of so many, without the kinds of reader that had nothing."""
    command = [sys.executable, ROOT / "tests" / "mutants.py", folder, str(count), "3"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    told["readers"] = {
        name: counts for name, counts in told["readers"].items() if any(counts.values())
    }
    return told


# --- 23: archives ------------------------------------------------------------------------------


def test_no_module_opens_archives() -> None:
    """There are no members to check, and nothing can be written outside."""
    opens = re.compile(r"\b(?:tarfile|zipfile|zipimport|gzip|bz2|lzma|zlib|unpack_archive)\b")
    for path in (ROOT / "hebasr_jax").rglob("*.py"):
        assert not opens.search(path.read_text(encoding="utf-8")), path


@pytest.fixture
def archives(tmp_path) -> Path:
    """Archives whose members lead outside, in a folder of their own."""
    folder = tmp_path / "deep" / "in"
    folder.mkdir(parents=True)
    soundfile.write(folder / "real.wav", tone(RATE), RATE)
    row = b'{"audio": "evil.wav", "text": "x"}\n'
    names = ("../evil.wav", str(tmp_path / "evil.wav"), "evil.wav", "evil.wav", "m.jsonl")
    with zipfile.ZipFile(folder / "a.zip", "w") as packed, tarfile.open(folder / "a.tar", "w") as t:
        for name in names:
            data = row if name == "m.jsonl" else (folder / "real.wav").read_bytes()
            if name != "evil.wav" or name not in packed.namelist():
                packed.writestr(name, data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            t.addfile(member, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "link.wav"), (tarfile.CHRTYPE, "device.wav")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            t.addfile(member)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(row * 1_000_000))
    return folder


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.jsonl.gz"])
def test_an_archive_is_neither_a_set_nor_sound(archives, name, capfd) -> None:
    before = sorted(archives.parents[1].rglob("*"))
    for path in (archives / name, (archives / name).rename(archives / f"{name}.parquet")):
        with pytest.raises(UserError) as caught:
            open_source(Source("s", str(path)))
        assert len(str(caught.value).splitlines()) <= 3
    (archives / f"{name}.parquet").rename(archives / name)
    rows = [{"audio": "real.wav", "text": "א"}, {"audio": name, "text": "א"}]
    assert faults(open_source(manifest(archives, *rows))) == {"2": "cannot be read as sound"}
    (archives / "m.jsonl").unlink()
    out = archives / "out"
    words = ("--source", str(archives / name), "--name", "s", "--out", str(out))
    assert main(["prepare", *words]) == 1
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert 1 <= len(told[told.index("error: ") :].splitlines()) <= 3
    assert sorted(archives.parents[1].rglob("*")) == before


# --- 27: weights ---------------------------------------------------------------------------------


def heads(whole: bytes) -> dict[str, bytes]:
    """Weights files whose head lies about itself or about one tensor."""
    size = int.from_bytes(whole[:8], "little")
    head, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    key = "model.audio_tower.ln_post.bias"
    told = {
        f"length {length}": length.to_bytes(8, "little") + whole[8:]
        for length in (0, 1, size - 1, len(whole), 1 << 40, (1 << 64) - 1)
    }
    for name, change in {
        "shape": {"shape": [1 << 40]},
        "overflow": {"shape": [1 << 62, 4]},
        "negative": {"shape": [-32]},
        "outside": {"data_offsets": [0, 1 << 50]},
        "reversed": {"data_offsets": [128, 0]},
        "dtype": {"dtype": "F99"},
        "wider": {"dtype": "I64"},
    }.items():
        text = json.dumps(head | {key: head[key] | change}).encode()
        told[name] = len(text).to_bytes(8, "little") + text + data
    nested = b"[" * 100_000
    return told | {
        "nested": len(nested).to_bytes(8, "little") + nested + data,
        "byte less": whole[:-1],
        "byte more": whole + b"x",
    }


def test_a_weights_file_with_a_false_head_is_refused_before_anything_is_allocated(tmp_path) -> None:
    folder = tmp_path / "model"
    write_tiny_model(folder)
    file, config = folder / "model.safetensors", read_config(folder)
    size, layout = model_config(config), layout_of(config)
    load_params(folder, size, layout)
    for name, content in heads(file.read_bytes()).items():
        file.write_bytes(content)
        with peak_anonymous() as peak, pytest.raises(UserError) as caught:
            load_params(folder, size, layout)
        assert len(str(caught.value).splitlines()) <= 3, name
        assert "cannot be read" in str(caught.value), name
        assert peak[0] < 8e6, name


# --- 24: texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_has_a_form_to_train_on_and_one_to_score(name) -> None:
    trained = normalize_hebrew(TEXTS[name])
    assert normalize_hebrew(trained) == trained
    trained.encode()
    assert trained == trained.strip()
    if name in ("empty", "points", "nothing shown"):
        assert trained == ""
    for normalize in (normalize_ivrit, normalize_tolerant):
        scored = normalize(TEXTS[name])
        assert normalize(scored) == scored


def test_odd_texts_of_a_manifest_stay_or_are_named(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    rows = [{"audio": "a.wav", "id": name, "text": text} for name, text in TEXTS.items()]
    opened = open_source(manifest(tmp_path, *rows))
    assert [clip.id for clip in opened.clips] == [name for name in TEXTS if name != "surrogate"]
    assert [fault.reason for _, fault in opened.bad] == ["'text' has half a surrogate pair"]

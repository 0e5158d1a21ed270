"""What only a real terminal shows: results must reach their file while a bar is drawn on stderr."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from reference import noise, tiny_folder
from tone_runs import write_workspace

ROOT = Path(__file__).parents[1]


def test_results_reach_their_file_while_a_bar_is_drawn(tmp_path) -> None:
    sounds = [tmp_path / f"{name}.wav" for name in "ab"]
    for sound in sounds:
        soundfile.write(sound, noise(16000), 16000)
    words = ["transcribe", str(tiny_folder()), *map(str, sounds), "--max-new-tokens", "4"]
    master, terminal = pty.openpty()
    with (tmp_path / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "hebasr_jax", *words], stdout=out, stderr=terminal, cwd=ROOT
        )
    os.close(terminal)
    shown = b""
    while part := _read(master):
        shown += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    lines = (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(sound) for sound in sounds]
    assert b"100%" in shown


@pytest.mark.parametrize("words", [("transcribe", tiny_folder(), "a.wav"), ("train", "--dry-run")])
def test_a_standard_output_that_is_full_is_told(tmp_path, words) -> None:
    soundfile.write(tmp_path / "a.wav", noise(16000), 16000)
    more = {"transcribe": ("--max-new-tokens", "4"), "train": ("--config", "config.py")}[words[0]]
    write_workspace(tmp_path)
    command = [sys.executable, "-m", "hebasr_jax", *map(str, words), *more]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 1
    *_, what, do = done.stderr.splitlines()
    assert what == "error: nothing more can be written: No space left on device"
    assert "free space" in do
    assert done.stderr.count("error") == 1


def _read(master: int) -> bytes:
    """What the process wrote to its terminal; nothing once it has gone."""
    try:
        return os.read(master, 4096)
    except OSError:
        return b""

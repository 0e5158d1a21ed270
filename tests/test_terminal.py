"""What only a real terminal shows: results must reach their file while a bar is drawn on stderr."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import soundfile
from reference import noise, tiny_folder

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


def test_a_standard_output_that_is_full_is_told_in_one_line(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(16000), 16000)
    words = ["transcribe", str(tiny_folder()), str(tmp_path / "a.wav"), "--max-new-tokens", "4"]
    command = [sys.executable, "-m", "hebasr_jax", *words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.endswith("cannot be written to standard output: No space left on device")
    assert done.stderr.count("error") == 1


def _read(master: int) -> bytes:
    """What the process wrote to its terminal; nothing once it has gone."""
    try:
        return os.read(master, 4096)
    except OSError:
        return b""

"""Bugs of the project before that no other file tests; docs/faults.md has the whole list."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_pipeline import all_batches, clip, clip_set, feed_of, rows_of, tokenizer, with_
from test_sources import manifest
from test_stamped_targets import read

from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.sources import open_source
from hebasr_jax.run_config import Source

ROOT = Path(__file__).parents[1]
RATE = 16_000


def test_a_long_clip_is_left_out_and_no_row_has_a_part_of_its_sound_or_text() -> None:
    """Bug 9: clips above 15 s were cut, and each piece kept the text of all."""
    clips = [clip(number, 5.0 if number % 3 == 0 else 2.0) for number in range(12)]
    feed = feed_of([clip_set(clips)], with_(data={"max_clip_s": 4.0}))
    assert feed.left_out == {"a": {"longer than data.max_clip_s = 4.0": 4}}
    rows = rows_of(all_batches(feed))
    heard = sorted(int(row.wave_BS[0]) - 1 for row in rows)
    assert heard == [number for number in range(12) if number % 3]
    for row in rows:
        number = int(row.wave_BS[0]) - 1
        assert row.samples_B == 2 * RATE
        assert read(row, tokenizer()).transcript.text == clips[number].text


@pytest.mark.parametrize("kind", ["pcm", "flac"])
def test_a_prepared_set_takes_no_more_room_than_its_sound(tmp_path, kind) -> None:
    """Bug 17: features of every clip on the disk, 4.5 TB. Here they are made in the step."""
    rng = np.random.default_rng(0)
    for number in range(20):
        wave = rng.uniform(-0.5, 0.5, 2 * RATE)
        soundfile.write(tmp_path / f"{number}.wav", wave, RATE)
    source = manifest(tmp_path, *({"audio": f"{n}.wav", "text": "א"} for n in range(20)))
    flags = {"source": source.path, "name": "s", "format": kind, "processes": 1}
    assert Prepare(tmp_path / "out", **flags).run() == 0
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert size < 20 * 2 * RATE * 2 + (128 << 10)  # a shard is padded to blocks of 64 KiB
    assert len(open_source(Source("s", str(tmp_path / "out" / "s"))).clips) == 20


def test_a_batch_carries_sound_and_no_features() -> None:
    """Bugs 7 and 17: features are made in the step, which masks them and not the sound."""
    [(*_, batch)] = all_batches(feed_of([clip_set([clip(0, 2.5)])], with_()))
    assert batch.wave_BS.dtype == np.int16
    assert {array.dtype.kind for array in vars(batch).values()} == {"i", "u", "b", "f"}
    assert [name for name, array in vars(batch).items() if array.dtype.kind == "f"] == ["speed_B"]


def test_nothing_asks_the_user_anything() -> None:
    """Bug 22: launchers that waited for an answer on a rented machine."""
    asks = {"input", "getpass", "confirm", "breakpoint"}
    for folder in ("hebasr_jax", "scripts", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = node.func if isinstance(node, ast.Call) else None
                named = getattr(called, "id", None) or getattr(called, "attr", None)
                assert named not in asks, f"{path}:{node.lineno}"
                assert getattr(node, "module", "") != "rich.prompt", path


def test_commands_end_without_a_standard_input(tmp_path) -> None:
    """Bug 22: none of them blocks where nobody can answer."""
    config = ROOT / "configs" / "round2_5.py"
    done = subprocess.run(
        [sys.executable, "-m", "hebasr_jax", "train", "--config", config],
        cwd=tmp_path,  # where no data lies, so that nothing is trained
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert b"error: " in done.stderr


def test_the_tests_that_docs_name_are_there() -> None:
    """A name may be cut with "...", have a parameter, or be of the file named last in its row."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    checked = 0
    for line in text.splitlines():
        file = None
        for name, test in re.findall(r"`(?:(test_\w+\.py))?(?:::(test_\w+))?[^`]*`", line):
            file = name or file
            if not file or not (name or test):
                continue
            path = ROOT / "tests" / file
            assert path.is_file(), line[:80]
            assert f"def {test}" in path.read_text(encoding="utf-8"), f"{file}::{test}"
            checked += bool(test)
    assert checked > 90

"""Shards by several processes: the bytes of one, after any kill, and no child stays behind."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from hebasr_jax.data.prepare import plan_set, prepare_set
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.sources import open_source
from hebasr_jax.data.workers import processes
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Source

RATE = 16_000
CLIPS, SHARDS = 72, 12
SHARD_MB = CLIPS * 5.0 * 2 * RATE / SHARDS / 1e6
KILLS = 3
BAD_SHARE = 0.05


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A parquet file of MP3 clips, about 5 s each, the 40th of which is no sound."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(CLIPS):
        file, seconds = io.BytesIO(), float(rng.uniform(4, 6))
        wave = rng.uniform(0.02, 0.9) * rng.uniform(-1, 1, round(seconds * RATE))
        soundfile.write(file, wave, RATE, format="MP3")
        sound = file.getvalue() if number != 40 else b"this is no sound"
        rows.append({"audio": {"bytes": sound}, "text": f"טקסט {number}", "duration_s": seconds})
    path = tmp_path_factory.mktemp("source") / "clips.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole")
    return content(prepare(source, out, processes=1))


def prepare(source: Path, out: Path, **flags) -> Path:
    """The folder of the prepared set."""
    flags = {"shard_mb": SHARD_MB, "max_bad_share": BAD_SHARE} | flags
    assert Prepare(out, source=str(source), name="clips", **flags).run() == 0
    return out / "clips"


def command(source: Path, out: Path, *flags: str) -> subprocess.Popen:
    words = ["-m", "hebasr_jax", "prepare", "--source", str(source), "--name", "clips"]
    words += [
        "--shard-mb",
        str(SHARD_MB),
        "--max-bad-share",
        str(BAD_SHARE),
        "--out",
        str(out),
        *flags,
    ]
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def children(pid: int) -> list[int]:
    """Of all its threads."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(word) for file in files for word in file.read_text().split())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(what, seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def started(source: Path, out: Path) -> subprocess.Popen:
    """The command on two processes, once a shard is in the making."""
    folder = out / "clips"
    before = {*folder.glob(".0*.partial")}  # left by one that was killed
    process = command(source, out, "--processes", "2")
    assert wait_for(lambda: {*folder.glob(".0*.partial")} - before or process.poll() is not None)
    return process


@pytest.mark.parametrize("parts", [("1/1",), ("2/2", "1/2")])
def test_any_number_of_processes_and_parts_gives_the_same_bytes(
    source, whole, tmp_path, parts
) -> None:
    assert sum(name.endswith(".arrayrecord") for name in whole) == SHARDS
    assert b"40" in whole["quarantine.jsonl"]
    for part in parts:
        made = content(prepare(source, tmp_path, processes=2, shard=part))
    lists = [made.pop(name) for name in list(made) if name.startswith("quarantine-")]
    assert made | ({"quarantine.jsonl": b"".join(lists)} if lists else {}) == whole


def test_killed_at_any_instant_the_same_command_ends_with_the_same_bytes(
    source, whole, tmp_path
) -> None:
    rng, killed = random.Random(0), 0
    for number in range(KILLS):
        process = started(source, tmp_path)
        time.sleep(rng.uniform(0, 0.15))
        if process.poll() is None:
            family = [process.pid, *children(process.pid)]
            assert len(family) > 2
            if number == 1:
                process.kill()  # the parent alone: its children are to notice
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            assert wait_for(lambda family=family: not any(map(alive, family)))
    assert killed >= 2
    assert content(prepare(source, tmp_path, processes=2)) == whole


def test_a_child_that_is_ended_and_ctrl_c_leave_nothing_half_written(
    source, whole, tmp_path
) -> None:
    folder = tmp_path / "clips"
    process = started(source, tmp_path)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    told = process.communicate(timeout=100)[1]
    assert process.returncode == 1
    assert "was ended from outside\nThe system may have run out of memory" in told
    assert "Traceback" not in told
    process = started(source, tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    told = process.communicate(timeout=100)[1]
    assert process.returncode == 130
    assert told.endswith("interrupted\n")
    assert "Traceback" not in told
    assert not [file for file in folder.iterdir() if "partial" in file.name]
    assert content(prepare(source, tmp_path, processes=1)) == whole


def test_sigterm_ends_voices_that_speak(tmp_path) -> None:
    (tmp_path / "t.txt").write_text("א\nב\n")
    voice = tmp_path / "voice.sh"
    voice.write_text(f"sleep 100 & echo $! >> {tmp_path}/pids; echo $$ >> {tmp_path}/pids; wait\n")
    words = ["--synthesize", str(tmp_path / "t.txt"), "--name", "said", "--processes", "2"]
    words += ["--out", str(tmp_path), "--voice-command", f"sh {voice} {{out}}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hebasr_jax", "prepare", *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = tmp_path / "pids"
    assert wait_for(lambda: pids.exists() and pids.read_text().count("\n") == 4)
    process.terminate()
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert told.endswith("interrupted\n")
    assert wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()), 10.0)
    assert not [*(tmp_path / "said").glob("*.lock")]


def test_a_fault_of_the_user_in_a_child_is_told_as_in_one_process(source, tmp_path) -> None:
    opened = open_source(Source("clips", str(source)))
    plan = plan_set(opened, "pcm", SHARD_MB)
    with pytest.raises(UserError, match=r"1 of 72 clips are bad"):
        prepare_set(opened, tmp_path, plan, workers=processes(2), max_bad_share=0.01)
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]

"""The original package, qwen-asr 0.0.6, runs in an environment of its own and answers by files."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def original_python() -> str:
    """The python of that environment; without it every test here fails."""
    python = os.environ.get("HEBASR_ORIGINAL_PYTHON", "")
    if not Path(python).is_file():
        pytest.fail(
            f"HEBASR_ORIGINAL_PYTHON={python!r} is not the python of an environment with "
            "qwen-asr 0.0.6; `make test-original` makes one and sets it",
            pytrace=False,
        )
    return python


@pytest.fixture(scope="session")
def run_reference(original_python) -> Callable[[Path, dict], dict]:
    """Runs run_reference.py on a job in a folder; returns its report."""

    def run(folder: Path, job: dict) -> dict:
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job, default=str), encoding="utf-8")
        script = Path(__file__).with_name("run_reference.py")
        done = subprocess.run(
            [original_python, "-W", "ignore", str(script), str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))

    return run

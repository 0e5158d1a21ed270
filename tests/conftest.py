"""Shared fixtures, and the rule that a test may skip only if tests/skips.txt says why."""

import importlib.util
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import cpu_programs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(cpu_programs.ENVIRONMENT | os.environ)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("XLA_FLAGS", cpu_programs.FLAGS)
else:  # tests start commands on the same GPUs: take memory as it is needed, as much as a run does
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes on public borders are checked in tests only.
install_import_hook("hebasr_jax", "beartype.beartype")

hypothesis.settings.register_profile("ours", deadline=None)  # the first call compiles
hypothesis.settings.load_profile("ours")

SHARED = Path(__file__).parents[2] / "shared"
_ABSENT = {
    "gpu": jax.default_backend() != "gpu",
    "shared": not (SHARED / "qwen3-asr-1.7b").is_dir(),
    "chromium": shutil.which("chromium") is None,
    "sctk": shutil.which("sctk") is None,
    "kaldialign": importlib.util.find_spec("kaldialign") is None,
}
_REASONS = {
    "gpu": "no GPU",
    "shared": "no ../shared",
    "chromium": "no chromium (a Debian package)",
    "sctk": "no sctk (a Debian package)",
    "kaldialign": "no kaldialign (of PyPI)",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, absent in _ABSENT.items():
            if absent and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=_REASONS[name]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test printed, as UTF-8: pytest-xdist ends the run over a name that is not."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--check-skips", action="store_true", help="compare with tests/skips.txt")


def pytest_terminal_summary(terminalreporter) -> None:
    """`make test` fails when the tests that skipped are not exactly those that may."""
    if not terminalreporter.config.getoption("check_skips"):
        return
    tests = {
        outcome: {report.nodeid.split("[")[0] for report in terminalreporter.stats.get(outcome, [])}
        for outcome in ("passed", "failed", "skipped")
    }
    files = {test.split("::")[0] for outcome in tests.values() for test in outcome}
    lines = (Path(__file__).parent / "skips.txt").read_text(encoding="utf-8").splitlines()
    listed = (line.split() for line in lines if line and not line.startswith("#"))
    expected = {t for why, t in listed if _ABSENT[why] and t.split("::")[0] in files}
    for test in sorted(tests["skipped"] ^ expected):
        how = "skipped, but is not" if test in tests["skipped"] else "did not skip, but is"
        terminalreporter.write_line(f"{test} {how} in tests/skips.txt for this machine")
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED

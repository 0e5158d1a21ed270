"""A stand-in for the package faster-whisper: a module of a test's own, under its name."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def installed(packages: Path, source: str, monkeypatch) -> Iterator[ModuleType]:
    """The module, as if it and ctranslate2 were installed in `packages`, until it is asked on."""
    packages.mkdir()
    (packages / "faster_whisper.py").write_text(source)
    for name in ("faster_whisper", "ctranslate2"):
        (packages / f"{name}-9.9.dist-info").mkdir()
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n"
        (packages / f"{name}-9.9.dist-info" / "METADATA").write_text(about)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.delitem(sys.modules, "faster_whisper", raising=False)
    yield importlib.import_module("faster_whisper")
    sys.modules.pop("faster_whisper", None)

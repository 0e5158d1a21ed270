"""Peak anonymous host memory of a stretch of code: what mapped files do not count towards."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system does not tell anonymous memory")


@contextlib.contextmanager
def peak_anonymous() -> Iterator[list[int]]:
    """Yields a list that holds, once the block ends, the peak growth in bytes (sampled)."""
    growth: list[int] = []
    before, peak, over = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, _anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield growth
    finally:
        over.set()
        thread.join()
        growth.append(max(peak, _anonymous_bytes()) - before)

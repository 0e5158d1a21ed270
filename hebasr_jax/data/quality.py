"""Bad clips: written down with a reason, counted, and too many of them stop the run."""

import contextlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hebasr_jax.data.clips import ClipSet
from hebasr_jax.errors import UserError


def top_reasons(reasons: Iterable[str], most: int = 3) -> str:
    """The most frequent reasons with their counts: '12 x no such file; 3 x is empty'."""
    counts = Counter(reasons)
    told = [f"{count} x {reason}" for reason, count in counts.most_common(most)]
    return "; ".join(told + ["..."] * (len(counts) > most))


class Quarantine:
    """The bad clips of a run, one JSON line each, and the limit on their number.

    Thread-safe; processes that share the file count together. Clips already in it, from before a
    resume, count as well and are not written again. Clips left out for their length are not bad
    and do not belong here.
    """

    def __init__(self, path: Path, limit_share: float, total: int) -> None:
        """A file that may exist; the share of `total` clips, bad ones included, that may be bad."""
        self._path, self._limit, self._total = path, limit_share * total, total
        self._lock = threading.Lock()
        self._reasons: dict[tuple[str, str], str] = {}
        self._read_to, self._written = 0, True
        self._read_on()

    def __len__(self) -> int:
        """Distinct bad clips."""
        return len(self._reasons)

    def add_rows(self, sets: Iterable[ClipSet]) -> None:
        """Counts the rows that were no clips when the sets were opened."""
        for clip_set in sets:
            for row, fault in clip_set.bad:
                self.add(clip_set.name, row, fault.reason, fault.detail)

    def add(
        self,
        set_name: str,
        clip_id: str,
        reason: str,
        detail: str = "",
        epoch: int | None = None,
        step: int | None = None,
        elsewhere: bool = False,
    ) -> None:
        """Puts one clip on record. Raises UserError once more clips are bad than may be.

        One that is on record elsewhere only counts.

        A file that cannot be written does not stop the run, but is told, and again at the limit.
        """
        row = {
            "set": set_name,
            "id": clip_id,
            "reason": reason,
            "detail": detail,
            "epoch": epoch,
            "step": step,
        }
        with self._lock:
            if (set_name, clip_id) not in self._reasons:
                self._read_on()
            if (set_name, clip_id) not in self._reasons:
                self._reasons[set_name, clip_id] = reason
                if not elsewhere:
                    self._append(row)
            if len(self._reasons) > self._limit:
                raise self._too_many()

    def _read_on(self) -> None:
        """Counts what other processes of the run have put into the file since the last time."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(self._read_to)
            lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._read_to += len(whole)
            rows = _rows(whole.splitlines())
            self._reasons |= {(row["set"], row["id"]): row["reason"] for row in rows}

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                # A process that was killed may have left half a line.
                file.write(line if _ends_whole(self._path) else b"\n" + line)
        except OSError as error:
            if self._written:
                print(f"{self._path} cannot be written: {error.strerror}", file=sys.stderr)
            self._written = False

    def _too_many(self) -> UserError:
        bad = len(self._reasons)
        each = f"Each is in {self._path}" if self._written else f"{self._path} cannot be written"
        return UserError(
            f"{bad} of {self._total} clips are bad, more than the {self._limit:g} that may be",
            f"{top_reasons(self._reasons.values())}. {each}.",
            "Mend the data, or raise the share of bad clips that is allowed (max_bad_share).",
        )


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Lines of a quarantine file; what a killed process left half-written is passed."""
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and {"set", "id", "reason"} <= row.keys():
                yield row


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - 1))
        return file.read() in (b"", b"\n")

"""Parquet files of the hub, read with bounded disk: texts at once, sound file by file.

A set's texts are a few thousandths of it. They are read by ranges into files that have all bytes
of the hub's at their places except the sound, which is a hole that takes no space; so whatever
reads a local copy reads them. Files with sound are whole on disk only while they are held.
"""

import contextlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hebasr_jax.data.parquet import sound_free_ranges
from hebasr_jax.data.shards import publish
from hebasr_jax.hub import HubFile, HubSplit, fetch_file, read_range

HUB_FOLDER = ".hub"
_THREADS = 16
_TAIL_BYTES = 1 << 16  # holds most footers
_MAGIC_BYTES = 8  # length of the footer, and PAR1


def text_files(split: HubSplit, audio: str, folder: Path) -> list[Path]:
    """The split's files below `folder`, without the sound of column `audio`; there, or fetched."""

    def fetch(file: HubFile) -> Path:
        path = folder / file.path
        if not path.is_file():
            partial = path.with_name(f".{path.name}.{threading.get_ident()}.partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _fill(split, file, audio, partial)
                publish(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(fetch, split.files))


def _fill(split: HubSplit, file: HubFile, audio: str, partial: Path) -> None:
    with partial.open("wb") as content:

        def copy(start: int, end: int) -> None:
            content.seek(start)
            content.write(read_range(split, file, start, end))
            content.flush()

        content.truncate(file.size)
        tail = max(0, file.size - _TAIL_BYTES)
        copy(tail, file.size)
        with partial.open("rb") as written:
            written.seek(max(0, file.size - _MAGIC_BYTES))
            footer = max(0, file.size - _MAGIC_BYTES - int.from_bytes(written.read(4), "little"))
        if footer < tail:
            copy(footer, tail)
        for start, end in sound_free_ranges(partial, audio):
            if start < tail:
                copy(start, min(end, tail))


class HeldFiles:
    """The same files with their sound: each is fetched when the first asks for it, and removed
    when the last who held it lets go. Thread-safe."""

    def __init__(self, split: HubSplit, texts: Sequence[Path], folder: Path) -> None:
        self._split, self._folder = split, folder
        self._files = dict(zip(texts, split.files, strict=True))
        self._lock = threading.Lock()
        self._held: dict[Path, tuple[int, Future[Path]]] = {}

    @contextlib.contextmanager
    def __call__(self, texts: Sequence[Path]) -> Iterator[dict[Path, Path]]:
        """From these of the files without sound to where they lie whole, while it is entered."""
        with contextlib.ExitStack() as stack:
            yield {text: stack.enter_context(self._one(text)) for text in texts}

    @contextlib.contextmanager
    def _one(self, text: Path) -> Iterator[Path]:
        with self._lock:
            count, future = self._held.get(text, (0, Future()))
            self._held[text] = count + 1, future
        try:
            if not count:
                try:
                    future.set_result(fetch_file(self._split, self._files[text], self._folder))
                except BaseException as error:
                    future.set_exception(error)
            yield future.result()
        finally:
            with self._lock:
                count, _ = self._held[text]
                if count > 1:
                    self._held[text] = count - 1, future
                else:
                    del self._held[text]
                    (self._folder / self._files[text].path).unlink(missing_ok=True)

    def size(self, texts: Sequence[Path]) -> int:
        """Bytes of these files, whole."""
        return sum(self._files[text].size for text in texts)


@contextlib.contextmanager
def held_files(
    split: HubSplit, audio: str, folder: Path, job: str
) -> Iterator[tuple[list[Path], HeldFiles]]:
    """The files of a split without sound, and how to hold them whole; both below `folder`.

    Texts are fetched once for all jobs that share the folder, and stay there. What a job of this
    name held is removed, also after a kill.
    """
    home = folder / HUB_FOLDER
    whole = home / job.replace("/", "-of-")
    shutil.rmtree(whole, ignore_errors=True)
    texts = text_files(split, audio, home / split.revision)
    try:
        yield texts, HeldFiles(split, texts, whole)
    finally:
        shutil.rmtree(whole, ignore_errors=True)

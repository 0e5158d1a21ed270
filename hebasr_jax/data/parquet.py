"""Parquet files with encoded audio in a column: the rows' texts at once, the audio when read."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hebasr_jax.data.clips import BadClip
from hebasr_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH_ROWS = 4096
_KEPT_BYTES = 256 << 20  # of row groups, so that neighbours are read once
_JOINED_BYTES = 1 << 14  # that are read for nothing rather than asking twice
_GROUP_BYTES = 2 << 30  # a row group with more audio is refused before it is allocated


def parquet_rows(file: Path, audio: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each row as a dict of those of `columns` that the file has; dots reach into structs.

    Raises UserError for what is no parquet file, and for an `audio` column without encoded sound.
    """
    import pyarrow as pa

    parquet = _open(file)
    schema = parquet.schema_arrow
    _check_audio(file, audio, schema)
    there = set(_paths(schema)) - {audio}
    here = [name for name in dict.fromkeys(columns) if name in there]
    try:
        if not here:
            yield from ({} for _ in range(parquet.metadata.num_rows))
            return
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=here, use_threads=False):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: is damaged", str(error).splitlines()[0]) from error


def column_names(file: Path) -> list[str]:
    return _open(file).schema_arrow.names


def column_paths(file: Path) -> list[str]:
    """The columns of a file, and the fields of its structs as dotted paths."""
    return list(_paths(_open(file).schema_arrow))


def sound_free_ranges(file: Path, audio: str) -> list[tuple[int, int]]:
    """Where the data of all columns but the encoded sound lie, by the footer: [start, end) bytes.

    Neighbours are joined. Of the file no more than the footer need be there.
    """
    metadata, _ = _footer(file)
    ranges: list[tuple[int, int]] = []
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        leaves = [row_group.column(leaf) for leaf in range(row_group.num_columns)]
        for leaf in leaves:
            if leaf.path_in_schema in (audio, f"{audio}.bytes"):
                continue
            offsets = (leaf.dictionary_page_offset, leaf.data_page_offset)
            start = min(offset for offset in offsets if offset is not None)
            end = start + leaf.total_compressed_size
            if ranges and 0 <= start - ranges[-1][1] <= _JOINED_BYTES:
                ranges[-1] = ranges[-1][0], end
            else:
                ranges.append((start, end))
    return ranges


def _paths(fields: "Iterable[pa.Field]", above: str = "") -> Iterator[str]:
    import pyarrow as pa

    for field in fields:
        yield f"{above}{field.name}"
        if pa.types.is_struct(field.type):
            yield from _paths(field.type, f"{above}{field.name}.")


class AudioColumn:
    """The encoded audio of parquet rows, read by row group; thread-safe.

    The groups used last are kept, up to 256 MiB. Rows drawn at random from groups larger than
    that cost a group each: sets of that kind are to be prepared (`prepare.py`) before training.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[Path, int], Future[pa.ChunkedArray]] = OrderedDict()
        self._footer = functools.lru_cache(1024)(_footer)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        """In another process it starts with nothing read."""
        return AudioColumn, (self._column,)

    def read(self, file: Path, row: int, where: str) -> memoryview:
        """The encoded bytes of one row. Raises `BadClip`."""
        import pyarrow as pa

        try:
            metadata, first_rows = self._footer(file)
            if not 0 <= row < metadata.num_rows:
                raise BadClip("no such row in the parquet file", where)
            group = int(np.searchsorted(first_rows, row, "right")) - 1
            sounds = self._group(file, group)
        except (pa.ArrowException, OSError, UserError) as error:
            told = str(error).splitlines()[0]
            raise BadClip("parquet file cannot be read", f"{where}: {told}") from error
        sound = sounds[row - int(first_rows[group])].as_buffer()
        if not sound:
            raise BadClip("has no audio bytes", where)
        return memoryview(sound)

    def _group(self, file: Path, group: int) -> "pa.ChunkedArray":
        """The audio of a row group; the first thread to ask reads it, others wait for it."""
        with self._lock:
            future = self._groups.get((file, group))
            mine = future is None
            future = future or self._groups.setdefault((file, group), Future())
            self._groups.move_to_end((file, group))
        if mine:
            try:
                future.set_result(_load(file, self._footer(file)[0], group, self._column))
            except BaseException as error:
                future.set_exception(error)
            self._forget()
        return future.result()

    def _forget(self) -> None:
        """Drops failures, and the groups not used for longest while all exceed the bound."""
        with self._lock:
            done = {key: future for key, future in self._groups.items() if future.done()}
            for key in [key for key, future in done.items() if future.exception()]:
                del self._groups[key], done[key]
            kept = sum(future.result().nbytes for future in done.values())
            for key, future in list(done.items())[:-1]:
                if kept <= _KEPT_BYTES:
                    break
                kept -= future.result().nbytes
                del self._groups[key]


def _open(file: Path) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        list(_paths(parquet.schema_arrow))  # names need not be UTF-8 in a damaged file
        return parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{file}: is no readable parquet file", why) from error


def _footer(file: Path) -> tuple["pq.FileMetaData", np.ndarray]:
    """The metadata, and the first row of each row group."""
    metadata = _open(file).metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return metadata, np.cumsum([0, *sizes[:-1]])


def _load(file: Path, metadata: "pq.FileMetaData", group: int, column: str) -> "pa.ChunkedArray":
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    # Not column by column: of a damaged footer pyarrow's `column` ends the process.
    size = metadata.row_group(group).total_byte_size
    if size > _GROUP_BYTES:
        raise UserError(f"row group {group} has {size / 2**30:.1f} GiB: write smaller ones")
    with pq.ParquetFile(file, metadata=metadata) as parquet:
        names = [column, f"{column}.bytes"]
        table = parquet.read_row_group(group, columns=names, use_threads=False)
    sounds = table.column(column)
    return pc.struct_field(sounds, "bytes") if sounds.type.num_fields else sounds


def _check_audio(file: Path, column: str, schema: "pa.Schema") -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise no_column(file, "audio", column, schema.names)
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"{file}: its column {column!r} holds {kind}, not encoded audio",
            "It must hold bytes, or a struct with a field `bytes`.",
            "Set columns.audio of the set to the column that does.",
        )


def no_column(file: Path, field: str, column: str, names: Sequence[str]) -> UserError:
    return UserError(
        f"{file}: has no column {column!r} for the {field}",
        f"Its columns are {', '.join(names)}.",
        f"Set columns.{field} of the set to one of them.",
    )

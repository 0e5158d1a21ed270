"""One safetensors file, written while a single tensor is held in memory."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.errors import UserError

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # stored name -> numpy's
_NAMES = {name: stored for stored, name in DTYPES.items()}


def write_tensors(
    path: Path, tensors: list[tuple[str, tuple[int, ...], np.dtype]], arrays: Iterable[np.ndarray]
) -> int:
    """Writes one file while holding one tensor; `safetensors.save_file` needs them all at once.

    The format: length of the header (8 bytes, little-endian), JSON header, data. The data is
    cast to the listed dtypes. Returns the bytes of data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape, dtype in tensors:
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[key] = {
            "dtype": _NAMES[dtype.name],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, _, dtype), array in zip(tensors, arrays, strict=True):
            file.write(_cast(key, array, dtype).reshape(-1).view(np.uint8).data)
    return end


def _cast(key: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous array of the dtype; float16 that cannot hold a value is refused."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=dtype)
    if dtype == np.float16 and array.dtype != dtype and not np.isfinite(cast).all():
        raise UserError(f"{key} does not fit into float16", do="store bfloat16 or float32")
    return cast

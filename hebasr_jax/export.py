"""A whole model folder written at once: weights, config and tokenizer files, in either layout."""

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hebasr_jax.config import Layout, ModelConfig, layout_of, read_config
from hebasr_jax.errors import UserError
from hebasr_jax.layout import (
    WORD_RULE_VERSION,
    write_json,
    write_original_tokenizer,
    write_settings,
    write_transformers_tokenizer,
)
from hebasr_jax.model.asr import Params
from hebasr_jax.text import load_tokenizer
from hebasr_jax.timestamps import add_stamp_tokens
from hebasr_jax.weights import save_params

_COPIED = (".json", ".txt", ".jinja")


def write_model(
    params: Params,
    config: ModelConfig,
    source: Path,
    destination: Path,
    layout: Layout,
    *,
    dtype: Any = None,
    shard_bytes: int | None = None,
    stamps: bool = False,
) -> None:
    """Writes a complete model folder, or nothing.

    Args:
      source: the model folder whose tokenizer and config files go along: copied when it has the
        same layout, else written anew from their content.
      destination: a folder that does not exist or is empty.
      dtype: of the stored weights; None keeps the tree's.
      shard_bytes: split the weights into shards of at most this size; None writes one file.
      stamps: add the time-stamp tokens to the tokenizer (their embedding rows exist already).

    Raises:
      UserError: the destination is taken, or the disk refuses.
    """
    stored = np.dtype(dtype or params["decoder"]["embed"]["embedding"].dtype).name
    source_json = read_config(source)
    with new_folder(destination) as folder:
        if layout_of(source_json) == layout:
            _copy_files(source, source_json, folder, stored)
        else:
            tokenizer = load_tokenizer(source)
            write_settings(folder, config, tokenizer, layout, stored, source=source)
            write_tokenizer = (
                write_original_tokenizer if layout == "original" else write_transformers_tokenizer
            )
            write_tokenizer(source, folder)
        if stamps:
            add_stamp_tokens(folder, config.decoder.vocab_size)
        save_params(params, config, layout, folder, dtype=dtype, shard_bytes=shard_bytes)


def refuse_taken(destination: Path) -> None:
    """Refuses a destination that holds anything, or whose name would keep it from being loaded."""
    try:
        str(destination).encode()
    except UnicodeEncodeError:
        why = "its name is not UTF-8, and tokenizers opens no other"
        raise UserError(f"{destination} cannot hold a model", why, "name another folder") from None
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} exists", "nothing is overwritten", "name a new folder")


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name once all in it is on disk."""
    refuse_taken(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{destination.name}.partial-"
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    except OSError as error:
        raise _unwritable(destination, error) from None
    try:
        yield partial
        partial.chmod(0o755)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(destination)
        _sync(destination.parent)
    except OSError as error:
        raise _unwritable(destination, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(destination: Path, error: OSError) -> UserError:
    why, do = str(error), "free space or name another place"
    return UserError(f"{destination} cannot be written", why, do)


def _copy_files(source: Path, source_json: dict[str, Any], folder: Path, dtype: str) -> None:
    """Copies config and tokenizer files; config.json changes where it would be untrue."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _COPIED and "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    changed = copy.deepcopy(source_json)
    for section in (changed, changed.get("thinker_config", {})):
        for name in {"dtype", "torch_dtype"} & section.keys():
            section[name] = dtype
    if layout_of(changed) == "original":
        changed["transformers_version"] = WORD_RULE_VERSION
    if changed != source_json:
        write_json(folder / "config.json", changed)


def _sync(path: Path) -> None:
    """Forces a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

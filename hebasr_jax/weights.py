"""Hugging Face safetensors <-> parameter tree, in both layouts, by one table.

Each row of TABLE names a parameter, its tensor in the transformers layout, and an einops pattern
from the torch tensor to ours; the pattern read backwards is the export. `{n}` counts layers: our
side stacks them on a leading axis. The original layout's names follow by `original_key`.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange

from hebasr_jax.config import Layout, ModelConfig
from hebasr_jax.errors import UserError
from hebasr_jax.model.asr import Params, abstract_params
from hebasr_jax.paths import flat, nested
from hebasr_jax.tensor_file import DTYPES, write_tensors

_CONV = "o i mel time -> time mel i o"  # torch sees [mel, time] images, we [time, mel]
_FLAT = "o (c mel) -> (mel c) o"  # torch flattens the stem's output channel-major, we bin-major
_DENSE = "o i -> i o"
_SAME = "... -> ..."


def _rows(ours: str, theirs: str, *rows: tuple[str, str, str]) -> Iterator[tuple[str, str, str]]:
    return ((ours + path, theirs + key, pattern) for path, key, pattern in rows)


TABLE: tuple[tuple[str, str, str], ...] = (
    *_rows(
        "encoder/",
        "model.audio_tower.",
        ("conv1/kernel", "conv2d1.weight", _CONV),
        ("conv1/bias", "conv2d1.bias", _SAME),
        ("conv2/kernel", "conv2d2.weight", _CONV),
        ("conv2/bias", "conv2d2.bias", _SAME),
        ("conv3/kernel", "conv2d3.weight", _CONV),
        ("conv3/bias", "conv2d3.bias", _SAME),
        ("conv_out/kernel", "conv_out.weight", _FLAT),
        ("norm/scale", "ln_post.weight", _SAME),
        ("norm/bias", "ln_post.bias", _SAME),
    ),
    *_rows(
        "encoder/layers/",
        "model.audio_tower.layers.{n}.",
        ("attention_norm/scale", "self_attn_layer_norm.weight", _SAME),
        ("attention_norm/bias", "self_attn_layer_norm.bias", _SAME),
        ("query/kernel", "self_attn.q_proj.weight", _DENSE),
        ("query/bias", "self_attn.q_proj.bias", _SAME),
        ("key/kernel", "self_attn.k_proj.weight", _DENSE),
        ("key/bias", "self_attn.k_proj.bias", _SAME),
        ("value/kernel", "self_attn.v_proj.weight", _DENSE),
        ("value/bias", "self_attn.v_proj.bias", _SAME),
        ("out/kernel", "self_attn.out_proj.weight", _DENSE),
        ("out/bias", "self_attn.out_proj.bias", _SAME),
        ("mlp_norm/scale", "final_layer_norm.weight", _SAME),
        ("mlp_norm/bias", "final_layer_norm.bias", _SAME),
        ("up/kernel", "fc1.weight", _DENSE),
        ("up/bias", "fc1.bias", _SAME),
        ("down/kernel", "fc2.weight", _DENSE),
        ("down/bias", "fc2.bias", _SAME),
    ),
    *_rows(
        "projector/",
        "model.multi_modal_projector.",
        ("hidden/kernel", "linear_1.weight", _DENSE),
        ("hidden/bias", "linear_1.bias", _SAME),
        ("out/kernel", "linear_2.weight", _DENSE),
        ("out/bias", "linear_2.bias", _SAME),
    ),
    *_rows(
        "decoder/",
        "model.language_model.",
        ("embed/embedding", "embed_tokens.weight", _SAME),  # input and output: the head is tied
        ("norm/scale", "norm.weight", _SAME),
    ),
    *_rows(
        "decoder/layers/",
        "model.language_model.layers.{n}.",
        ("attention_norm/scale", "input_layernorm.weight", _SAME),
        ("query/kernel", "self_attn.q_proj.weight", _DENSE),
        ("key/kernel", "self_attn.k_proj.weight", _DENSE),
        ("value/kernel", "self_attn.v_proj.weight", _DENSE),
        ("query_norm/scale", "self_attn.q_norm.weight", _SAME),
        ("key_norm/scale", "self_attn.k_norm.weight", _SAME),
        ("out/kernel", "self_attn.o_proj.weight", _DENSE),
        ("mlp_norm/scale", "post_attention_layernorm.weight", _SAME),
        ("gate/kernel", "mlp.gate_proj.weight", _DENSE),
        ("up/kernel", "mlp.up_proj.weight", _DENSE),
        ("down/kernel", "mlp.down_proj.weight", _DENSE),
    ),
)
_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_ROWS = 8192  # rows of the head compared at a time


def original_key(key: str) -> str:
    """The name that the original layout (qwen-asr, vLLM) gives a transformers tensor."""
    key = key.replace("model.multi_modal_projector.linear_", "model.audio_tower.proj")
    for ours, theirs in (
        ("model.language_model.", "thinker.model."),
        ("model.", "thinker."),
        ("lm_head.", "thinker.lm_head."),
    ):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    raise KeyError(key)


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its names, its place in the tree and the way there."""

    key: str  # in the layout asked for
    path: str  # "decoder/layers/up/kernel"
    layer: int | None  # index into the stacked leaf
    pattern: str
    shape: tuple[int, ...]  # as stored

    def to_ours(self, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
        return rearrange(tensor, self.pattern, **_axes(self.pattern, config))

    def to_theirs(self, leaf: Any, config: ModelConfig) -> np.ndarray:
        array = np.asarray(leaf if self.layer is None else leaf[self.layer])
        return rearrange(array, _reversed(self.pattern), **_axes(self.pattern, config))


def entries(config: ModelConfig, layout: Layout) -> list[Entry]:
    """Every tensor of a model, in table order; each parameter has exactly one row of TABLE."""
    shapes = {path: leaf.shape for path, leaf in flat(abstract_params(config)).items()}
    rows = [path for path, _, _ in TABLE]
    if sorted(rows) != sorted(shapes):
        odd = set(rows) ^ set(shapes) or {path for path in rows if rows.count(path) > 1}
        raise AssertionError(f"TABLE and the model differ: {sorted(odd)}")
    found = []
    for path, key, pattern in TABLE:
        stacked = "{n}" in key
        shape = shapes[path][1:] if stacked else shapes[path]
        # A zero-stride array gives the stored shape without memory.
        probe = np.broadcast_to(np.zeros((), np.int8), shape)
        stored = rearrange(probe, _reversed(pattern), **_axes(pattern, config)).shape
        for n in range(shapes[path][0]) if stacked else (None,):
            name = key.format(n=n)
            name = original_key(name) if layout == "original" else name
            found.append(Entry(name, path, n, pattern, stored))
    return found


def load_params(
    folder: Path,
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: Any = None,
    place: Callable[[np.ndarray], Any] = jax.device_put,
) -> Params:
    """Reads a folder's safetensors into a parameter tree.

    Args:
      folder: holds model.safetensors, or shards with model.safetensors.index.json.
      config, layout: from its config.json; every tensor must fit them.
      dtype: of the result; None keeps what is stored.
      place: puts a host array on a device. Leaves are placed one at a time, so host memory
        stays at the placed tree plus one stacked leaf.

    Raises:
      UserError: tensors missing, surplus, misshapen or of a dtype that is no float; a stored head
        unlike the embeddings; damaged or absent files.
    """
    with _open_tensors(folder) as tensors:
        wanted = entries(config, layout)
        _check(folder, tensors, wanted, layout)
        leaves: dict[str, list[Entry]] = {}
        for entry in wanted:
            leaves.setdefault(entry.path, []).append(entry)
        leaves_by_path = {
            path: jax.block_until_ready(place(_read_leaf(tensors, stored, config, dtype)))
            for path, stored in leaves.items()
        }
    return nested(leaves_by_path)


def save_params(
    params: Params,
    config: ModelConfig,
    layout: Layout,
    folder: Path,
    *,
    dtype: Any = None,
    shard_bytes: int | None = None,
) -> None:
    """Writes a tree's safetensors into `folder`, one tensor at a time: one file, or shards.

    Args:
      dtype: to store; None keeps each leaf's own.
      shard_bytes: start a new shard before this many bytes; None writes one file.
    """
    by_path = flat(params)
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries(config, layout):
        size = int(np.prod(entry.shape)) * np.dtype(dtype or by_path[entry.path].dtype).itemsize
        if shard_bytes and shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    total = 0
    for name, shard in zip(names, shards, strict=True):
        tensors = ((e.key, e.shape, np.dtype(dtype or by_path[e.path].dtype)) for e in shard)
        arrays = (e.to_theirs(by_path[e.path], config) for e in shard)
        total += write_tensors(folder / name, list(tensors), arrays)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {e.key: n for n, s in zip(names, shards, strict=True) for e in s},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


@contextlib.contextmanager
def _open_tensors(folder: Path) -> Iterator[dict[str, tuple[Any, str]]]:
    """Every stored tensor's name -> (open file, name); nothing is read before it is asked for."""
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as stack:
        tensors: dict[str, tuple[Any, str]] = {}
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{path} cannot be read",
                    f"it is damaged or cut short: {error}",
                    "fetch it again",
                ) from None
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if key in tensors:
                    raise UserError(f"{folder} stores {key} twice", do="fetch the model again")
                tensors[key] = (file, key)
        yield tensors


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if (folder / "model.safetensors").exists():
            return [folder / "model.safetensors"]
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        why = f"{others[0]} may be a pickle, which can run code" if others else "nothing to read"
        raise UserError(
            f"{folder} has no model.safetensors", why, "save the model with safetensors"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        foreign = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} cannot be read", str(error), "fetch it again") from None
    if foreign:
        raise UserError(f"{index} names {foreign[0]!r}", "only files beside it may be named")
    absent = [n for n in names if not (folder / n).exists()]
    if absent:
        raise UserError(f"{folder} lacks {', '.join(absent)}", do="fetch the missing files")
    return [folder / name for name in names]


def _check(folder: Path, tensors: dict[str, Any], wanted: list[Entry], layout: Layout) -> None:
    """Refuses tensors that do not fit the config, naming them, before any is read."""
    head, embedding = (original_key(k) if layout == "original" else k for k in (_HEAD, _EMBEDDING))
    shapes = {e.key: e.shape for e in wanted}
    stored = {k: file.get_slice(name) for k, (file, name) in tensors.items() if k != head}
    faults = {
        "missing": [k for k in shapes if k not in stored],
        "surplus": [k for k in stored if k not in shapes],
        "misshapen": [
            f"{k} {tuple(s.get_shape())} for {shapes[k]}"
            for k, s in stored.items()
            if k in shapes and tuple(s.get_shape()) != shapes[k]
        ],
        "of another dtype": [
            f"{k} {s.get_dtype()}" for k, s in stored.items() if s.get_dtype() not in DTYPES
        ],
    }
    first = {e.path: stored[e.key].get_dtype() for e in reversed(wanted) if e.key in stored}
    faults["unlike the same tensor of layer 0"] = [
        f"{e.key} {stored[e.key].get_dtype()}, not {first[e.path]}"
        for e in wanted
        if e.key in stored and stored[e.key].get_dtype() != first[e.path]
    ]
    if any(faults.values()):
        why = "; ".join(f"{len(v)} {k}: {_some(v)}" for k, v in faults.items() if v)
        raise UserError(
            f"the tensors of {folder} do not fit its config.json ({layout} layout)",
            why,
            "use config.json and weights of one and the same model",
        )
    if head in tensors and not _equal(tensors[head], tensors[embedding]):
        raise UserError(
            f"{head} differs from {embedding} in {folder}",
            "Qwen3-ASR ties its output head to the embeddings; this head is stale or untied",
            f"delete {head} from the file if the embeddings are the trained ones",
        )


def _equal(a: tuple[Any, str], b: tuple[Any, str]) -> bool:
    """Bitwise equality of two stored matrices, block by block."""
    first, second = a[0].get_slice(a[1]), b[0].get_slice(b[1])
    if first.get_shape() != second.get_shape() or first.get_dtype() != second.get_dtype():
        return False
    total = first.get_shape()[0]
    blocks = (slice(i, min(i + _ROWS, total)) for i in range(0, total, _ROWS))
    return all(first[block].tobytes() == second[block].tobytes() for block in blocks)


def _read_leaf(
    tensors: dict[str, tuple[Any, str]], stored: list[Entry], config: ModelConfig, dtype: Any
) -> np.ndarray:
    """One leaf of the tree, stacked over layers if the table says so."""

    def read(entry: Entry) -> np.ndarray:
        file, key = tensors[entry.key]
        return entry.to_ours(file.get_tensor(key), config)

    if stored[0].layer is None:
        return np.ascontiguousarray(read(stored[0]), dtype=dtype)
    first = read(stored[0])
    leaf = np.empty((len(stored), *first.shape), dtype or first.dtype)
    leaf[0] = first
    for entry in stored[1:]:
        leaf[entry.layer] = read(entry)
    return leaf


def _axes(pattern: str, config: ModelConfig) -> dict[str, int]:
    return {"mel": config.encoder.conv_bins} if pattern == _FLAT else {}


def _reversed(pattern: str) -> str:
    return " -> ".join(reversed(pattern.split(" -> ")))


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""Rung 7: weights in and out, in both layouts, bit for bit; what does not fit is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from memory import peak_anonymous
from reference import load_ours, load_torch, tiny_folder
from safetensors.numpy import load_file, save_file
from sizes import LARGE, SMALL

from hebasr_jax.config import model_config, read_config
from hebasr_jax.errors import UserError
from hebasr_jax.model.asr import abstract_params
from hebasr_jax.tiny import TINY
from hebasr_jax.weights import TABLE, entries, load_params, original_key, save_params

SHARED = Path(__file__).parents[2] / "shared"


def _count(config, prefix: str = "") -> int:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return sum(
        leaf.size
        for path, leaf in leaves
        if jax.tree_util.keystr(path, simple=True, separator="/").startswith(prefix)
    )


@pytest.mark.parametrize(
    ("config", "total", "audio", "embedding", "tensors"),
    [
        (LARGE, 2_038_052_480, 317_477_504, 311_164_928, 707),
        (SMALL, 782_426_112, 186_376_192, 155_582_464, 611),
    ],
)
def test_released_sizes(config, total, audio, embedding, tensors) -> None:
    """Parameter and tensor counts of the real models (708 and 612 stored, with the tied head)."""
    assert _count(config) == total
    assert _count(config, "encoder") + _count(config, "projector") == audio
    assert _count(config, "decoder/embed") == embedding
    for layout in ("original", "transformers"):
        assert len({entry.key for entry in entries(config, layout)}) == tensors


@pytest.mark.shared
def test_the_real_config_gives_the_released_size() -> None:
    assert model_config(read_config(SHARED / "qwen3-asr-1.7b")) == LARGE


def test_stored_shapes_are_torchs() -> None:
    """The oddest ones: q_proj of the 0.6B, whose heads are wider than the model."""
    shapes = {entry.key: entry.shape for entry in entries(SMALL, "transformers")}
    layer = "model.language_model.layers.27.self_attn"
    assert shapes[f"{layer}.q_proj.weight"] == (2048, 1024)
    assert shapes[f"{layer}.o_proj.weight"] == (1024, 2048)
    assert shapes[f"{layer}.k_norm.weight"] == (128,)
    assert shapes["model.audio_tower.conv_out.weight"] == (896, 7680)
    assert shapes["model.audio_tower.conv2d1.weight"] == (480, 1, 3, 3)


def test_every_parameter_has_one_row_and_one_name() -> None:
    assert len({path for path, _, _ in TABLE}) == len(TABLE)
    assert len({key for _, key, _ in TABLE}) == len(TABLE)
    assert original_key("model.multi_modal_projector.linear_1.bias") == (
        "thinker.audio_tower.proj1.bias"
    )
    assert original_key("model.language_model.norm.weight") == "thinker.model.norm.weight"
    assert (
        original_key("model.audio_tower.conv_out.weight") == "thinker.audio_tower.conv_out.weight"
    )
    assert original_key("lm_head.weight") == "thinker.lm_head.weight"


def test_an_uncovered_parameter_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr("hebasr_jax.weights.TABLE", TABLE[:-1])
    with pytest.raises(AssertionError, match="decoder/layers/down/kernel"):
        entries(TINY, "transformers")


def test_the_import_uses_every_torch_parameter() -> None:
    names = {name for name, _ in load_torch(tiny_folder()).named_parameters()}
    assert names == {entry.key for entry in entries(TINY, "transformers")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [None, 30_000])
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_export_then_import_is_bit_identical(tmp_path, layout, dtype, shard_bytes) -> None:
    params, config = load_ours(tiny_folder())
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    save_params(params, config, layout, tmp_path, shard_bytes=shard_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 5 if shard_bytes else len(files) == 1
    again = load_params(tmp_path, config, layout)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_export_equals_what_the_reference_saved(tmp_path) -> None:
    """Tensor for tensor and byte for byte, metadata included."""
    from safetensors import safe_open

    params, config = load_ours(tiny_folder())
    save_params(params, config, "transformers", tmp_path)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (tiny_folder(), tmp_path))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.tobytes() == ours[key].tobytes(), key
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_weights_come_in_the_dtype_asked_for(tmp_path) -> None:
    params, config = load_ours(tiny_folder())
    half = load_params(tiny_folder(), config, "transformers", dtype=jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(half), strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(a).astype(ml_dtypes.bfloat16), np.asarray(b))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_folder(), tmp_path / "model"))


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _refused(folder: Path, *words: str, config=TINY, layout="transformers") -> None:
    with pytest.raises(UserError) as error:
        load_params(folder, config, layout)
    message = str(error.value)
    assert len(message.splitlines()) <= 3
    for word in words:
        assert word in message, message


KEY = "model.audio_tower.layers.1.fc1.bias"
EMBEDDING = "model.language_model.embed_tokens.weight"


def test_missing_surplus_misshapen_tensors_are_named(folder) -> None:
    def change(tensors):
        del tensors[KEY]
        tensors["model.audio_tower.extra"] = np.zeros(3, np.float32)
        tensors["model.audio_tower.ln_post.bias"] = np.zeros(31, np.float32)

    _edit(folder, change)
    _refused(folder, "1 missing", KEY, "1 surplus", "extra", "misshapen", "ln_post.bias (31,)")


def test_tensors_of_another_dtype_are_refused(folder) -> None:
    def change(tensors):
        tensors[KEY] = tensors[KEY].astype(np.int8)

    _edit(folder, change)
    _refused(folder, KEY, "I8")


def test_layers_of_one_stack_share_a_dtype(folder) -> None:
    """Stacking them would round the wider ones silently."""

    def change(tensors):
        key = "model.language_model.layers.0.self_attn.q_proj.weight"
        tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)

    _edit(folder, change)
    _refused(folder, "layers.1.self_attn.q_proj.weight F32, not BF16")


def test_float16_that_cannot_hold_a_value_is_refused(tmp_path) -> None:
    params, config = load_ours(tiny_folder())
    params["encoder"]["norm"]["scale"] = params["encoder"]["norm"]["scale"].at[0].set(1e5)
    with pytest.raises(UserError, match=r"ln_post\.weight does not fit into float16"):
        save_params(params, config, "transformers", tmp_path, dtype=np.dtype("float16"))


def test_config_of_another_size_is_refused(folder) -> None:
    wider = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, mlp_width=128))
    _refused(folder, "misshapen", "gate_proj", config=wider)
    deeper = dataclasses.replace(TINY, encoder=dataclasses.replace(TINY.encoder, layers=3))
    _refused(folder, "missing", "audio_tower.layers.2", config=deeper)


def test_the_other_layout_is_refused(folder) -> None:
    _refused(folder, "original layout", "missing", "surplus", layout="original")


def test_a_tied_head_may_be_stored_and_a_stale_one_may_not(folder, monkeypatch) -> None:
    def tie(tensors):
        tensors["lm_head.weight"] = tensors[EMBEDDING].copy()

    def stale(tensors):
        tensors["lm_head.weight"][-1, -1] += 1e-3

    monkeypatch.setattr("hebasr_jax.weights._ROWS", 64)  # several blocks, the last one partial

    _edit(folder, tie)
    load_params(folder, TINY, "transformers")
    _edit(folder, stale)
    _refused(folder, "lm_head.weight differs from", EMBEDDING)


def test_damaged_files_are_refused(folder) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff" * 64, b"not a safetensors file"):
        path.write_bytes(broken)
        _refused(folder, "model.safetensors cannot be read")


def test_shards_are_found_by_their_index_only(tmp_path) -> None:
    params, config = load_ours(tiny_folder())
    save_params(params, config, "transformers", tmp_path, shard_bytes=100_000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = content["weight_map"][KEY]
    moved = (tmp_path / name).rename(tmp_path / "elsewhere.safetensors")
    _refused(tmp_path, name)
    moved.rename(tmp_path / name)
    for bad in ("../outside.safetensors", "/etc/passwd", "model.bin"):
        content["weight_map"][KEY] = bad
        index.write_text(json.dumps(content))
        _refused(tmp_path, bad)
    index.write_text('{"weight_map": ')
    _refused(tmp_path, "index.json cannot be read")


def test_a_tensor_in_two_shards_is_refused(tmp_path) -> None:
    params, config = load_ours(tiny_folder())
    save_params(params, config, "transformers", tmp_path, shard_bytes=100_000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    extra = dict(list(load_file(first).items())[:1])
    save_file({**load_file(second), **extra}, second)
    _refused(tmp_path, "twice", next(iter(extra)))


def test_shards_keep_their_limit_and_their_sum(tmp_path) -> None:
    params, config = load_ours(tiny_folder())
    save_params(params, config, "original", tmp_path, shard_bytes=100_000)
    shards = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 100_000
    assert len(sizes) < 2 * sum(sizes) / 100_000 + 1


def test_pickles_are_refused(folder) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _refused(folder, "pytorch_model.bin may be a pickle")


def test_reading_and_writing_hold_little_more_than_the_tree(tmp_path) -> None:
    """Reading: the tree, one stacked leaf, 0.5 GB. Writing: one tensor. At 0.4 GB of weights."""
    size = dataclasses.replace(TINY.decoder, vocab_size=65536, width=512, layers=24, mlp_width=2048)
    config = dataclasses.replace(TINY, decoder=size)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract_params(config))
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    assert sum(sizes) > 4e8
    with peak_anonymous() as writing:
        save_params(params, config, "original", tmp_path)
    assert writing[0] < 0.25e9
    with peak_anonymous() as reading:
        again = load_params(tmp_path, config, "original")
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert reading[0] < sum(sizes) + max(sizes) + 0.1e9

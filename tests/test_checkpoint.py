"""Checkpoints: the same bits back, or a loud word; never a part, never another run's."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hebasr_jax import checkpoint
from hebasr_jax.checkpoint import CheckpointStore, figures_of, find_fault, kept, load
from hebasr_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def _store(run: Path, told: list[str] | None = None, keep_last: int = 9, keep_best: int = 0):
    told = [] if told is None else told
    return CheckpointStore(run, keep_last=keep_last, keep_best=keep_best, warn=told.append)


def _like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _state(value: float):
    return {"params": {"kernel": jnp.full((64, 33), value, jnp.float32)}, "step": jnp.int32(value)}


def _state_like(facts=None):
    return _like(_state(0))


def _saved(run: Path, *steps: int) -> None:
    with _store(run) as store:
        for step in steps:
            store.save(step, _state(step), {"data": {"epoch": 0, "batch": step}})
        store.wait()


def _bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_every_bit_comes_back_though_the_arrays_are_donated_meanwhile(tmp_path) -> None:
    odd = np.array(
        [0x7FC12345, 0x80000000, 0x7F800000, 0x00000001], np.uint32
    )  # NaN, -0, inf, tiny
    params = {
        "a": jnp.asarray(odd.view(np.float32)),
        "b": {"c": jnp.arange(2 << 20, dtype=jnp.bfloat16)},
    }
    labels = {"a": "frozen", "b": "trained"}
    parts = {"frozen": optax.set_to_zero(), "trained": optax.adam(1e-3)}
    inner = optax.chain(optax.clip(1.0), optax.multi_transform(parts, labels))
    Train = namedtuple("Train", "params moments words count")
    state = Train(params, inner.init(params), jnp.arange(7, dtype=jnp.uint32), jnp.int32(-3))
    state = jax.tree.map(jnp.copy, state)
    want, like, structure = _bits(state), _like(state), jax.tree.structure(state)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with _store(tmp_path) as store:
        store.save(3, state, {"data": {"epoch": 1, "batch": 2}})
        for _ in range(20):
            state = bump(state)
        store.wait()
        back = store.restore(lambda _: like)
    assert back.step == 3
    assert back.facts == {"step": 3, "data": {"epoch": 1, "batch": 2}}
    assert jax.tree.structure(back.state) == structure
    assert _bits(back.state) == want
    assert _bits(state) != want


def _child(code: str, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


_DEVICES = """
import sys, pathlib, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from hebasr_jax.checkpoint import CheckpointStore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

def placed(array, devices):
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(None, "data")))

want = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
store = CheckpointStore(pathlib.Path(sys.argv[1]), keep_last=1, keep_best=0, warn=print)
store.save(1, {"w": placed(want, 4)}, {})
store.wait()
for devices in (4, 2, 1):
    to = placed(want, devices).sharding
    like = {"w": jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=to)}
    back = store.restore(lambda _: like).state["w"]
    assert back.sharding == to and len(back.sharding.device_set) == devices
    assert np.array_equal(np.asarray(back), want)
print("equal")
"""


def test_a_state_moves_to_another_number_of_devices(tmp_path) -> None:
    assert _child(_DEVICES, tmp_path).communicate(timeout=120)[0] == "equal\n"


_HOSTS = """
import sys, pathlib, jax, numpy as np
run, process, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, process)
from hebasr_jax.checkpoint import CheckpointStore
from jax.sharding import Mesh, NamedSharding, PartitionSpec
to = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec("data"))
want = np.arange(8, dtype=np.float32)
state = {"w": jax.make_array_from_callback((8,), to, lambda index: want[index])}
told = []
with CheckpointStore(run, keep_last=2, keep_best=0, warn=told.append) as store:
    for step in (1, 2, 3):
        store.save(step, state, {})
    store.wait()
    (run / "checkpoints" / "3" / "facts.json").unlink(missing_ok=True)
    back = store.restore(lambda _: {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=to)})
for shard in back.state["w"].addressable_shards:
    assert np.array_equal(shard.data, want[shard.index])
print(back.step, len(told))
"""


def test_two_hosts_save_together_and_restore_the_same_step(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = [_child(_HOSTS, tmp_path, process, port) for process in (0, 1)]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [output.splitlines()[-1] for output in outputs] == [
        "2 1",
        "2 0",
    ]  # the first host alone tells of the damage
    assert (tmp_path / "checkpoints" / "3.damaged").is_dir()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def _largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *[(name, damage) for name in ("arrays", "facts.json") for damage in (_flip, _truncate)],
        *[("manifest.json", damage) for damage in (Path.unlink, _truncate)],
        ("arrays", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_named_kept_and_passed_over(tmp_path, name, damage) -> None:
    _saved(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "2"
    path = _largest(folder) if name == "arrays" else folder / name
    damage(path)
    told: list[str] = []
    with _store(tmp_path, told) as store:
        back = store.restore(_state_like)
        assert back.step == 1
        assert _bits(back.state) == _bits(_state(1))
        assert len(told) == 1
        assert path.name in told[0]
        if name == "arrays" and damage is _truncate:
            assert "bytes instead of" in told[0]  # seen before anything is hashed
        assert (tmp_path / "checkpoints" / "2.damaged").is_dir()
        store.save(2, _state(2), {})
        store.wait()
        assert store.restore(_state_like).step == 2


def test_when_all_are_damaged_nothing_starts_afresh(tmp_path) -> None:
    _saved(tmp_path, 1)
    _flip(_largest(tmp_path / "checkpoints" / "1"))
    for _ in range(2):  # the second time there are only those set aside
        with _store(tmp_path) as store, pytest.raises(UserError, match="no checkpoint in"):
            store.restore(_state_like)


def test_a_run_without_a_finished_checkpoint_has_none(tmp_path) -> None:
    interrupted = tmp_path / "checkpoints" / "5.partial.orbax-checkpoint-tmp"
    interrupted.mkdir(parents=True)
    with _store(tmp_path) as store:
        assert store.restore(_state_like) is None
    assert not interrupted.exists()


def test_the_checkpoint_of_another_model_is_refused_in_three_lines(tmp_path) -> None:
    _saved(tmp_path, 1)
    other = _like({"params": {"kernel": jnp.zeros((64, 34))}, "step": jnp.int32(0)})
    with _store(tmp_path) as store, pytest.raises(UserError) as caught:
        store.restore(lambda _: other)
    what, why, _ = str(caught.value).splitlines()
    assert "another model" in what
    assert why.startswith("params/kernel: float32[64, 33] there, float32[64, 34] here (1 of 2")
    with _store(tmp_path) as store, pytest.raises(UserError, match=r"step: int32.* there, absent"):
        store.restore(lambda _: {"params": _state_like()["params"]})
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_moments_alone_may_be_kept_as_another_kind_of_float(tmp_path) -> None:
    state = {"moments": {"mu": jnp.linspace(0, 1, 64)}, "params": jnp.ones(3)}
    with _store(tmp_path) as store:
        store.save(1, state, {})
        store.wait()
        like = _like(state | {"moments": {"mu": state["moments"]["mu"].astype(jnp.bfloat16)}})
        found = store.restore(lambda _: like).state
        assert _bits(found) == _bits(jax.tree.map(lambda x, y: x.astype(y.dtype), state, like))
        like = _like(state | {"params": jnp.ones(3, jnp.bfloat16)})
        with pytest.raises(UserError, match="another model"):
            store.restore(lambda _: like)


def test_a_part_is_read_by_itself(tmp_path) -> None:
    _saved(tmp_path, 4)
    like = {"params": _like(_state(0))["params"]}
    state, facts = load(tmp_path / "checkpoints" / "4", like, part=True)
    assert _bits(state) == _bits(_state(4)["params"])
    assert facts["data"] == {"epoch": 0, "batch": 4}


_metric = st.one_of(st.none(), st.floats(0, 9))
_tables = st.dictionaries(st.integers(0, 20), st.tuples(_metric, _metric))


@given(st.sets(st.integers(0, 20), min_size=1), _tables, st.integers(1, 4), st.integers(0, 3))
def test_the_last_and_the_best_are_kept(steps, metrics, last, best) -> None:
    table = {str(step): {"wer": wer, "loss": loss} for step, (wer, loss) in metrics.items()}
    keep = kept(steps, table, last, best)
    assert set(sorted(steps)[-last:]) <= keep <= steps
    assert len(keep) <= last + 2 * best
    for at in (0, 1):
        rated = [s for s in steps if s in metrics and metrics[s][at] is not None]
        best_kept = sorted(metrics[s][at] for s in rated if s in keep)[:best]
        assert best_kept == sorted(metrics[s][at] for s in rated)[:best]


def test_old_checkpoints_go_and_the_best_stay(tmp_path) -> None:
    losses, wers = [9.0, 1.0, 5.0, float("nan"), 4.0, 6.0], [0.1, 0.9, 0.8, 0.7, None, 0.6]
    with _store(tmp_path, keep_last=1, keep_best=1) as store:
        for step, (loss, wer) in enumerate(zip(losses, wers, strict=True), 1):
            store.save(step, _state(step), {})
            store.record(step, loss, wer)
        store.wait()
        assert store.steps() == [1, 2, 6]
    assert json.loads((tmp_path / "best.json").read_text())["4"] == {
        "loss": None,
        "wer": 0.7,
        "scored_on": "",
    }


def test_figures_of_other_dev_data_are_ranked_by_themselves(tmp_path) -> None:
    """A change of dev data that is undone has lost no checkpoint, and none is ranked by both."""
    wers = {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.8}
    with _store(tmp_path, keep_last=1, keep_best=1) as store:
        for step, wer in wers.items():
            store.save(step, _state(step), {})
            store.record(step, wer=wer, scored_on="old" if step < 3 else "new")
        store.save(5, _state(5), {})
        store.wait()
        assert store.steps() == [1, 4, 5]
    assert figures_of(tmp_path).keys() == {"4"}
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert figures_of(tmp_path).keys() == {"1"}


def test_a_step_that_is_there_is_not_saved_again(tmp_path) -> None:
    _saved(tmp_path, 1)
    manifest = tmp_path / "checkpoints" / "1" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    _saved(tmp_path, 1)
    assert manifest.stat().st_mtime_ns == before


def test_a_save_that_the_disk_refuses_midway_keeps_the_old_ones(tmp_path) -> None:
    """As on a full disk: no file may grow beyond 1 MB, and the arrays need 4."""
    _saved(tmp_path, 1)
    told: list[str] = []
    big = {"a": jnp.arange(1 << 20, dtype=jnp.float32)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _store(tmp_path, told) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            store.save(2, big, {})
            with pytest.raises(UserError, match="step 2 was not saved"):
                store.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(told) == 1
        assert "finished checkpoints: 1" in told[0]
        assert [path.name for path in store.folder.iterdir()] == ["1"]
        store.save(3, big, {})
        store.wait()
        assert store.restore(lambda _: _like(big)).step == 3


def test_a_target_that_cannot_be_written_is_told_and_the_next_save_works(tmp_path) -> None:
    told: list[str] = []
    with _store(tmp_path, told) as store:
        store.folder.rmdir()
        store.folder.write_text("not a folder")
        store.save(1, _state(1), {})
        store.record(1, loss=1.0)
        store.save(2, _state(2), {})  # told, not raised: training goes on
        assert len(told) >= 1
        assert "step 1 was not saved" in told[0]
        store.folder.unlink()
        store.folder.mkdir()
        store.save(3, _state(3), {})
        store.wait()
        assert store.steps() == [3]


def test_lack_of_space_is_seen_before_anything_is_written(tmp_path, monkeypatch) -> None:
    _saved(tmp_path, 1)
    told: list[str] = []
    usage = shutil.disk_usage(tmp_path)._replace(free=80_000_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with _store(tmp_path, told) as store:
        store.save(2, {"a": jnp.zeros(1 << 20)}, {})
        store.save(3, {"a": jnp.zeros(1 << 22)}, {})
        with pytest.raises(UserError, match=r"needs 83,\d{3},\d{3} bytes, and 80,000,000 are free"):
            store.wait()
        assert store.steps() == [1, 2]
        store.wait()  # told once


def test_a_full_disk_at_best_json_is_told_and_no_more(tmp_path) -> None:
    told: list[str] = []
    with _store(tmp_path, told) as store:
        store.best.mkdir()
        store.record(1, loss=1.0)
    assert "best.json" in told[0]


def test_the_manifest_lists_every_other_file(tmp_path) -> None:
    _saved(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    entries = json.loads((folder / "manifest.json").read_text())["files"]
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert set(entries) == files - {"manifest.json"}
    assert find_fault(folder) == ""


def test_at_least_one_checkpoint_must_be_kept(tmp_path) -> None:
    with pytest.raises(UserError, match="keep_last = 0"):
        _store(tmp_path, keep_last=0)

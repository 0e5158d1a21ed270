"""The mesh, and the one table that says where each parameter lies on it.

Two axes, `copies` and `data`: batches are cut along both, float32 weights and moments along `data`
alone (ZeRO), so that each copy of them is cut over so many devices; by default there is one copy.
The rows of TABLE name the axis of a leaf that is cut; a leaf that the devices do not divide evenly
there is kept whole on each of them.
"""

from collections import Counter
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hebasr_jax.errors import UserError
from hebasr_jax.paths import look_up

COPIES, CUT = "copies", "data"
ROWS = PartitionSpec((COPIES, CUT))

TABLE: tuple[tuple[str, int | None], ...] = (
    (r".*(norm|conv\d|query|key|value|out|up|down|hidden)/(scale|bias)", None),
    (r"encoder/conv\d/kernel", None),
    (r"encoder/conv_out/kernel", 0),
    (r"encoder/layers/(query|key|value|out|up|down)/kernel", 1),
    (r"projector/(hidden|out)/kernel", 0),
    (r"decoder/embed/embedding", 0),
    (r"decoder/layers/(query|key|value|out|gate|up|down)/kernel", 1),
)


def make_mesh(devices: int | None = None, cut_over: int | None = None) -> Mesh:
    """A mesh of the first `devices` devices of all hosts, as many of each; None takes all.

    Auto axes: cuDNN attention is not supported under Explicit ones, `make_mesh`'s default.

    Args:
      cut_over: neighbouring devices over which a copy of weights and moments is cut; None: all.
    """
    there = jax.devices()
    if devices is not None and not 1 <= devices <= len(there):
        raise UserError(
            f"compute.devices = {devices} cannot be had",
            f"JAX sees {len(there)} ({there[0].device_kind})",
            "give fewer, or None for all",
        )
    taken = np.asarray(there[:devices])
    on_process = Counter(d.process_index for d in taken)
    if len(on_process) < jax.process_count() or len(set(on_process.values())) > 1:
        raise UserError(
            f"compute.devices = {devices} leaves {jax.process_count()} processes unequal parts",
            "each reads an equal part of a batch",
            "give None for all devices, or start fewer processes",
        )
    if cut_over is not None and (cut_over < 1 or taken.size % cut_over):
        raise UserError(
            f"compute.cut_over = {cut_over} does not divide {taken.size} devices",
            "each copy of the weights is cut over so many",
            "give a divisor, 1 for whole weights on each device, or None for one copy",
        )
    return _mesh(taken.reshape(-1, cut_over or taken.size))


def local_mesh(mesh: Mesh | None = None) -> Mesh:
    """A mesh of this process's devices, all or those of `mesh`, for work shared with no other."""
    there = jax.local_devices()
    if mesh is not None:
        there = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return _mesh(np.asarray(there).reshape(1, -1))


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, (COPIES, CUT), axis_types=(AxisType.Auto,) * 2)


def rows(mesh: Mesh) -> NamedSharding:
    """Of a batch: rows over the devices."""
    return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of parameters, moments or a whole train state.

    A leaf's parameter is known by the dict keys that end its path, so that one table serves
    weights and moments alike; a leaf without such a path (a step count) lies on every device.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = parameter_path(path)
        axis = look_up(TABLE, name) if name else None
        if axis is None or leaf.shape[axis] % mesh.shape[CUT]:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, CUT))

    return jax.tree_util.tree_map_with_path(of, tree)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(layer: Any, mesh: Mesh) -> Any:
    """A layer's weights, whole on every device while it runs; their gradients are cut again.

    A matrix of a layer is cut along its first axis, which in a stack of layers is the second.
    """
    return jax.lax.with_sharding_constraint(layer, replicated(mesh))


def _gathered_fwd(layer: Any, mesh: Mesh) -> tuple[Any, None]:
    return gathered(layer, mesh), None


def _gathered_bwd(mesh: Mesh, _: None, grads: Any) -> tuple[Any]:
    def cut(grad: jax.Array) -> jax.Array:
        divides = grad.ndim == 2 and not grad.shape[0] % mesh.shape[CUT]
        place = PartitionSpec(CUT) if divides else PartitionSpec()
        return jax.lax.with_sharding_constraint(grad, NamedSharding(mesh, place))

    return (jax.tree.map(cut, grads),)


gathered.defvjp(_gathered_fwd, _gathered_bwd)


def parameter_path(path: Any) -> str:
    """The parameter that a leaf belongs to: the dict keys at the end of its path."""
    names: list[str] = []
    for key in reversed(path):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        names.insert(0, str(key.key))
    return "/".join(names)


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree's arrays on the fullest device of this process."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)

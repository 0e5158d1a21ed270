"""The mesh, and the one table that says where each parameter lies on it.

One axis, `data`: batches are cut along it, and so are float32 weights and moments (ZeRO). The
rows of TABLE name the axis of a leaf that is cut; a leaf that the devices do not divide evenly
there is kept whole on each of them.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hebasr_jax.errors import UserError
from hebasr_jax.paths import look_up

AXIS = "data"

TABLE: tuple[tuple[str, int | None], ...] = (
    (r".*(norm|conv\d|query|key|value|out|up|down|hidden)/(scale|bias)", None),
    (r"encoder/conv\d/kernel", None),
    (r"encoder/conv_out/kernel", 0),
    (r"encoder/layers/(query|key|value|out|up|down)/kernel", 1),
    (r"projector/(hidden|out)/kernel", 0),
    (r"decoder/embed/embedding", 0),
    (r"decoder/layers/(query|key|value|out|gate|up|down)/kernel", 1),
)


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` devices of all hosts; None takes all.

    Auto axes: cuDNN attention is not supported under Explicit ones, `make_mesh`'s default.
    """
    there = jax.devices()
    if devices is not None and not 1 <= devices <= len(there):
        raise UserError(
            f"compute.devices = {devices} cannot be had",
            f"JAX sees {len(there)} ({there[0].device_kind})",
            "give fewer, or None for all",
        )
    return Mesh(np.asarray(there[:devices]), (AXIS,), axis_types=(AxisType.Auto,))


def local_mesh(mesh: Mesh | None = None) -> Mesh:
    """A mesh of this process's devices, all or those of `mesh`, for work shared with no other."""
    there = jax.local_devices()
    if mesh is not None:
        there = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return Mesh(np.asarray(there), (AXIS,), axis_types=(AxisType.Auto,))


def rows(mesh: Mesh) -> NamedSharding:
    """Of a batch: rows over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


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
        if axis is None or leaf.shape[axis] % mesh.size:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXIS))

    return jax.tree_util.tree_map_with_path(of, tree)


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

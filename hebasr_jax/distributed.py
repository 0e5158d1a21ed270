"""Several hosts as one machine: start-up, and what all of them must agree on."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hebasr_jax.errors import UserError

T = TypeVar("T")

MEMORY_SHARE = "0.93"  # of each GPU; JAX's own 0.75 leaves 20 GB of an 80-GB card unused
START_TIMEOUT_S = 1800  # a large job's nodes come up minutes apart


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the hosts of a run and takes the GPUs' memory. Call it before JAX sees a device.

    Args:
      coordinator: host:port of process 0, and the two numbers; all None: from Slurm when the job
        has more than one task, else a run of one process.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --processes and --process belong together",
            "only some of them were given",
            "give all three on each host, or none under Slurm",
        )
    if not any(given) and int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_gpus(os.environ, gpus_seen(os.environ)),
            initialization_timeout=START_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            "the hosts of this run did not find each other",
            str(error).splitlines()[0],
            "check that each host reaches the coordinator's port and has its own process number",
        ) from None


def local_gpus(environment: Mapping[str, str], seen: int) -> list[int] | None:
    """The GPUs that a Slurm task takes: an equal part of those that it sees; None elsewhere.

    Left to itself JAX takes number SLURM_LOCALID alone: of one task on a node of eight GPUs seven
    would idle, and a task that Slurm binds to its own GPU would look for one that it cannot see.
    """
    if "SLURM_LOCALID" not in environment or not seen:
        return None
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 8(x2),4
    on_node = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
        for _ in range(int(times or 1))
    ]
    tasks = on_node[int(environment.get("SLURM_NODEID", "0"))]
    if "SLURM_GPUS_PER_TASK" in environment or seen < tasks:  # bound: it sees its own only
        return list(range(seen))
    if seen % tasks:
        raise UserError(
            f"{tasks} tasks on a node cannot share {seen} GPUs",
            "each takes the same number",
            "start one task for each GPU, or one for each node",
        )
    own, each = int(environment["SLURM_LOCALID"]), seen // tasks
    return list(range(own * each, (own + 1) * each))


def gpus_seen(environment: Mapping[str, str]) -> int:
    """NVIDIA GPUs that this process may use, without loading a driver."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return len([one for one in given.split(",") if one.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def local_rows(rows: int) -> slice:
    """The rows of a batch that this host reads: its devices' part, in the order of the mesh."""
    each = rows // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def place_rows(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A batch's array from the rows that each host read."""
    return jax.make_array_from_process_local_data(sharding, local)


def place_whole(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every host has in full, laid out by `sharding`."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def any_host(flag: bool) -> bool:
    """Whether the flag is set on any host; all hosts must call it at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def to_host(tree: Any) -> Any:
    """Numpy copies of a tree on every host, whatever devices hold it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def local_copy(tree: Any, mesh: Mesh) -> Any:
    """The same arrays, whole on every device, as arrays of this process alone (no copy).

    Args:
      mesh: this process's devices.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def local(leaf: jax.Array) -> jax.Array:
        there = {shard.device: shard.data for shard in leaf.addressable_shards}
        parts = [there[device] for device in mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(leaf.shape, whole, parts)

    return jax.tree.map(local, tree)


def from_all_hosts(value: Any) -> list[Any]:
    """What each host gave, in their order; values are anything that JSON holds."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(own)))
    room = max(1024, 1 << int(sizes.max() - 1).bit_length())  # few sizes: each is compiled
    padded = np.pad(own, (0, room - len(own)))
    every = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(every, sizes, strict=True)]


def on_first(action: Callable[[], T]) -> T | None:
    """Runs `action` on the first host while the others wait; what it gave there, None elsewhere.

    Raises:
      UserError: an error of the first host, on the others: else they would blame the connection.
    """
    given, error = None, None
    if is_first():
        try:
            given = action()
        except Exception as fault:
            error = fault
    told = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    if first := from_all_hosts(error and f"{told}{error}")[0]:
        raise error or UserError("the first process of the run ended", first)
    return given

"""Which GPUs a process takes: every one of a host is taken once, however Slurm starts tasks."""

import pytest

from hebasr_jax.distributed import gpus_seen, local_gpus
from hebasr_jax.errors import UserError


def of_all_tasks(tasks: str, node: int, count: int, seen: int, **more: str) -> list[int]:
    """GPUs that the tasks of a node take together, in their order."""
    taken = []
    for own in range(count):
        told = {"SLURM_LOCALID": str(own), "SLURM_NODEID": str(node)}
        taken += local_gpus(told | {"SLURM_STEP_TASKS_PER_NODE": tasks} | more, seen) or []
    return taken


@pytest.mark.parametrize(
    ("tasks", "node", "count"),
    [("1", 0, 1), ("1(x2)", 1, 1), ("8(x2)", 1, 8), ("4", 0, 4), ("1,8", 1, 8), ("8,2(x3)", 2, 2)],
)
def test_tasks_share_a_nodes_gpus(tasks, node, count) -> None:
    assert of_all_tasks(tasks, node, count, seen=8) == list(range(8))


def test_a_task_that_is_bound_takes_what_it_sees() -> None:
    assert of_all_tasks("8", 0, 8, seen=1) == [0] * 8
    assert of_all_tasks("2", 0, 2, seen=4, SLURM_GPUS_PER_TASK="4") == [0, 1, 2, 3] * 2


def test_an_uneven_share_is_refused() -> None:
    with pytest.raises(UserError, match="3 tasks on a node cannot share 8 GPUs"):
        of_all_tasks("3", 0, 3, seen=8)


def test_without_slurm_or_a_gpu_the_choice_is_jaxs() -> None:
    assert local_gpus({}, 8) is None
    assert local_gpus({"SLURM_LOCALID": "0"}, 0) is None


def test_the_visible_gpus_are_those_of_the_environment() -> None:
    assert gpus_seen({"CUDA_VISIBLE_DEVICES": "0,3,GPU-8932f937"}) == 3
    assert gpus_seen({"CUDA_VISIBLE_DEVICES": ""}) == 0

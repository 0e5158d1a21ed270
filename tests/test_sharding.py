"""Eight devices do what one does, and each holds its part only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cpu_programs
import jax
import pytest

from hebasr_jax.errors import UserError
from hebasr_jax.model.asr import abstract_params
from hebasr_jax.paths import flat, look_up
from hebasr_jax.sharding import TABLE, make_mesh, parameter_path
from hebasr_jax.tiny import TINY

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found() -> dict:
    """Results of tests/eight_devices.py."""
    done = subprocess.run(
        [sys.executable, str(HERE / "eight_devices.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}"} | cpu_programs.environment(8),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["step", "layer", "copies"])
def test_eight_devices_equal_one(found, name) -> None:
    single, many = found["single"], found[name]
    assert many["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert many["norms"] == pytest.approx(single["norms"], rel=1e-4)
    assert many["worst"] < 1e-3


@pytest.mark.parametrize("name", ["step", "layer", "copies"])
def test_no_more_is_exchanged_than_the_budget_has(found, name) -> None:
    """Most of each kind in the compiled program, with some room for other versions of XLA."""
    budget = json.loads((HERE / "step_budget.json").read_text())["collectives"][name]
    counted = found[name]["collectives"]
    assert counted["all-gather"] > 0
    assert {kind for kind, count in counted.items() if count > budget[kind]} == set()


def test_eight_devices_hear_what_one_hears(found) -> None:
    one, eight = found["heard"]
    assert [len(tokens) for tokens in one] == [1 + n % 13 for n in range(40)]
    assert eight == one


def test_devices_decode_until_all_have_room(found) -> None:
    """A row of 40 beside one of 3 goes on until the other device's row of 20 has ended too."""
    assert found["taken together"] == [3, 20, 20, 20]


def test_weights_and_moments_are_cut_over_the_devices(found) -> None:
    assert found["step"]["cut"] > 50
    assert found["step"]["bytes"] < found["copies"]["bytes"] < found["single"]["bytes"]
    assert found["step"]["bytes"] < 0.35 * found["single"]["bytes"]  # the tiny tables do not divide


def test_matrices_are_gathered_in_bfloat16(found) -> None:
    """Vectors stay in float32, as they enter the sums."""
    assert found["gathered"]["bf16"] > 20 * found["gathered"]["f32"]


def test_each_device_attends_to_its_own_rows_and_repeats_bit_for_bit(found) -> None:
    """Each attention once forwards, once back; of the encoder and of the decoder's two stacks.

    What is left to XLA to be spread over devices cannot be marked, and would end a step on GPUs.
    """
    for count in found["attentions"]:  # unrolled, some versions of JAX have each layer's own
        assert count["forward"] == count["backward"] == count["marked"] >= 3
        assert count["left to XLA"] == 0


def test_every_parameter_has_one_row_of_the_table() -> None:
    for path, leaf in flat(abstract_params(TINY)).items():
        axis = look_up(TABLE, path)
        assert axis is None or axis < len(leaf.shape), path
        if axis is None:
            assert leaf.size < 100_000 or "conv" in path, path


def test_moments_are_known_by_the_parameter_that_ends_their_path() -> None:
    tree = {"moments": ({"group:matrix": [{"decoder": {"norm": {"scale": 0}}}]}, 1)}
    paths = [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert paths == ["decoder/norm/scale", ""]


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"compute\.devices = 99"):
        make_mesh(99)


@pytest.mark.parametrize("devices", [2, 3])
def test_processes_take_equal_parts(monkeypatch, devices) -> None:
    """Two of four devices on each: the first two or three would leave a process fewer, or none."""
    two_hosts = [SimpleNamespace(process_index=n // 2, device_kind="made up") for n in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: two_hosts)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        UserError, match=rf"compute\.devices = {devices} leaves 2 processes unequal"
    ):
        make_mesh(devices)


def test_copies_are_of_equal_size() -> None:
    with pytest.raises(UserError, match=r"compute\.cut_over = 3 does not divide 1 devices"):
        make_mesh(1, cut_over=3)

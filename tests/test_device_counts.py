"""A run goes on with another number of devices, and ends as on one."""

from pathlib import Path

import numpy as np
import pytest
from tone_runs import QUICK, arrays, losses, make_workspace, settings, train, validations

CHANGES = settings(
    *QUICK,
    "data.buckets=1",
    "train.steps=9",
    "train.checkpoint_steps=4",
    "train.log_steps=1",
    "validation.every_steps=3",
)
STEP = "hebasr_jax.train.one_step"


def stop(at: int) -> dict:
    return {"call": STEP, "at": at, "signal": "SIGTERM"}


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    folder = make_workspace(tmp_path_factory.getbasetemp(), "devices")
    train(folder, *CHANGES, *settings("name=one"))
    return folder


def test_from_eight_devices_to_one_to_four(space) -> None:
    """Batches, losses, error rates and weights are those of one device, but for sums' order."""
    name = settings("name=many")
    train(space, *CHANGES, *name, devices=8, meddle=stop(3), code=75)
    train(space, *CHANGES, *name, devices=1, meddle=stop(3), code=75)
    train(space, *CHANGES, *name, devices=4)
    one, many = (space / "runs" / name for name in ("one", "many"))
    assert len(losses(many)) == 9
    assert losses(many) == pytest.approx(losses(one), rel=1e-4)
    for ours, theirs in zip(validations(many), validations(one), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["sets"]["held"]["wer"] == theirs["sets"]["held"]["wer"]
        assert ours["sets"]["held"]["loss"] == pytest.approx(
            theirs["sets"]["held"]["loss"], rel=1e-4
        )
    ours, theirs = arrays(many, 9), arrays(one, 9)
    assert ours.keys() == theirs.keys()
    for leaf, array in theirs.items():
        if not leaf.endswith("key/bias"):  # noise: its gradient is zero
            assert np.linalg.norm(ours[leaf] - array) <= 2e-3 * np.linalg.norm(array), leaf

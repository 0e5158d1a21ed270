"""Groups, rates and the cut: every parameter has one rule, and the rule is obeyed."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hebasr_jax.errors import UserError
from hebasr_jax.model.asr import abstract_params, init_params
from hebasr_jax.optim import (
    GROUPS,
    check_groups,
    join,
    layer_rates,
    make_optimizer,
    rate_table,
    schedule,
    split,
)
from hebasr_jax.paths import flat, look_up
from hebasr_jax.run_config import Group, Optim, Stage
from hebasr_jax.tiny import TINY

FROZEN = Group(0.0)
SMALL = {"decoder": {"layers": {"up": {"kernel": jnp.zeros((2, 64, 64))}}}}


def test_every_parameter_has_one_group() -> None:
    groups = {look_up(GROUPS, path) for path in flat(abstract_params(TINY))}
    assert groups == {"conv_stem", "encoder", "projector", "embedding", "decoder"}


def test_a_parameter_without_a_group_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no row"):
        look_up(GROUPS, "decoder/adapter/kernel")


@pytest.mark.parametrize("layers", [None, 1, 2, 3])
def test_split_and_join_are_inverse(layers) -> None:
    params = init_params(TINY, jax.random.key(0))
    stage = Stage(conv_stem=FROZEN, encoder=FROZEN, decoder=Group(1e-3, trained_layers=layers))
    trained, frozen = split(params, stage)
    whole = join(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    up = flat(trained)["decoder/layers/up/kernel"]
    assert up.shape[0] == (layers or TINY.decoder.layers)
    assert not any(path.startswith("encoder/layers") for path in flat(trained))


@given(st.integers(1, 3000), st.integers(0, 500), st.floats(0, 1))
def test_the_schedule_rises_then_falls_to_its_floor(steps, warmup, floor) -> None:
    config = Optim(warmup_steps=warmup, final_rate=floor)
    rates = np.asarray(schedule(jnp.arange(3000), steps, config))[:steps]
    warm = min(warmup, steps)
    assert np.all(rates >= 0)
    assert np.all(rates <= 1 + 1e-6)
    assert np.all(np.diff(rates[:warm]) > 0)
    assert np.all(np.diff(rates[max(warm, 1) :]) <= 1e-6)
    if warm:
        assert rates[0] == pytest.approx(1 / warmup)
    if steps > warmup:
        assert rates[-1] == pytest.approx(floor, abs=1e-5)


@given(st.integers(1, 30), st.floats(0.1, 1.0), st.data())
def test_layer_rates_decay_downwards_and_are_zero_where_frozen(layers, decay, data) -> None:
    trained = data.draw(st.one_of(st.none(), st.integers(1, layers)))
    rates = layer_rates(Group(3e-4, trained_layers=trained, layer_decay=decay), layers)
    assert len(rates) == layers
    assert rates[-1] == 3e-4
    assert sum(rate > 0 for rate in rates) == (trained or layers)
    for low, high in itertools.pairwise(rates):
        assert low == 0 or low == pytest.approx(decay * high)


def test_an_update_has_the_rate_of_its_group_and_layer() -> None:
    """With Adam's first step every update is its rate, whatever the gradient."""
    stage = Stage(
        encoder=Group(1e-3, layer_decay=0.5),
        decoder=Group(2e-3, layer_decay=0.1, trained_layers=2),
        projector=Group(4e-3),
        embedding=FROZEN,
        conv_stem=FROZEN,
    )
    config = Optim(weight_decay=0.0, epsilon=1e-30, warmup_steps=0, final_rate=1.0)
    params = init_params(TINY, jax.random.key(0))
    trained, _ = split(params, stage)
    optimizer = make_optimizer(config, stage, trained, 10)
    grads = jax.tree.map(lambda w: jnp.full(w.shape, -3e-4), trained)
    updates = flat(optimizer.update(grads, optimizer.init(trained), trained)[0])
    for path, expected in {
        "encoder/layers/up/kernel": [0.5e-3, 1e-3],
        "decoder/layers/query_norm/scale": [2e-4, 2e-3],
        "decoder/norm/scale": 2e-3,
        "encoder/norm/bias": 4e-3,
        "projector/out/kernel": 4e-3,
    }.items():
        found = np.asarray(updates[path]).reshape(len(np.atleast_1d(expected)), -1)
        np.testing.assert_allclose(found, np.broadcast_to(np.c_[expected], found.shape), rtol=1e-4)
    assert not any("conv" in path or "embed" in path for path in updates)


def test_weights_decay_only_where_they_are_matrices() -> None:
    config = Optim(weight_decay=0.1, warmup_steps=0)
    params = init_params(TINY, jax.random.key(0))
    optimizer = make_optimizer(config, Stage(), params, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = flat(optimizer.update(zeros, optimizer.init(params), params)[0])
    for path, update in updates.items():
        vector = path.endswith(("bias", "scale"))
        assert bool(jnp.any(update != 0)) != vector, path


def test_clipping_is_by_the_norm_of_all_groups_together() -> None:
    """Moments after one update are (1 - beta1) times the clipped gradient."""
    config = Optim(clip_norm=1.0, beta1=0.0)
    params = init_params(TINY, jax.random.key(0))
    optimizer = make_optimizer(config, Stage(), params, 10)
    grads = jax.tree.map(lambda w: jnp.full(w.shape, 0.1), params)
    _, moments = optimizer.update(grads, optimizer.init(params), params)
    means = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(moments)
        if ".mu" in jax.tree_util.keystr(path)
    ]
    assert float(optax.tree.norm(means)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("matrices", "most"), [("adamw", 0.005), ("muon", 0.05)])
def test_bfloat16_moments_cost_their_rounding_and_no_more(matrices, most) -> None:
    """400 updates: were Adam's betas rounded too, they would end 2 % apart.

    Muon makes small directions as large as others, and with them their rounding.
    """
    config = Optim(matrices=matrices, weight_decay=0.0, warmup_steps=0, clip_norm=1e9)
    moved = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(replace(config, moments=dtype), Stage(), SMALL, 400)
        moments, update, total = optimizer.init(SMALL), jax.jit(optimizer.update), 0.0
        kinds = [leaf.dtype for leaf in jax.tree.leaves(moments)]
        for key in jax.random.split(jax.random.key(0), 400):
            noise = jax.random.normal(key, (2, 64, 64))
            grads = jax.tree.map(lambda w, noise=noise: 1e-3 * (1 + noise), SMALL)
            updates, moments = update(grads, moments, SMALL)
            total += np.asarray(jax.tree.leaves(updates)[0], np.float64)
        moved[dtype] = total
        large = [leaf.dtype.name for leaf in jax.tree.leaves(moments) if leaf.size > 1000]
        assert set(large) == {dtype}
        assert kinds == [leaf.dtype for leaf in jax.tree.leaves(moments)]  # from the first step on
    apart = np.linalg.norm(moved["bfloat16"] - moved["float32"]) / np.linalg.norm(moved["float32"])
    assert 0 < apart < most


def test_the_moments_of_an_update_are_used_before_they_are_rounded() -> None:
    """Adam's first direction is the gradient's sign, whatever its size."""
    config = Optim(weight_decay=0.0, warmup_steps=0, epsilon=1e-30, clip_norm=1e9)
    optimizer = make_optimizer(replace(config, moments="bfloat16"), Stage(), SMALL, 10)
    grads = jax.tree.map(lambda w: jnp.linspace(1e-3, 2e-3, w.size).reshape(w.shape), SMALL)
    update = jax.tree.leaves(optimizer.update(grads, optimizer.init(SMALL), SMALL)[0])[0]
    np.testing.assert_allclose(np.asarray(update), update.reshape(-1)[0], rtol=1e-5)


def test_muon_is_for_layer_matrices_only_and_makes_them_orthogonal() -> None:
    config = Optim(matrices="muon", weight_decay=0.0, warmup_steps=0, final_rate=1.0, clip_norm=1e9)
    params = init_params(TINY, jax.random.key(0))
    optimizer = make_optimizer(config, Stage(), params, 10)
    keys = jax.random.split(jax.random.key(1), len(flat(params)))
    grads = jax.tree.unflatten(
        jax.tree.structure(params),
        [jax.random.normal(k, w.shape) for k, w in zip(keys, jax.tree.leaves(params), strict=True)],
    )
    updates = flat(optimizer.update(grads, optimizer.init(params), params)[0])
    up = np.asarray(updates["decoder/layers/up/kernel"])[1]
    singular = np.linalg.svd(up / (0.2 * max(up.shape) ** 0.5) / 2e-5, compute_uv=False)
    assert 0.5 < singular.min() < singular.max() < 1.5
    embedding = np.asarray(updates["decoder/embed/embedding"])
    np.testing.assert_allclose(np.abs(embedding), 2e-5, rtol=1e-2)  # Adam's first step: the rate


def test_the_table_counts_what_is_trained() -> None:
    stage = Stage(decoder=Group(1e-4, trained_layers=1), encoder=FROZEN)
    rows = {row.group: row for row in rate_table(abstract_params(TINY), stage)}
    trained, _ = split(init_params(TINY, jax.random.key(0)), stage)
    assert sum(r.trained_parameters for r in rows.values()) == sum(
        w.size for w in jax.tree.leaves(trained)
    )
    assert sum(r.parameters for r in rows.values()) == sum(
        w.size for w in jax.tree.leaves(abstract_params(TINY))
    )
    assert rows["decoder"].layer_rates == (0.0, 0.0, 1e-4)
    assert rows["encoder"].trained_parameters == 0


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(decoder=Group(1e-4, trained_layers=4)), "3 layers"),
        (Stage(decoder=Group(1e-4, trained_layers=0)), "cannot be had"),
        (Stage(projector=Group(1e-4, trained_layers=1)), "no stack"),
        (replace(Stage(), **dict.fromkeys(dict(g[::-1] for g in GROUPS), FROZEN)), "nothing"),
    ],
)
def test_impossible_groups_are_refused(stage, message) -> None:
    with pytest.raises(UserError, match=message):
        check_groups(abstract_params(TINY), stage)


_PROGRAM = """
import hashlib, jax
from hebasr_jax.model.asr import abstract_params
from hebasr_jax.optim import make_optimizer
from hebasr_jax.run_config import Optim, Stage
from hebasr_jax.tiny import TINY
params = abstract_params(TINY)
optimizer = make_optimizer(Optim(), Stage(), params, 10)
state = jax.eval_shape(optimizer.init, params)
text = jax.jit(optimizer.update).lower(params, state, params).as_text()
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_every_process_makes_the_same_program() -> None:
    """Else a resumed run compiles anew, and adds in another order: sets are ordered by a seed."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
        )
        for seed in ("0", "4")  # of which {"matrix", "vector"} is in different orders
    ]
    first, second = (child.communicate(timeout=120)[0] for child in children)
    assert first == second != b""

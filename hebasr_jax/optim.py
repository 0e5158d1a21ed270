"""Which parameters are trained, at what rate: one group table, one schedule, one optimiser.

A stack of layers may be cut: its first layers are frozen (no gradient, no moments), its last
ones trained. `split` makes the two trees, `join` undoes it; the next stage may cut elsewhere, and
`carry_over` takes the optimiser's state along. Every tensor, and every layer of a stack, counts
its own updates (its age), so that one that joins later has its own warm-up and bias correction.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from hebasr_jax.errors import UserError
from hebasr_jax.paths import Tree, flat, is_stacked, look_up, nested
from hebasr_jax.run_config import Group, Optim, Stage

GROUPS: tuple[tuple[str, str], ...] = (
    (r"encoder/conv.*", "conv_stem"),
    (r"encoder/layers/.*", "encoder"),
    (r"encoder/norm/.*|projector/.*", "projector"),
    (r"decoder/embed/embedding", "embedding"),  # also the output head: the two are tied
    (r"decoder/layers/.*|decoder/norm/.*", "decoder"),
)
GROUP_NAMES = tuple(dict.fromkeys(group for _, group in GROUPS))


@dataclass(frozen=True)
class RateRow:
    """One line of the table that a run prints before each stage."""

    group: str
    tensors: int
    parameters: int
    trained_parameters: int
    peak_rate: float
    layer_rates: tuple[float, ...] = ()
    """of each layer of the group's stack, 0 where frozen"""


class AdamState(NamedTuple):
    """age: updates that each tensor, or layer of a stack, has had. mu, nu: the moments."""

    age: Any
    mu: Any
    nu: Any


class RateState(NamedTuple):
    """updates: of the schedule until now. age: of each tensor, or layer, since it began."""

    updates: Array
    age: Any


def group_of(path: str, stage: Stage) -> Group:
    """The settings of the one group that a parameter belongs to."""
    return getattr(stage, look_up(GROUPS, path))


def frozen_layers(path: str, leaf: Any, stage: Stage) -> int | None:
    """How many first layers of a stacked leaf are frozen; None: the whole leaf, stacked or not."""
    group = group_of(path, stage)
    if group.learning_rate == 0:
        return None
    if not is_stacked(path) or group.trained_layers is None:
        return 0
    return leaf.shape[0] - group.trained_layers


def split(params: Tree, stage: Stage) -> tuple[Tree, Tree]:
    """The trained and the frozen tree; a leaf of a cut stack is in both, with its own layers."""
    trained, frozen = {}, {}
    for path, leaf in flat(params).items():
        first = frozen_layers(path, leaf, stage)
        if first is None:
            frozen[path] = leaf
        elif first == 0:
            trained[path] = leaf
        else:
            frozen[path], trained[path] = leaf[:first], leaf[first:]
    return nested(trained), nested(frozen)


def join(trained: Tree, frozen: Tree) -> Tree:
    """The whole tree of the two parts; inverse of `split`, in the trained part's dtype."""
    first, last = flat(frozen), flat(trained)
    joined = {}
    for path in sorted(first | last):
        parts = [part[path] for part in (first, last) if path in part]
        dtype = parts[-1].dtype
        joined[path] = jnp.concatenate([p.astype(dtype) for p in parts]) if parts[1:] else parts[0]
    return nested(joined)


def layer_rates(group: Group, layers: int) -> tuple[float, ...]:
    """Peak rate of each layer of a stack: `layer_decay` per layer downwards, 0 where frozen."""
    trained = layers if group.trained_layers is None else group.trained_layers
    return tuple(
        group.learning_rate * group.layer_decay ** (layers - 1 - layer)
        if layer >= layers - trained
        else 0.0
        for layer in range(layers)
    )


def warm_up(age: Array | int, config: Optim) -> Array:
    """Share of its rate that a tensor has in the update after `age` updates: linear up to 1."""
    return jnp.minimum((jnp.asarray(age, jnp.float32) + 1) / max(config.warmup_steps, 1), 1.0)


def decay(updates: Array | int, steps: int, config: Optim) -> Array:
    """Share of the peak rate in the update after `updates` of `steps`: 1 while the first tensors
    warm up, then down to `final_rate` in the last update."""
    past = (jnp.asarray(updates, jnp.float32) + 1 - config.warmup_steps) / max(
        steps - config.warmup_steps, 1
    )
    past = jnp.clip(past, 0.0, 1.0)
    left = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * past)), "linear": 1 - past, "none": 1.0}
    return config.final_rate + (1 - config.final_rate) * jnp.asarray(left[config.decay])


def schedule(updates: Array | int, steps: int, config: Optim) -> Array:
    """Share of the peak rate of what is trained from the first update on."""
    return warm_up(updates, config) * decay(updates, steps, config)


def make_optimizer(
    config: Optim, stage: Stage, trained: Tree, steps: int
) -> optax.GradientTransformation:
    """Clipping by the global norm, AdamW or Muon by the kind of tensor, then the rates.

    Args:
      trained: the trained tree or its shapes.
      steps: length of the schedule.
    """
    kinds = {path: _kind(path, leaf, config) for path, leaf in flat(trained).items()}
    # In one order in all processes: programs must be found again among those on the disk.
    transforms = {kind: _direction(config, kind) for kind in sorted(set(kinds.values()))}
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.multi_transform(transforms, nested(kinds)),
        scale_by_rates(config, stage, steps),
    )


def scale_by_adam(config: Optim) -> optax.GradientTransformation:
    """Adam's direction (Kingma and Ba 2015), each layer's bias corrected by its own age."""

    def init(params: Tree) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamState(jax.tree.map_with_path(_no_age, params), zeros, zeros)

    def update(grads: Tree, state: AdamState, params: Any = None) -> tuple[Tree, AdamState]:
        b1, b2 = config.beta1, config.beta2
        age = jax.tree.map(lambda n: n + 1, state.age)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)

        def direction(n: Array, m: Array, v: Array) -> Array:
            m, v = (x / (1 - b ** n.astype(jnp.float32)) for x, b in ((m, b1), (v, b2)))
            return m / (jnp.sqrt(v) + config.epsilon)

        return jax.tree.map(direction, age, mu, nu), AdamState(age, mu, nu)

    return optax.GradientTransformation(init, update)


def keep_moments(
    optimizer: optax.GradientTransformation, dtype: str
) -> optax.GradientTransformation:
    """An optimiser whose moments, `mu` and `nu`, are float32 in use and kept as `dtype`."""

    def cast(state: Any, to: str) -> Any:
        moments = {name: getattr(state, name) for name in ("mu", "nu") if hasattr(state, name)}
        return state._replace(**jax.tree.map(lambda x: x.astype(to), moments))

    def init(params: Tree) -> Any:
        return cast(optimizer.init(params), dtype)

    def update(grads: Tree, state: Any, params: Any = None) -> tuple[Tree, Any]:
        updates, state = optimizer.update(grads, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def scale_by_rates(config: Optim, stage: Stage, steps: int) -> optax.GradientTransformation:
    """Minus the rate of each tensor: its group's, by depth, its warm-up and the common decay."""

    def init(params: Tree) -> RateState:
        return RateState(jnp.zeros((), jnp.int32), jax.tree.map_with_path(_no_age, params))

    def update(updates: Tree, state: RateState, params: Any = None) -> tuple[Tree, RateState]:
        rates = rates_now(state, config, stage, steps)
        scaled = jax.tree.map(lambda rate, u: -rate * u, rates, updates)
        age = jax.tree.map(lambda n: n + 1, state.age)
        return scaled, RateState(state.updates + 1, age)

    return optax.GradientTransformation(init, update)


def rates_now(state: RateState, config: Optim, stage: Stage, steps: int) -> Tree:
    """The rate of every tensor in the next update; of a stack, of each layer, [L, 1, ...]."""
    common = decay(state.updates, steps, config)

    def rate(path: str, age: Array) -> Array:
        group, layers = group_of(path, stage), age.shape[0] if is_stacked(path) else 1
        depth = group.layer_decay ** np.arange(layers - 1, -1, -1, dtype=np.float64)
        peak = jnp.asarray(group.learning_rate * depth, jnp.float32)
        return peak.reshape(age.shape) * warm_up(age, config) * common

    return nested({path: rate(path, age) for path, age in flat(state.age).items()})


def group_rates(moments: Any, config: Optim, stage: Stage, steps: int) -> dict[str, Array]:
    """Each group's rate in the next update, of its last layer; 0 of a frozen group.

    Args:
      moments: the state of `make_optimizer`'s optimiser, whose last part is a `RateState`.
    """
    rates = {name: jnp.zeros(()) for name in GROUP_NAMES}
    for path, rate in flat(rates_now(moments[-1], config, stage, steps)).items():
        rates[look_up(GROUPS, path)] = rate.reshape(-1)[-1]
    return rates


def carry_over(fresh: Any, old: Any, *, new_schedule: bool = False) -> Any:
    """An optimiser's state for the next stage: what the last one trained keeps its moments and age.

    Args:
      fresh: the state that the new optimiser begins with; what is trained anew stays as it is.
      old: the state until now. A stack's last layers are its own last layers then as now.
      new_schedule: the rates begin anew, with warm-up; moments are kept all the same.
    """
    before = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(old)}

    def one(path: Any, leaf: Array) -> Array:
        kept = before.get(jax.tree_util.keystr(path))
        if kept is None or kept.shape == leaf.shape:
            return leaf if kept is None else kept
        added = leaf.shape[0] - kept.shape[0]
        return jnp.concatenate([leaf[:added], kept]) if added > 0 else kept[-added:]

    carried = jax.tree_util.tree_map_with_path(one, fresh)
    return (*carried[:-1], fresh[-1]) if new_schedule else carried


def rate_table(params: Tree, stage: Stage) -> list[RateRow]:
    """Every group with its size, its peak rate and the rate of each of its layers."""
    rows = []
    for name in GROUP_NAMES:
        group: Group = getattr(stage, name)
        leaves = {p: leaf for p, leaf in flat(params).items() if look_up(GROUPS, p) == name}
        trained, _ = split_shapes(nested(leaves), stage)
        layers = next((leaf.shape[0] for p, leaf in leaves.items() if is_stacked(p)), 0)
        rows.append(
            RateRow(
                group=name,
                tensors=len(leaves),
                parameters=sum(leaf.size for leaf in leaves.values()),
                trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(trained)),
                peak_rate=group.learning_rate,
                layer_rates=layer_rates(group, layers),
            )
        )
    return rows


def measured_rates(
    optimizer: optax.GradientTransformation, params: Tree, config: Optim, stage: Stage
) -> dict[str, np.ndarray]:
    """The rate of each trained tensor, or layer of a stack, in an optimiser's first update.

    The optimiser that a stage runs with takes a step on small tensors of the same names, whose
    weights are 0. Adam moves them by g / (g + epsilon) of the rate, g being what clipping leaves of
    a gradient of ones. Muon's are left out, which it moves by about a fifth of it.
    """
    trained = flat(split_shapes(params, stage)[0])
    shapes = {
        path: (leaf.shape[0] if is_stacked(path) else 1, *(2,) * (leaf.ndim - 1))
        for path, leaf in trained.items()
    }
    ones = nested({path: np.ones(shape, np.float32) for path, shape in shapes.items()})

    @jax.jit  # one program instead of two hundred
    def first_update(grads: Tree) -> Tree:
        zeros = jax.tree.map(jnp.zeros_like, grads)
        return optimizer.update(grads, optimizer.init(zeros), zeros)[0]

    numbers = sum(math.prod(shape) for shape in shapes.values())
    grad = min(1.0, config.clip_norm / math.sqrt(numbers))
    whole = -grad / (grad + config.epsilon)
    return {
        path: np.asarray(update, np.float64).reshape(len(update), -1)[:, 0] / whole
        for path, update in flat(first_update(ones)).items()
        if _kind(path, trained[path], config) != "muon"
    }


def split_shapes(params: Tree, stage: Stage) -> tuple[Tree, Tree]:
    """`split` of shapes."""
    return jax.eval_shape(lambda tree: split(tree, stage), params)


def check_groups(params: Tree, stage: Stage) -> None:
    """Refuses a stage that trains nothing, or layers that a stack does not have."""
    for row in rate_table(params, stage):
        asked, there = getattr(stage, row.group).trained_layers, len(row.layer_rates)
        if asked is not None and not 1 <= asked <= there:
            raise UserError(
                f"stage {stage.name}: {row.group}.trained_layers = {asked} cannot be had",
                f"the group has {there} layers" if there else "the group is no stack of layers",
                f"give 1 to {there}, or None for all" if there else "leave it None",
            )
    if not any(row.trained_parameters for row in rate_table(params, stage)):
        raise UserError(
            f"stage {stage.name}: nothing is trained",
            "every group has learning rate 0",
            "set one above 0",
        )


def _kind(path: str, leaf: Any, config: Optim) -> str:
    """`vector`: no weight decay. `matrix`: AdamW. `muon`: a layer's dense matrix, if asked for."""
    dimensions = len(leaf.shape) - is_stacked(path)
    if dimensions < 2:
        return "vector"
    return "muon" if config.matrices == "muon" and is_stacked(path) else "matrix"


def _direction(config: Optim, kind: str) -> optax.GradientTransformation:
    if kind == "muon":
        matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        muon = optax.contrib.scale_by_muon(
            weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: matrices, tree)
        )
        scale = optax.chain(
            keep_moments(muon, config.moments),
            # AdamW-sized updates, so that its rates hold: arXiv 2502.16982, section 2.2.
            optax.stateless(lambda u, _: jax.tree.map(_like_adam, u)),
        )
    else:
        scale = keep_moments(scale_by_adam(config), config.moments)
    decay = optax.identity() if kind == "vector" else optax.add_decayed_weights(config.weight_decay)
    return optax.chain(scale, decay)


def _like_adam(update: Array) -> Array:
    return update * (0.2 * max(update.shape[-2:]) ** 0.5)


def _no_age(path: Any, leaf: Any) -> Array:
    """Ages of a new tensor: one for each layer of a stack, shaped to broadcast over it."""
    names = jax.tree_util.keystr(path, simple=True, separator="/")
    layers = leaf.shape[0] if is_stacked(names) else 1
    return jnp.zeros((layers, *(1,) * (leaf.ndim - 1)), jnp.int32)

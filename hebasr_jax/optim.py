"""Which parameters are trained, at what rate: one group table, one schedule, one optimiser.

A stack of layers may be cut: its lower layers are frozen (no gradient, no moments), its upper
ones trained. `split` makes the two trees, `join` undoes it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from hebasr_jax.errors import UserError
from hebasr_jax.paths import Tree, flat, is_stacked, look_up, nested
from hebasr_jax.run_config import Group, Optim

GROUPS: tuple[tuple[str, str], ...] = (
    (r"encoder/conv.*", "conv_stem"),
    (r"encoder/layers/.*", "encoder"),
    (r"encoder/norm/.*|projector/.*", "projector"),
    (r"decoder/embed/embedding", "embedding"),  # also the output head: the two are tied
    (r"decoder/layers/.*|decoder/norm/.*", "decoder"),
)


@dataclass(frozen=True)
class RateRow:
    """One line of the table that a run prints before step 1."""

    group: str
    tensors: int
    parameters: int
    trained_parameters: int
    peak_rate: float
    layer_rates: tuple[float, ...] = ()
    """of each layer of the group's stack, 0 where frozen"""


def group_of(path: str, config: Optim) -> Group:
    """The settings of the one group that a parameter belongs to."""
    return getattr(config, look_up(GROUPS, path))


def frozen_layers(path: str, leaf: Any, config: Optim) -> int | None:
    """How many first layers of a stacked leaf are frozen; None: the whole leaf, stacked or not."""
    group = group_of(path, config)
    if group.learning_rate == 0:
        return None
    if not is_stacked(path) or group.trained_layers is None:
        return 0
    return leaf.shape[0] - group.trained_layers


def split(params: Tree, config: Optim) -> tuple[Tree, Tree]:
    """The trained and the frozen tree; a leaf of a cut stack is in both, with its own layers."""
    trained, frozen = {}, {}
    for path, leaf in flat(params).items():
        below = frozen_layers(path, leaf, config)
        if below is None:
            frozen[path] = leaf
        elif below == 0:
            trained[path] = leaf
        else:
            frozen[path], trained[path] = leaf[:below], leaf[below:]
    return nested(trained), nested(frozen)


def join(trained: Tree, frozen: Tree) -> Tree:
    """The whole tree of the two parts; inverse of `split`, in the trained part's dtype."""
    above, below = flat(trained), flat(frozen)
    joined = {}
    for path in sorted(above | below):
        parts = [part[path] for part in (below, above) if path in part]
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


def schedule(step: Array | int, steps: int, config: Optim) -> Array:
    """Share of the peak rate in the update after `step` updates: linear warm-up, then cosine.

    The first update has 1 / warmup_steps, the last of the warm-up 1, the last of all `final_rate`.
    """
    update = jnp.asarray(step, jnp.float32) + 1
    warm = jnp.minimum(update / max(config.warmup_steps, 1), 1.0)
    past = (update - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(past, 0.0, 1.0)))
    return warm * (config.final_rate + (1 - config.final_rate) * cosine)


def make_optimizer(config: Optim, trained: Tree, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then each group's AdamW or Muon, then the rates by depth.

    Args:
      trained: the trained tree or its shapes.
      steps: length of the schedule.
    """
    leaves = flat(trained)
    labels = {p: f"{look_up(GROUPS, p)}:{_kind(p, leaf, config)}" for p, leaf in leaves.items()}
    kinds = {label: label.split(":") for label in labels.values()}
    transforms = {
        label: _one_group(config, group, kind, steps) for label, (group, kind) in kinds.items()
    }
    depth = {path: _depth(path, leaf, config) for path, leaf in leaves.items()}
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.multi_transform(transforms, nested(labels)),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, nested(depth))),
    )


def rate_table(params: Tree, config: Optim) -> list[RateRow]:
    """Every group with its size, its peak rate and the rate of each of its layers."""
    rows = []
    for name in dict.fromkeys(group for _, group in GROUPS):
        group: Group = getattr(config, name)
        leaves = {p: leaf for p, leaf in flat(params).items() if look_up(GROUPS, p) == name}
        trained, _ = split_shapes(nested(leaves), config)
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


def split_shapes(params: Tree, config: Optim) -> tuple[Tree, Tree]:
    """`split` of shapes."""
    return jax.eval_shape(lambda tree: split(tree, config), params)


def check_groups(params: Tree, config: Optim) -> None:
    """Refuses a config that trains nothing, or layers that a stack does not have."""
    for row in rate_table(params, config):
        asked, there = getattr(config, row.group).trained_layers, len(row.layer_rates)
        if asked is not None and not 1 <= asked <= there:
            raise UserError(
                f"optim.{row.group}.trained_layers = {asked} cannot be had",
                f"the group has {there} layers" if there else "the group is no stack of layers",
                f"give 1 to {there}, or None for all" if there else "leave it None",
            )
    if not any(row.trained_parameters for row in rate_table(params, config)):
        raise UserError("nothing is trained", "every group has learning rate 0", "set one above 0")


def _kind(path: str, leaf: Any, config: Optim) -> str:
    """`vector`: no weight decay. `matrix`: AdamW. `muon`: a layer's dense matrix, if asked for."""
    dimensions = len(leaf.shape) - is_stacked(path)
    if dimensions < 2:
        return "vector"
    return "muon" if config.matrices == "muon" and is_stacked(path) else "matrix"


def _one_group(config: Optim, group: str, kind: str, steps: int) -> optax.GradientTransformation:
    peak = getattr(config, group).learning_rate
    if kind == "muon":
        matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        scale = optax.chain(
            optax.contrib.scale_by_muon(
                weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: matrices, tree)
            ),
            # AdamW-sized updates, so that its rates hold: arXiv 2502.16982, section 2.2.
            optax.stateless(lambda u, _: jax.tree.map(_like_adam, u)),
        )
    else:
        scale = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    decay = optax.identity() if kind == "vector" else optax.add_decayed_weights(config.weight_decay)
    return optax.chain(
        scale,
        decay,
        optax.scale_by_learning_rate(lambda step: peak * schedule(step, steps, config)),
    )


def _like_adam(update: Array) -> Array:
    return update * (0.2 * max(update.shape[-2:]) ** 0.5)


def _depth(path: str, leaf: Any, config: Optim) -> Array:
    """Multiplier of each layer's update, shaped to broadcast over the leaf."""
    layers = leaf.shape[0] if is_stacked(path) else 1
    below_top = jnp.arange(layers - 1, -1, -1)
    shape = (layers, *(1,) * (len(leaf.shape) - 1)) if is_stacked(path) else ()
    return (group_of(path, config).layer_decay ** below_top).astype(jnp.float32).reshape(shape)

"""The stages of a run: which of its steps each has, its data, its optimiser, and the way into it.

One run walks through `Config.stages`. Between two of them the weights are cut anew into a trained
and a frozen tree and the optimiser's state is carried over (`enter`); everything else goes on.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from hebasr_jax.data.draws import generator, refuse_synthetic, select_sets
from hebasr_jax.data.pipeline import Feed
from hebasr_jax.data.plan import choose_buckets
from hebasr_jax.errors import UserError
from hebasr_jax.model.asr import Params
from hebasr_jax.optim import (
    GROUPS,
    carry_over,
    check_groups,
    join,
    make_optimizer,
    measured_rates,
    rate_table,
    schedule,
    split,
    split_shapes,
)
from hebasr_jax.paths import is_stacked, look_up
from hebasr_jax.run_config import Config, Optim, Stage
from hebasr_jax.sharding import shardings
from hebasr_jax.train_step import TrainState, init_state


@dataclass(frozen=True, eq=False)
class Part:
    """One stage made ready: it takes the run from step `first` to step `last`.

    optim: the config's, its warm-up shrunk with the run. feed: its own mix, buckets and random
    draws. schedule_steps: length of the schedule that it is
    part of. epoch_steps: of its first epoch; epochs_before: passes of the stages before it.
    """

    stage: Stage
    optim: Optim
    feed: Feed
    optimizer: optax.GradientTransformation
    first: int
    last: int
    schedule_steps: int
    epoch_steps: int
    epochs_before: float

    def epoch(self, step: int) -> float:
        """Passes over the data until a step of this stage."""
        return self.epochs_before + (step - self.first) / self.epoch_steps


def make_parts(config: Config, feed: Feed, shapes: Params, row_multiple: int) -> tuple[Part, ...]:
    """The stages of a run, in order. Raises UserError where a stage's settings cannot be met.

    Args:
      feed: over all sets, as `data.train` has them.
      shapes: of the model's parameters.
    """
    for stage in config.stages:
        check_groups(shapes, stage)
    feeds = [_feed_of(feed, number, row_multiple) for number in range(len(config.stages))]
    for own in feeds:
        refuse_synthetic(own.table.sets, config.data)
    epochs = [len(own.plan(0)) for own in feeds]
    lengths = [
        stage.steps or stage.epochs * steps
        for stage, steps in zip(config.stages, epochs, strict=True)
    ]
    ends = [0, *last_steps(lengths, config.train.steps)]
    shrunk = min(1.0, ends[-1] / sum(lengths))
    optim = replace(config.optim, warmup_steps=math.ceil(config.optim.warmup_steps * shrunk))
    parts: list[Part] = []
    for number, (stage, own) in enumerate(zip(config.stages, feeds, strict=True)):
        steps = schedule_steps(config.stages, ends, number)
        trained, _ = split_shapes(shapes, stage)
        parts.append(
            Part(
                stage=stage,
                optim=optim,
                feed=own,
                optimizer=make_optimizer(optim, stage, trained, steps),
                first=ends[number],
                last=ends[number + 1],
                schedule_steps=steps,
                epoch_steps=epochs[number],
                epochs_before=parts[-1].epoch(parts[-1].last) if parts else 0.0,
            )
        )
    return tuple(parts)


def last_steps(lengths: Sequence[int], steps: int | None) -> list[int]:
    """The last step of each stage; with `steps`, stages have their shares of that many."""
    if steps is not None and steps < len(lengths):
        raise UserError(
            f"train.steps = {steps} is too few for {len(lengths)} stages",
            "each has a step at least",
            f"give {len(lengths)} or more, or None",
        )
    ends, total = np.cumsum(lengths).tolist(), sum(lengths)
    if steps is None:
        return ends
    shrunk: list[int] = []
    left = len(lengths)
    for end in ends:
        left -= 1
        least = (shrunk[-1] if shrunk else 0) + 1
        shrunk.append(min(max(round(steps * end / total), least), steps - left))
    return shrunk


def schedule_steps(stages: Sequence[Stage], ends: Sequence[int], number: int) -> int:
    """Steps of the one schedule that a stage is part of: up to the next that begins a new one.

    Args:
      ends: 0, and the last step of each stage.
    """
    begins = [n for n, stage in enumerate(stages) if stage.new_schedule or not n]
    first = max(n for n in begins if n <= number)
    following = min((n for n in begins if n > number), default=len(stages))
    return ends[following] - ends[first]


def state_shapes(part: Part, shapes: Params, mesh: Mesh) -> TrainState:
    """Shapes and shardings of a stage's state, to compile for or to restore onto."""
    trained, frozen = split_shapes(shapes, part.stage)
    state = jax.eval_shape(partial(init_state, optimizer=part.optimizer), trained, frozen)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        shardings(state, mesh),
    )


def enter(state: TrainState, part: Part, shapes: Params, mesh: Mesh) -> TrainState:
    """The state with which a stage begins, from the one that the stage before it ended with.

    Weights are the same bits, cut anew. Moments and ages are carried over for what that stage
    trained; the rest starts at zero, with a warm-up of its own, also where an earlier stage trained
    it.
    """

    def recut(state: TrainState) -> TrainState:
        trained, frozen = split(join(state.trained, state.frozen), part.stage)
        fresh = init_state(trained, frozen, part.optimizer)
        moments = carry_over(fresh.moments, state.moments, new_schedule=part.stage.new_schedule)
        return TrainState(state.step, trained, frozen, moments)

    places = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(part, shapes, mesh))
    with warnings.catch_warnings():  # what is cut anew cannot reuse the memory of its old cut
        warnings.filterwarnings("ignore", message="Some donated buffers")
        return jax.jit(recut, out_shardings=places, donate_argnums=0)(state)


def checked_rates(part: Part, shapes: Params) -> dict[str, float]:
    """Each group's peak rate, of its last layer, as the stage's own optimiser was seen to apply it.

    Raises AssertionError where any tensor's rate is not that of the table.
    """
    measured = measured_rates(part.optimizer, shapes, part.optim, part.stage)
    share = float(schedule(0, part.schedule_steps, part.optim))
    rows = {row.group: row for row in rate_table(shapes, part.stage)}
    found: dict[str, float] = {}
    for path, rates in measured.items():
        row = rows[look_up(GROUPS, path)]
        layers = [rate for rate in row.layer_rates if rate]
        asked = np.array(layers if is_stacked(path) else [row.peak_rate]) * share
        if asked.shape != rates.shape or not np.allclose(rates, asked, rtol=1e-3, atol=0):
            raise AssertionError(f"{path}: rates {asked} were asked for, {rates} are applied")
        found[row.group] = float(rates[-1]) / share if share else row.peak_rate
    return found


def _feed_of(feed: Feed, number: int, row_multiple: int) -> Feed:
    """The feed of a stage: its sets with its shares, buckets for them, and draws of its own."""
    config, stage = feed.config, feed.config.stages[number]
    if not number and not stage.mix:
        return feed
    seed = int(generator(config.seed, "stage", number).integers(2**32)) if number else config.seed
    own = replace(feed, config=replace(config, seed=seed))
    if not stage.mix:
        return own
    shares = {part.set: part.share for part in stage.mix}
    table = select_sets(feed.table, shares)
    sets = tuple(s for s in feed.sets if s.name in shares)
    buckets = choose_buckets(table, config.data, config.augment, seed, row_multiple)
    return replace(own, sets=sets, table=table, buckets=buckets)

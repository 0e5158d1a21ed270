"""Which rows can have time stamps or a context, and how likely each of them is drawn to have them.

A target is a share of all rows of the mix, as ivrit.ai defines it: a row that can have a thing
gets it with target / (share of rows that can), so that sets without it do not dilute the share.
ivrit-ai/asr-training draws once, at preparation; here each epoch draws anew.
"""

from typing import NamedTuple

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.draws import Table, compose_rows
from hebasr_jax.run_config import Augment, Data, Text
from hebasr_jax.timestamps import MAX_STAMP_S


class Target(NamedTuple):
    """Share of all rows that shall have something, and share of those that can."""

    target: float
    available: float

    @property
    def probability(self) -> float:
        """Chance of a row that can have it."""
        return min(1.0, self.target / self.available) if self.available else 0.0

    @property
    def expected(self) -> float:
        """Share of all rows that will have it."""
        return self.available * self.probability


class Targets(NamedTuple):
    """What a mix draws for its rows."""

    stamps: Target
    context: Target

    def table(self) -> list[dict[str, str | float]]:
        """A row for each, as plain values."""
        return [
            {
                "rows with": name,
                "target": one.target,
                "can have it": one.available,
                "probability": one.probability,
                "expected": one.expected,
            }
            for name, one in (("time stamps", self.stamps), ("context", self.context))
        ]

    def warnings(self) -> list[str]:
        """A line for each target that cannot be met, although all rows that can are taken."""
        return [
            f"{name} = {one.target:.3g} cannot be met: only {one.available:.3g} of the rows can "
            f"have it, and all of them do; add data that has it, or lower the target"
            for name, one in (
                ("text.stamp_share", self.stamps),
                ("text.context_share", self.context),
            )
            if one.expected < one.target - 1e-9
        ]


def row_targets(table: Table, text: Text, data: Data, augment: Augment, seed: int) -> Targets:
    """The targets of a mix, counted over the very rows of its first epoch."""
    if not (text.stamp_share or text.context_share):
        return Targets(Target(0.0, 0.0), Target(0.0, 0.0))
    rows = compose_rows(table, data, augment, seed, 0)
    stamps_R = can_stamp(table, rows.clips_C, rows.first_R, rows.speed_R, data.join_gap_s)
    context_R = table.context_C[rows.clips_C[rows.first_R[:-1]]] > 0
    return Targets(
        Target(text.stamp_share, float(stamps_R.mean())),
        Target(text.context_share, float(context_R.mean())),
    )


def can_stamp(
    table: Table, clips_C: np.ndarray, first_R: np.ndarray, speed_R: np.ndarray, gap_s: float
) -> np.ndarray:
    """Which rows can have stamps: words are spoken, all have times, and these can be written.

    Row r holds `clips_C[first_R[r] : first_R[r + 1]]`, joined with gaps.
    """
    starts_R, gaps_R = first_R[:-1], np.diff(first_R) - 1
    timed_C = table.timed_C[clips_C]
    timed_R = np.minimum.reduceat(timed_C, starts_R) >= 0
    spoken_R = np.maximum.reduceat(timed_C, starts_R) > 0
    length_s_R = np.add.reduceat(table.samples_C[clips_C], starts_R) / SAMPLE_RATE
    # The times before speed perturbation are checked as well as those after it.
    fits_R = length_s_R + gap_s * gaps_R <= MAX_STAMP_S * np.minimum(1.0, speed_R)
    return timed_R & spoken_R & fits_R

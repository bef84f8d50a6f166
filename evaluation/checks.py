"""A/A: what is equal must come out equal, or no difference in the tables means anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from evaluation.bootstrap import difference_if_equal
from evaluation.curves import Curve, Quantity, sums_along, sums_of, tokens_of
from evaluation.intervals import FloatArray, Interval, shared_tokens
from evaluation.points import Point

FEWEST_SEEDS = 4
"""Seeds from which on two halves of them are compared."""
ROUNDING = 1e-9
"""Differences below this are those of float64 sums in another order."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Two scores of the same thing."""

    name: str
    quantity: Quantity
    difference: Interval
    """Nats a token, or a fraction of tokens; 95 %."""
    exact: bool
    """Whether the two must be equal on every document, not only within chance."""
    equal: bool

    def to_json(self) -> dict[str, Any]:
        """One entry of `checks` in `evaluation.json`."""
        return vars(self) | {"difference": self.difference.to_json()}


def check_native(native: Point, again: Point) -> list[Check]:
    """Native routing scored twice on the same text: no document may differ at all."""
    tokens = shared_tokens(native.documents, again.documents)
    checks = []
    for quantity in get_args(Quantity):
        change = sums_of(native.documents, quantity) - sums_of(again.documents, quantity)
        checks.append(
            Check(
                name="native, scored again",
                quantity=quantity,
                difference=Interval(
                    mean=float(change.sum() / tokens.sum()),
                    low=float((change / tokens).min()),
                    high=float((change / tokens).max()),
                ),
                exact=True,
                equal=not change.any(),
            )
        )
    return checks


def check_seeds(curves: Sequence[Curve], computes: Sequence[float]) -> list[Check]:
    """Every other seed of one router against the rest, as the mean over the computes that all of them reach.

    Args:
        curves: One for each seed.
        computes: Fractions of native compute.

    Returns:
        A check for each quantity; none with fewer than `FEWEST_SEEDS` seeds or where no compute is reached.
    """
    if len(curves) < FEWEST_SEEDS:
        return []
    halves = [curves[::2], curves[1::2]]
    names = [" ".join(str(curve[0].seed) for curve in half) for half in halves]
    checks = []
    for quantity in get_args(Quantity):
        sums = sums_along(curves, computes, quantity)
        reached = sums[~np.isnan(sums).any(axis=(1, 2))]
        if not len(reached):
            continue
        mean: FloatArray = reached.mean(axis=0)
        difference = difference_if_equal(mean[::2], mean[1::2], tokens_of(curves[0]))
        checks.append(
            Check(
                name=f"{curves[0][0].router}, seeds {names[0]} against {names[1]}",
                quantity=quantity,
                difference=difference,
                exact=False,
                equal=difference.low <= ROUNDING and difference.high >= -ROUNDING,
            )
        )
    return checks

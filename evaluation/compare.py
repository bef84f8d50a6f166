"""One router against every other at equal compute: paired differences, and who is the best other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from evaluation.bootstrap import Gain, gain
from evaluation.curves import Curve, Curves, Quantity, scores_along, sums_along
from evaluation.intervals import FloatArray, shared_tokens

COMPUTES = (0.7, 0.6, 0.5, 0.4)
"""Fractions of native compute at which routers are compared."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The learned router against one other at the same compute, on held-out text."""

    compute: float
    """Fraction of native compute, both routers' own cost included."""
    quantity: Quantity
    rival: str
    """Name of the other router."""
    best: bool
    """Whether selection text names it the best other router at this compute in this quantity."""
    gain: Gain
    """Nats a token, or a fraction of tokens; above 0 the learned router is better."""

    def to_json(self) -> dict[str, Any]:
        """One entry of `comparisons` in `evaluation.json`."""
        return {
            "quantity": self.quantity,
            "compute": self.compute,
            "rival": self.rival,
            "best_other": self.best,
            "learned": self.gain.ours,
            "other": self.gain.theirs,
            "difference": self.gain.difference.to_json(),
            "probability_of_improvement": self.gain.probability.to_json(),
        }


def compare(
    curves: Curves, computes: Sequence[float], *, learned: str = "learned", bounds: Collection[str] = ()
) -> list[Comparison]:
    """Hold the learned router against every other at each compute.

    The best other is named by selection text, in each quantity on its own, and judged on held-out text like all.
    A router reaches a compute if all of its seeds do.

    Args:
        curves: Of all routers.
        computes: Fractions of native compute.
        learned: Name of the router that is compared.
        bounds: Routers that can't be the best other unless there is nothing else, such as those that are not causal.

    Returns:
        One comparison for each quantity, compute and router, of those that this one and the learned one reach.

    Raises:
        ValueError: If two routers were scored on different text.
    """
    if not curves.get(learned):
        return []
    rivals = {name: seeds for name, seeds in curves.items() if name != learned}
    return [
        comparison
        for quantity in get_args(Quantity)
        for comparison in _compare(curves[learned], rivals, computes, quantity, bounds)
    ]


def best_others(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those against the best other router, by compute."""
    return [comparison for comparison in comparisons if comparison.best]


def _compare(
    learned: Sequence[Curve], rivals: Curves, computes: Sequence[float], quantity: Quantity, bounds: Collection[str]
) -> list[Comparison]:
    documents = learned[0][0].held_out.documents
    ours = sums_along(learned, computes, quantity)
    theirs = {name: sums_along(seeds, computes, quantity) for name, seeds in rivals.items()}
    chosen_by = {name: scores_along(seeds, computes, quantity, "selection") for name, seeds in rivals.items()}
    comparisons = []
    for index, compute in enumerate(computes):
        if not _reached(ours[index]):
            continue
        reached = [name for name in rivals if _reached(theirs[name][index])]
        best = _best({name: float(chosen_by[name][index]) for name in reached}, bounds)
        for name in reached:
            tokens = shared_tokens(documents, rivals[name][0][0].held_out.documents)
            found = gain(ours[index], theirs[name][index], tokens)
            comparisons.append(
                Comparison(compute=compute, quantity=quantity, rival=name, best=name == best, gain=found)
            )
    return comparisons


def _reached(sums: FloatArray) -> bool:
    return not np.isnan(sums).any()


def _best(scores: dict[str, float], bounds: Collection[str]) -> str | None:
    """The router with the highest score; a bound only where there is no rival, and None where no score is known."""
    known = {name: score for name, score in scores.items() if not np.isnan(score)}
    eligible = {name: score for name, score in known.items() if name not in bounds} or known
    return max(eligible, key=lambda name: eligible[name], default=None)

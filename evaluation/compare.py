"""Routers at equal compute: interpolation along a curve, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evaluation.intervals import DocumentSums, Interval, accuracy_difference, log_likelihood_difference
from evaluation.points import Point


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The learned router against the best fixed one at the same compute."""

    compute: float
    """Fraction of native compute, both routers' own cost included."""
    rival: str
    """Name of the best fixed router at this compute."""
    difference: Interval
    """Log-likelihood of the learned router minus the rival's, nats a token; above 0 the learned one is better."""
    accuracy_difference: Interval
    """The same for accuracy, as a fraction."""
    learned_loss: float
    """Nats a token."""
    rival_loss: float
    """Nats a token."""


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points of one router that no other point beats or equals at the same or less compute, by compute."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.compute, -point.log_likelihood)):
        if not kept or point.log_likelihood > kept[-1].log_likelihood:
            kept.append(point)
    return kept


def at_compute(points: Sequence[Point], compute: float) -> DocumentSums | None:
    """Interpolate one router's curve linearly between the two frontier points around `compute`.

    Args:
        points: Points of one router, any order.
        compute: Fraction of native compute.

    Returns:
        Scores by document; None below the cheapest point. Behind the last frontier point, where paying more buys this
        router nothing, that point's scores: a budget need not be used up.
    """
    curve = frontier(points)
    if not curve or compute < curve[0].compute:
        return None
    for left, right in pairwise(curve):
        if compute <= right.compute:
            share = (compute - left.compute) / (right.compute - left.compute)
            return left.documents.mix(right.documents, share)
    return curve[-1].documents


def loss_at(points: Sequence[Point], compute: float) -> float | None:
    """Held-out loss of one router at `compute` in nats a token; None below its range."""
    scores = at_compute(points, compute)
    return None if scores is None else -scores.mean_log_likelihood


def accuracy_at(points: Sequence[Point], compute: float) -> float | None:
    """Held-out accuracy of one router at `compute` as a fraction; None below its range."""
    scores = at_compute(points, compute)
    return None if scores is None else scores.accuracy


def compute_at_accuracy(points: Sequence[Point], native_accuracy: float, share: float = 0.99) -> float | None:
    """Smallest compute from which on one router's curve keeps `share` of native accuracy.

    Args:
        points: Points of one router, any order.
        native_accuracy: Fraction of tokens that native routing predicts right.
        share: Share of it to keep.

    Returns:
        Fraction of native compute, linear between points; None if the dearest frontier point falls short.
    """
    target = share * native_accuracy
    curve = frontier(points)
    if not curve or curve[-1].accuracy < target:
        return None
    for left, right in reversed(list(pairwise(curve))):
        if left.accuracy < target:
            part = (target - left.accuracy) / (right.accuracy - left.accuracy)
            return left.compute + part * (right.compute - left.compute)
    return curve[0].compute


def compare(
    learned: Sequence[Point], rivals: Mapping[str, Sequence[Point]], computes: Sequence[float]
) -> list[Comparison]:
    """Hold the learned router against the best fixed router at each compute.

    The rival is chosen by its mean on the very text it is then judged on. That favours the rival: the reported
    advantage of the learned router is, if anything, too small.

    Args:
        learned: Points of the learned router.
        rivals: Points of each fixed router by name.
        computes: Fractions of native compute.

    Returns:
        One comparison for each compute that the learned router and at least one rival reach.
    """
    comparisons = []
    for compute in computes:
        ours = at_compute(learned, compute)
        reached = {name: scores for name in rivals if (scores := at_compute(rivals[name], compute)) is not None}
        if ours is None or not reached:
            continue
        rival = max(reached, key=lambda name: reached[name].mean_log_likelihood)
        comparisons.append(
            Comparison(
                compute=compute,
                rival=rival,
                difference=log_likelihood_difference(ours, reached[rival]),
                accuracy_difference=accuracy_difference(ours, reached[rival]),
                learned_loss=-ours.mean_log_likelihood,
                rival_loss=-reached[rival].mean_log_likelihood,
            )
        )
    return comparisons

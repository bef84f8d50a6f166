"""One number for a whole trade-off curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from evaluation.compare import accuracy_at, compute_at_accuracy
from evaluation.points import Point

Corner = tuple[float, float]
"""Compute as a fraction of native, accuracy as a fraction of tokens."""


def summarize(
    curves: Mapping[str, Sequence[Point]], *, native_accuracy: float, random_accuracy: float
) -> dict[str, dict[str, float | None]]:
    """The `summary` of `evaluation.json`.

    Args:
        curves: Points of each router by name.
        native_accuracy: Fraction of tokens that native routing predicts right.
        random_accuracy: The same for uniform-random routing: the reference of the hypervolume.

    Returns:
        By router: `hypervolume`, `aiq`, and `compute_at_99_accuracy` and `accuracy_at_50_compute`, None out of reach.
    """
    largest = max(point.compute for points in curves.values() for point in points)
    summary = {}
    for name, points in curves.items():
        corners = [(point.compute, point.accuracy) for point in points]
        summary[name] = {
            "hypervolume": hypervolume(corners, random_accuracy),
            "aiq": average_quality(corners, largest),
            "compute_at_99_accuracy": compute_at_accuracy(points, native_accuracy, 0.99),
            "accuracy_at_50_compute": accuracy_at(points, 0.5),
        }
    return summary


def hypervolume(corners: Iterable[Corner], reference_accuracy: float, reference_compute: float = 1.0) -> float:
    """Area that the points dominate, up to native compute and down to the reference accuracy.

    Args:
        corners: (compute, accuracy) of one router.
        reference_accuracy: Fraction; points below it add nothing.
        reference_compute: Fraction of native compute; points above it add nothing.

    Example: one point (0.5, 0.6) with references 0.2 and 1.0 dominates 0.5 * 0.4 = 0.2.
    Source: Zitzler and Thiele, IEEE Transactions on Evolutionary Computation 3(4), 1999.
    """
    steps = [corner for corner in _staircase(corners) if corner[0] < reference_compute]
    return sum(
        (end - compute) * max(0.0, accuracy - reference_accuracy)
        for (compute, accuracy), (end, _) in pairwise([*steps, (reference_compute, 0.0)])
    )


def average_quality(corners: Iterable[Corner], largest_compute: float) -> float:
    """AIQ: area under the non-decreasing convex hull, extended flat to `largest_compute`, over that compute.

    Args:
        corners: (compute, accuracy) of one router; at least one.
        largest_compute: Largest compute of any router that is compared.

    Example: points (0.2, 0.4) and (0.6, 0.8) with largest compute 1.0 give 0.24 + 0.32 = 0.56.
    Source: RouterBench, arXiv:2403.12031.
    """
    hull: list[Corner] = []
    for corner in _staircase(corners):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], corner):
            hull.pop()
        hull.append(corner)
    hull.append((largest_compute, hull[-1][1]))
    return sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(hull)) / largest_compute


def _staircase(corners: Iterable[Corner]) -> list[Corner]:
    """Corners that no other beats or equals in accuracy at the same or less compute, by compute."""
    kept: list[Corner] = []
    for corner in sorted(corners, key=lambda corner: (corner[0], -corner[1])):
        if not kept or corner[1] > kept[-1][1]:
            kept.append(corner)
    return kept


def _slope(left: Corner, right: Corner) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])

"""One number for a whole trade-off curve, with its interval over seeds and documents.

Settings are chosen by their scores on selection text; what is added up is their held-out accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evaluation.bootstrap import seed_draws
from evaluation.curves import Curve, Curves, Scored, frontier, sums_along, tokens_of
from evaluation.intervals import FloatArray, Interval, document_weights, percentile_interval

Measure = Callable[[Curve, FloatArray], FloatArray]
"""From a curve and document weights (num_resamples, num_documents) to one number for each resample; infinite where it
is out of reach."""


def summarize(curves: Curves, *, random_accuracy: float) -> dict[str, dict[str, Any]]:
    """The `summary` of `evaluation.json`.

    Args:
        curves: Of all routers.
        random_accuracy: Fraction of tokens that uniform-random routing predicts right: reference of the hypervolume.

    Returns:
        By router: means over seeds of `hypervolume`, `aiq`, `compute_at_99_accuracy` and `accuracy_at_50_compute`, None
        if a seed does not reach it; `seeds`, how many; and `intervals` of those that are not None.
    """
    largest = max(point.held_out.compute for seeds in curves.values() for curve in seeds for point in curve)
    measures: dict[str, Measure] = {
        "hypervolume": lambda curve, weights: _hypervolume(curve, weights, random_accuracy, 1.0),
        "aiq": lambda curve, weights: _average_quality(curve, weights, largest),
        "compute_at_99_accuracy": lambda curve, weights: _compute_at_accuracy(curve, weights, 0.99),
        "accuracy_at_50_compute": lambda curve, weights: _accuracy_at(curve, weights, 0.5),
    }
    summary = {}
    for name, seeds in curves.items():
        found = {key: over_seeds(seeds, measure) for key, measure in measures.items()}
        summary[name] = {
            **{key: None if interval is None else interval.mean for key, interval in found.items()},
            "seeds": len(seeds),
            "intervals": {key: interval.to_json() for key, interval in found.items() if interval is not None},
        }
    return summary


def over_seeds(curves: Sequence[Curve], measure: Measure) -> Interval | None:
    """Mean of a measure over seeds, with its interval over drawn seeds and documents.

    Returns:
        None if a seed is out of reach; an end of the interval is infinite if that resample's is.
    """
    num_documents = len(tokens_of(curves[0]))
    estimate = float(np.mean([measure(curve, np.ones((1, num_documents)))[0] for curve in curves]))
    if not np.isfinite(estimate):
        return None
    samples = np.stack([measure(curve, document_weights(num_documents)) for curve in curves], axis=1)
    drawn = np.take_along_axis(samples, seed_draws(len(curves), 0), axis=1)
    return percentile_interval(estimate, drawn.mean(axis=1))


def hypervolume(curve: Curve, reference_accuracy: float, reference_compute: float = 1.0) -> float:
    """Area under the chosen settings, up to native compute and down to the reference accuracy.

    Those settings are chosen that no other beats or equals in accuracy at the same or less compute on selection text.

    Args:
        curve: Settings of one router.
        reference_accuracy: Fraction; settings below it add nothing.
        reference_compute: Fraction of native compute; settings above it add nothing.

    Example: one setting (0.5, 0.6) with references 0.2 and 1.0 spans 0.5 * 0.4 = 0.2.
    Source: Zitzler and Thiele, IEEE Transactions on Evolutionary Computation 3(4), 1999.
    """
    return float(_hypervolume(curve, _as_it_is(curve), reference_accuracy, reference_compute)[0])


def average_quality(curve: Curve, largest_compute: float) -> float:
    """AIQ: area under the non-decreasing convex hull, extended flat to `largest_compute`, over that compute.

    The settings on the hull are chosen on selection text; the area is that under their held-out scores.

    Args:
        curve: Settings of one router; at least one.
        largest_compute: Largest compute of any router that is compared.

    Example: settings (0.2, 0.4) and (0.6, 0.8) with largest compute 1.0 give 0.24 + 0.32 = 0.56.
    Source: RouterBench, arXiv:2403.12031.
    """
    return float(_average_quality(curve, _as_it_is(curve), largest_compute)[0])


def compute_at_accuracy(curve: Curve, share: float = 0.99) -> float | None:
    """Smallest compute from which on one router's curve keeps `share` of native accuracy on held-out text.

    Args:
        curve: Settings of one router.
        share: Share of native accuracy to keep.

    Returns:
        Fraction of native compute, linear between settings; None if the dearest chosen setting falls short.
    """
    if not curve:
        return None
    compute = float(_compute_at_accuracy(curve, _as_it_is(curve), share)[0])
    return compute if np.isfinite(compute) else None


def _as_it_is(curve: Curve) -> FloatArray:
    """Weights of the text itself: every document once."""
    return np.ones((1, len(tokens_of(curve))))


def _hypervolume(curve: Curve, weights: FloatArray, reference_accuracy: float, reference_compute: float) -> FloatArray:
    chosen = _by_compute(_staircase(curve))
    ends = np.append([point.held_out.compute for point in chosen], reference_compute)
    widths = np.diff(np.minimum(ends, reference_compute))
    heights = np.maximum(_accuracies(chosen, weights) - reference_accuracy, 0.0)
    area: FloatArray = heights @ widths
    return area


def _average_quality(curve: Curve, weights: FloatArray, largest_compute: float) -> FloatArray:
    chosen = _by_compute(_hull(curve))
    accuracies = _accuracies(chosen, weights)
    computes = np.array([point.held_out.compute for point in chosen] + [largest_compute])
    heights = np.concatenate([accuracies, accuracies[:, -1:]], axis=1)
    area: FloatArray = (heights[:, :-1] + heights[:, 1:]) @ np.diff(computes) / 2
    return area / largest_compute


def _compute_at_accuracy(curve: Curve, weights: FloatArray, share: float) -> FloatArray:
    chosen = frontier(curve)
    computes = np.array([point.held_out.compute for point in chosen])
    accuracies = _accuracies(chosen, weights)
    native = chosen[0].held_out.native_documents
    target = share * (weights @ native.correct) / (weights @ native.tokens)
    below = accuracies < target[:, None]
    left = len(chosen) - 1 - np.argmax(below[:, ::-1], axis=1)  # the last setting that falls short
    right = np.minimum(left + 1, len(chosen) - 1)
    rows = np.arange(len(weights))
    low, high = accuracies[rows, left], accuracies[rows, right]
    part = (target - low) / np.where(high > low, high - low, 1.0)
    between = computes[left] + part * (computes[right] - computes[left])
    reached = np.where(below[:, -1], np.inf, between)
    return np.where(below.any(axis=1), reached, computes[0])


def _accuracy_at(curve: Curve, weights: FloatArray, compute: float) -> FloatArray:
    correct = sums_along([curve], [compute], "accuracy")[0, 0]
    accuracy: FloatArray = weights @ correct / (weights @ tokens_of(curve))
    return np.where(np.isnan(accuracy), np.inf, accuracy)


def _accuracies(points: Sequence[Scored], weights: FloatArray) -> FloatArray:
    """Held-out accuracy of each setting on weighted documents (num_resamples, num_settings)."""
    correct = np.stack([point.held_out.documents.correct for point in points], axis=1)
    accuracies: FloatArray = weights @ correct / (weights @ tokens_of(points))[:, None]
    return accuracies


def _by_compute(points: Sequence[Scored]) -> list[Scored]:
    return sorted(points, key=lambda point: point.held_out.compute)


def _staircase(curve: Curve) -> list[Scored]:
    """Settings that no other beats or equals in accuracy at the same or less compute on selection text."""
    kept: list[Scored] = []
    for point in sorted(curve, key=lambda point: (point.selection.compute, -point.selection.accuracy)):
        if not kept or point.selection.accuracy > kept[-1].selection.accuracy:
            kept.append(point)
    return kept


def _hull(curve: Curve) -> list[Scored]:
    """Settings of the staircase on its concave hull, on selection text."""
    hull: list[Scored] = []
    for point in _staircase(curve):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: Scored, right: Scored) -> float:
    rise = right.selection.accuracy - left.selection.accuracy
    return rise / (right.selection.compute - left.selection.compute)

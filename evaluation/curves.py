"""The trade-off curve of a router: its settings are chosen on one text and reported on another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evaluation.bootstrap import iqm
from evaluation.intervals import DocumentSums, FloatArray
from evaluation.points import Point

Text = Literal["selection", "held_out"]
Quantity = Literal["log_likelihood", "accuracy"]
"""What is compared: nats a token, or a fraction of tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """One router at one setting on two texts: the first decides what is chosen, the second is what is reported."""

    selection: Point
    held_out: Point

    @classmethod
    def on_one_text(cls, point: Point) -> Scored:
        """Chosen and shown by the same scores, which flatters; for looks during training, not for results."""
        return cls(selection=point, held_out=point)

    @property
    def router(self) -> str:
        """Name of the router."""
        return self.held_out.router

    @property
    def seed(self) -> int | None:
        """Seed of the router; None where nothing is drawn."""
        return self.held_out.seed

    @property
    def causal(self) -> bool:
        """Whether every choice looks at nothing but earlier tokens; others could not decode."""
        return bool(self.held_out.setting.get("causal", True))

    def to_json(self) -> dict[str, Any]:
        """One entry of `points` in `evaluation.json`: the held-out point, and what it was chosen by."""
        chosen_by = self.selection
        selection = {
            "compute": chosen_by.compute,
            "accuracy": chosen_by.accuracy,
            "log_likelihood": chosen_by.log_likelihood,
        }
        return self.held_out.to_json() | {"causal": self.causal, "selection": selection}


Curve = Sequence[Scored]
"""All settings of one router with one seed, in any order."""
Curves = Mapping[str, Sequence[Curve]]
"""The curves of each router, one for each of its seeds."""


def group_curves(scored: Iterable[Scored]) -> dict[str, list[Curve]]:
    """Curves of each router by name, in the order in which they come."""
    groups: dict[str, dict[int | None, list[Scored]]] = {}
    for point in scored:
        groups.setdefault(point.router, {}).setdefault(point.seed, []).append(point)
    return {name: list(seeds.values()) for name, seeds in groups.items()}


def frontier(curve: Curve, text: Text = "held_out") -> list[Scored]:
    """Settings that no other beats or equals in loss at the same or less compute, judged on selection text.

    Args:
        curve: Settings of one router.
        text: By whose compute they are ordered.
    """
    kept: list[Scored] = []
    for point in sorted(curve, key=lambda point: (point.selection.compute, point.selection.loss)):
        if not kept or point.selection.loss < kept[-1].selection.loss:
            kept.append(point)
    return sorted(kept, key=lambda point: getattr(point, text).compute)


def at_compute(curve: Curve, compute: float, text: Text = "held_out") -> DocumentSums | None:
    """Interpolate one router's curve linearly between the two chosen settings around `compute`.

    Args:
        curve: Settings of one router; selection text chooses those that the curve runs through.
        compute: Fraction of native compute, as spent on `text`.
        text: Whose scores are returned.

    Returns:
        Scores by document; None below the cheapest chosen setting. Above the dearest, where paying more buys this
        router nothing, that one's scores: a budget need not be used up.
    """
    if not curve:
        return None
    log_likelihood = sums_along([curve], [compute], "log_likelihood", text)[0, 0]
    if np.isnan(log_likelihood[0]):
        return None
    correct = sums_along([curve], [compute], "accuracy", text)[0, 0]
    return DocumentSums(tokens=tokens_of(curve, text), log_likelihood=log_likelihood, correct=correct)


def loss_at(curve: Curve, compute: float) -> float | None:
    """Held-out loss of one router at `compute` in nats a token; None below its range."""
    scores = at_compute(curve, compute)
    return None if scores is None else -scores.mean_log_likelihood


def accuracy_at(curve: Curve, compute: float) -> float | None:
    """Held-out accuracy of one router at `compute` as a fraction; None below its range."""
    scores = at_compute(curve, compute)
    return None if scores is None else scores.accuracy


def tokens_of(curve: Curve, text: Text = "held_out") -> FloatArray:
    """Tokens of each document of the text (num_documents,), float64."""
    tokens: FloatArray = getattr(curve[0], text).documents.tokens
    return tokens


def sums_along(
    curves: Sequence[Curve], computes: Sequence[float], quantity: Quantity, text: Text = "held_out"
) -> FloatArray:
    """What `at_compute` gives at many computes for all seeds of a router.

    Args:
        curves: One for each seed, none of them empty.
        computes: Fractions of native compute.
        quantity: What is summed over the tokens of a document.
        text: Whose scores.

    Returns:
        Sums (num_computes, num_seeds, num_documents), float64; NaN at a compute that this seed does not reach.
    """
    sums = []
    for curve in curves:
        points: list[Point] = [getattr(point, text) for point in frontier(curve, text)]
        weights = _mixture(np.array([point.compute for point in points]), np.asarray(computes, dtype=np.float64))
        sums.append(weights @ np.stack([sums_of(point.documents, quantity) for point in points]))
    return np.stack(sums, axis=1)


def scores_along(
    curves: Sequence[Curve], computes: Sequence[float], quantity: Quantity, text: Text = "held_out"
) -> FloatArray:
    """Interquartile mean over the seeds of a router (num_computes,), a token; NaN where a seed does not reach."""
    sums = sums_along(curves, computes, quantity, text)
    return iqm(sums.sum(-1) / tokens_of(curves[0], text).sum())


def cache_along(curves: Sequence[Curve], computes: Sequence[float]) -> FloatArray:
    """Held-out keys and values kept at each compute, as a share of native; interpolated as scores are.

    Points without `cache`, whose routing drops nothing, count as 1. Otherwise as `f1_along`.
    """
    return _along(curves, computes, lambda point: 1.0 if point.cache is None else point.cache)


def f1_along(curves: Sequence[Curve], computes: Sequence[float]) -> FloatArray:
    """Held-out F1 of entities at each compute; interpolated as scores are, as a mixture of two settings would tag.

    Args:
        curves: One for each seed, none of them empty.
        computes: Fractions of native compute.

    Returns:
        Interquartile mean over the seeds (num_computes,), float64; NaN where a seed does not reach.
    """
    return _along(curves, computes, lambda point: float("nan") if point.f1 is None else point.f1)


def compute_at_f1(curve: Curve, least: float) -> float | None:
    """Smallest compute from which on one router's settings keep a held-out F1, linear between; None if none does."""
    points = [point.held_out for point in frontier(curve)]
    computes, scores = [point.compute for point in points], [point.f1 or 0.0 for point in points]
    below = [index for index, score in enumerate(scores) if score < least]
    if not below:
        return computes[0]
    last = below[-1]
    if last + 1 == len(points):
        return None
    share = (least - scores[last]) / (scores[last + 1] - scores[last])
    return computes[last] + share * (computes[last + 1] - computes[last])


def _along(curves: Sequence[Curve], computes: Sequence[float], measure: Callable[[Point], float]) -> FloatArray:
    """Interquartile mean over seeds of what `measure` says of held-out points at each compute (num_computes,)."""
    values = []
    for curve in curves:
        points = [point.held_out for point in frontier(curve)]
        weights = _mixture(np.array([point.compute for point in points]), np.asarray(computes, dtype=np.float64))
        values.append(weights @ np.array([measure(point) for point in points]))
    return iqm(np.stack(values, axis=1))


def sums_of(documents: DocumentSums, quantity: Quantity) -> FloatArray:
    """Sum over the tokens of each document (num_documents,), float64: nats, or tokens that were right."""
    return documents.log_likelihood if quantity == "log_likelihood" else documents.correct


def _mixture(settings: FloatArray, computes: FloatArray) -> FloatArray:
    """Weights (num_computes, num_settings) of the neighbours of each compute; `settings` ascend."""
    last = len(settings) - 1
    right = np.searchsorted(settings, computes)  # settings[right - 1] < compute <= settings[right]
    lower, upper = np.where(right > last, last, np.maximum(right - 1, 0)), np.minimum(right, last)
    gap = settings[upper] - settings[lower]
    share = np.where(gap > 0, computes - settings[lower], 1.0) / np.where(gap > 0, gap, 1.0)
    weights = np.zeros((len(computes), len(settings)))
    rows = np.arange(len(computes))
    weights[rows, lower] += 1 - share
    weights[rows, upper] += share
    weights[computes < settings[0]] = np.nan
    return weights

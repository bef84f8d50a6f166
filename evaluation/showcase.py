"""Which routers at which settings are worth a closer look."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np

from evaluation.evaluator import PointSpec
from evaluation.points import Point

COMPUTES = (0.7, 0.5, 0.4)
"""Fractions of native compute near which a router is looked at."""
RIVAL_COMPUTE = 0.5
"""Fraction of native compute at which the best other router is chosen and looked at."""

Setting = TypeVar("Setting")


def showcase(
    specs: Sequence[PointSpec],
    points: Sequence[Point],
    *,
    learned: str = "learned",
    best: str | None = None,
    bounds: Collection[str] = (),
) -> list[PointSpec]:
    """What is worth a closer look: the learned router near three computes, and the best other one near 0.5.

    Args:
        specs: Routers at their settings; one with `score_on` is no router of the backbone, and is left out.
        points: What each of them scored, in the same order; of several seeds the first is shown.
        learned: Name of the learned router; without it the best other router is shown near all three computes.
        best: Name of the best other router; if None, or one that is left out, the one with the best log-likelihood
            within compute 0.5.
        bounds: Routers that are no rivals, such as oracles and those that are not causal.

    Returns:
        Specs on the routers' frontiers, each once, the learned router's first.
    """
    curves: dict[str, list[tuple[PointSpec, Point]]] = {}
    for spec, point in zip(specs, points, strict=True):
        curve = curves.get(point.router, [(spec, point)])
        if not hasattr(spec, "score_on") and curve[0][1].seed == point.seed:
            curves.setdefault(point.router, []).append((spec, point))
    rivals = [name for name in curves if name != learned and name not in bounds]
    if best not in rivals:
        best = max(rivals, key=lambda name: _quality([point for _, point in curves[name]]), default=None)
    wanted = [(learned, compute) for compute in COMPUTES if learned in curves]
    if best is not None:
        wanted += [(best, compute) for compute in ((RIVAL_COMPUTE,) if wanted else COMPUTES)]
    chosen = [nearest(curves[name], compute, lambda pair: _scores(pair[1]))[0] for name, compute in wanted]
    return list({id(spec): spec for spec in chosen}.values())


def nearest(settings: Sequence[Setting], compute: float, scores: Callable[[Setting], tuple[float, float]]) -> Setting:
    """The setting whose compute is nearest, of those that no other beats in log-likelihood at less or equal compute.

    Args:
        settings: Of one router.
        compute: Fraction of native compute.
        scores: Gives the compute and the log-likelihood of a setting.
    """
    best = -np.inf
    kept = []
    for setting in sorted(settings, key=lambda setting: (scores(setting)[0], -scores(setting)[1])):
        if scores(setting)[1] > best:
            best = scores(setting)[1]
            kept.append(setting)
    return min(kept, key=lambda setting: abs(scores(setting)[0] - compute))


def _scores(point: Point) -> tuple[float, float]:
    return point.compute, point.log_likelihood


def _quality(points: Sequence[Point]) -> float:
    """Best log-likelihood within `RIVAL_COMPUTE` in nats a token; minus infinity for a router that costs more."""
    return max((point.log_likelihood for point in points if point.compute <= RIVAL_COMPUTE), default=-np.inf)

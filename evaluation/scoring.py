"""Scores every router at every setting on both texts."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.curves import Scored
from evaluation.evaluator import Evaluator, PointSpec
from evaluation.points import Point
from moe_backbone import ranks


def score_all(specs: Sequence[PointSpec], selection: Evaluator, held_out: Evaluator) -> list[Scored]:
    """Score in order, shared out over ranks, behind a progress bar that shows the time left.

    A spec may also have `price` (nats per native compute), `seed` (else one in its setting is taken), and
    `score_on(evaluator)`, which gives the point where running `router` on the evaluator's backbone would not.

    Args:
        specs: Routers at their settings.
        selection: Windows that choose.
        held_out: Windows that are reported.
    """
    own, scored = specs[ranks.rank() :: ranks.world_size()], []
    for spec in (bar := ranks.bar(own, desc="evaluating", unit="setting")):
        bar.set_postfix_str(spec.name)
        scored.append(Scored(selection=_score(spec, selection), held_out=_score(spec, held_out)))
    parts = ranks.gather(scored)
    return [parts[place % len(parts)][place // len(parts)] for place in range(len(specs))]


def _score(spec: PointSpec, evaluator: Evaluator) -> Point:
    if hasattr(spec, "score_on"):
        point: Point = spec.score_on(evaluator)
        return point
    price, seed = getattr(spec, "price", 0.0), getattr(spec, "seed", spec.setting.get("seed"))
    return evaluator.score(spec.name, spec.router, setting=spec.setting, price=price, seed=seed)

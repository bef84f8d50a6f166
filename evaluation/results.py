"""Everything that was scored, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from evaluation.checks import Check
from evaluation.compare import COMPUTES, Comparison, best_others, compare
from evaluation.curves import Curve, Scored, group_curves
from evaluation.evaluator import Evaluator, PointSpec
from evaluation.headroom import HeadroomPoint
from evaluation.points import Point
from evaluation.summary import summarize


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All routers on both texts."""

    selection: Evaluator
    """Windows that choose."""
    held_out: Evaluator
    """Windows that are reported."""
    specs: list[PointSpec]
    """All settings of all routers, native aside."""
    scored: list[Scored]
    """What each of `specs` scored."""
    bounds: frozenset[str]
    """Routers that can't be the best other one."""
    checks: list[Check]
    """A/A: what must come out equal."""
    control: Point | None = None
    """Native routing of a backbone that was trained on as long as this one, but without a router; None if it was not
    trained on."""
    headroom: list[HeadroomPoint] = field(default_factory=list)
    """What an oracle reaches on sampled tokens; empty where it was not asked for."""

    @cached_property
    def curves(self) -> dict[str, list[Curve]]:
        """One curve for each seed of each router: learned, then each best other, then the rest by AIQ, then bounds."""
        groups = group_curves(self.scored)
        summary = summarize(groups, random_accuracy=0.0)
        best = {comparison.rival for comparison in best_others(compare(groups, COMPUTES, bounds=self.bounds))}

        def place(name: str) -> tuple[bool, bool, bool, float]:
            return name != "learned", name in self.bounds, name not in best, -summary[name]["aiq"]

        return {name: groups[name] for name in sorted(groups, key=place)}

    @cached_property
    def summary(self) -> dict[str, dict[str, Any]]:
        """Numbers for whole curves; random routing is the reference of the hypervolume."""
        drawn = [curve for name in ("random-subset", "random-k") for curve in self.curves.get(name, [])]
        chance = min((point.held_out.accuracy for curve in drawn for point in curve), default=0.0)
        summary = summarize(self.curves, random_accuracy=chance)
        return {name: entry | {"rival": name not in self.bounds} for name, entry in summary.items()}

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The learned router against every other."""
        return compare(self.curves, COMPUTES, bounds=self.bounds)

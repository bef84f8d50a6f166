"""Greedy search over static heads and expert thresholds, site by site: the strongest router without learning."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_backbone import ranks
from moe_backbone.checks import require, require_at_least
from moe_backbone.compute import native_shares
from moe_backbone.sites import Backbone
from policies.baselines.prefix import Outcome, PrefixCache
from policies.baselines.site_rules import ExpertRule, HeadRule, PerSiteRules, SiteRule, expert_ladder, native_rules


@dataclass(frozen=True, kw_only=True)
class GreedyConfig:
    """How far and how thoroughly to search.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    stop_compute: float = 0.3
    """Stop at this fraction of native compute."""
    lookahead: int = 6
    """Cheaper expert rules tried at every site, next ones first."""
    least_saving: float = 0.003
    """Smallest fraction of native compute for which an expert rule counts as cheaper: tiny steps drown in noise."""
    moves: int = 2
    """Most moves of a step; all in different layers."""
    refresh: int = 8
    """Fewest candidates evaluated at a step, those that looked best before; more while one may be among the best."""
    refresh_all_every: int = 8
    """Steps from one evaluation of all candidates to the next."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "lookahead", "moves", "refresh", "refresh_all_every")
        for name in ("stop_compute", "least_saving"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class GreedyPoint:
    """One step of the search."""

    router: PerSiteRules
    loss: float
    """On the training text, nats a token."""
    compute: float
    """On the training text, fraction of native compute."""

    def to_json(self) -> dict[str, Any]:
        """The point as JSON values."""
        return {"rules": self.router.to_json(), "loss": self.loss, "compute": self.compute}

    @classmethod
    def from_json(cls, point: dict[str, Any]) -> GreedyPoint:
        """Read what `to_json` wrote, also after a way through a file."""
        return cls(router=PerSiteRules.from_json(point["rules"]), loss=point["loss"], compute=point["compute"])


@dataclass(frozen=True, kw_only=True)
class Move:
    """Another rule for one site, as it was last evaluated."""

    index: int
    layer: int
    rule: SiteRule
    outcome: Outcome
    price: float
    """Rise of the loss per compute saved, nats per native compute; infinite if nothing is saved."""


class GreedySearch:
    """From native routing downwards, always the moves that raise the loss least per compute saved.

    A move takes one head from a site, or gives an expert site one of its next cheaper rules. Evaluating a move runs
    only the sites from the changed one on. Prices mostly rise as units go, so most steps evaluate moves in order of
    their last price until no other can be among the best; every few steps evaluate all.

    Args:
        backbone: What computes.
        tokens: Training text (num_sequences, seq_len), int64; about 8,000 tokens.
        targets: Next tokens, same shape.
        config: How far and how thoroughly to search.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor, targets: Tensor, config: GreedyConfig | None = None) -> None:
        self.sites = backbone.sites
        self.config = config or GreedyConfig()
        self._cache = PrefixCache(backbone, tokens, targets)
        self._shares = native_shares(self._cache.meter).tolist()
        self._prices: dict[tuple[int, Hashable], float] = {}

    def run(self, points: Sequence[GreedyPoint] = (), *, progress: bool = True) -> list[GreedyPoint]:
        """Search until `stop_compute` or until no move saves compute.

        Args:
            points: Steps of an earlier run on the same text, to go on from. All candidates are evaluated anew, so the
                steps may differ slightly from those of a run in one go.
            progress: Whether to show a progress bar.

        Returns:
            `points` and the steps after them, native first; compute falls from each to the next.
        """
        router = points[-1].router if points else native_rules(self.sites)
        outcome = self._cache.follow(router)
        path = list(points) or [_point(router, outcome)]
        self._prices.clear()
        stop, every = self.config.stop_compute, self.config.refresh_all_every
        with ranks.bar(total=100, desc="greedy search", unit="%", disable=not progress) as bar:
            while path[-1].compute > stop and (point := self._step(path[-1], everything=len(path) % every == 0)):
                path.append(point)
                bar.update(min(100.0, round(100 * (1 - point.compute) / (1 - stop), 1)) - bar.n)
                bar.set_postfix(compute=f"{point.compute:.3f}", loss=f"{point.loss:.4f}")
        return path

    def _step(self, point: GreedyPoint, *, everything: bool) -> GreedyPoint | None:
        """Take the best moves from `point`; None if no move saves compute."""
        moves = self._evaluate_moves(point, everything=everything)
        if not moves:
            return None
        taken: list[Move] = []
        for move in moves:
            if len(taken) < self.config.moves and move.layer not in {other.layer for other in taken}:
                taken.append(move)
        return self._take(point, taken)

    def _take(self, point: GreedyPoint, moves: list[Move]) -> GreedyPoint:
        """Apply moves together; the first alone if the others, through what they change downstream, save nothing."""
        first = min(move.index for move in moves)
        router = point.router
        for move in moves:
            router = router.with_rule(move.index, move.rule)
        outcome = self._cache.follow(router, first)
        if len(moves) > 1 and outcome.compute >= moves[0].outcome.compute:
            router = point.router.with_rule(moves[0].index, moves[0].rule)
            outcome = self._cache.follow(router, first)
        return _point(router, outcome)

    def _evaluate_moves(self, point: GreedyPoint, *, everything: bool) -> list[Move]:
        """Moves that save compute, best price first; unless `everything`, only while one may be among the best."""
        candidates = self._candidates(point.router)
        moves: list[Move] = []
        for key in sorted(candidates, key=lambda key: self._prices.get(key, -math.inf)):
            enough = len(moves) >= self.config.refresh and not everything
            if enough and self._prices.get(key, -math.inf) > moves[: self.config.moves][-1].price:
                break
            move = self._evaluate(point, key[0], candidates[key])
            insort(moves, move, key=lambda move: move.price)
            self._prices[key] = move.price
        return [move for move in moves if move.price < math.inf]

    def _evaluate(self, point: GreedyPoint, index: int, rule: SiteRule) -> Move:
        outcome = self._cache.measure(point.router.with_rule(index, rule), index)
        saved = point.compute - outcome.compute
        price = (outcome.loss - point.loss) / saved if saved > 0 else math.inf
        return Move(index=index, layer=self.sites[index].layer, rule=rule, outcome=outcome, price=price)

    def _candidates(self, router: PerSiteRules) -> dict[tuple[int, Hashable], SiteRule]:
        """Next rules by site and by what names the move: the head taken away, or the new expert rule."""
        candidates: dict[tuple[int, Hashable], SiteRule] = {}
        for index, rule in enumerate(router.rules):
            if isinstance(rule, HeadRule):
                candidates |= {(index, head): rule.without(head) for head in rule.kept}
            else:
                candidates |= {(index, cheaper): cheaper for cheaper in self._cheaper_rules(index, rule)}
        return candidates

    def _cheaper_rules(self, index: int, rule: ExpertRule) -> list[ExpertRule]:
        """The next rungs down, on the tokens as they reach the site; rungs that choose alike stand once."""
        scores = self._cache.view(index).scores
        present = self._mean_compute(index, rule, scores)
        by_compute: dict[float, ExpertRule] = {}
        for rung in expert_ladder(self.sites[index]):
            compute = self._mean_compute(index, rung, scores)
            if compute <= present - self.config.least_saving:
                by_compute.setdefault(compute, rung)
        return [by_compute[compute] for compute in sorted(by_compute, reverse=True)[: self.config.lookahead]]

    def _mean_compute(self, index: int, rule: ExpertRule, scores: Tensor) -> float:
        return rule.counts(scores).double().mean().item() * self._shares[index]


def _point(router: PerSiteRules, outcome: Outcome) -> GreedyPoint:
    return GreedyPoint(router=router, loss=outcome.loss, compute=outcome.compute)

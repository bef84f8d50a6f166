"""One static rule for every site: what greedy search moves through, and the router it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_backbone.sites import RoutingSite, SiteView, best_units

THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.75, 0.9)
"""Gate probabilities, fractions; cover the range between all native experts and none for small and large gates."""


@dataclass(frozen=True, kw_only=True)
class HeadRule:
    """The same heads for every token."""

    kept: tuple[int, ...]
    """Heads that run, ascending."""

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        units = torch.zeros(view.site.num_units, dtype=torch.bool)
        units[list(self.kept)] = True
        return units.to(view.scores.device).expand(view.scores.shape)

    def without(self, head: int) -> HeadRule:
        """The rule with one head fewer."""
        return HeadRule(kept=tuple(unit for unit in self.kept if unit != head))


@dataclass(frozen=True, kw_only=True)
class ExpertRule:
    """Experts above a gate probability, with a least and a greatest number."""

    most: int
    """Experts a token uses at most, the best by gate score."""
    above: float = 0.0
    """Gate probability that an expert must exceed, a fraction."""
    least: int = 0
    """Experts a token uses even where they do not exceed it."""

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units).

        Example: probabilities (.5, .3, .2) give the first two experts for most 2 and above .1, the first alone for
        above .4, none for above .6, and the first alone again for above .6 with least 1.
        """
        return best_units(view.scores, self.counts(view.scores))

    def counts(self, scores: Tensor) -> Tensor:
        """Experts that each token uses: int64 (num_tokens,)."""
        return (scores.exp() > self.above).sum(1).clamp(self.least, self.most)


SiteRule = HeadRule | ExpertRule


@dataclass(frozen=True)
class PerSiteRules:
    """A router with one static rule for every site."""

    rules: tuple[SiteRule, ...]
    """In running order of the sites."""

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return self.rules[view.index].select(view)

    def with_rule(self, index: int, rule: SiteRule) -> PerSiteRules:
        """The same rules, but `rule` at site `index`."""
        return replace(self, rules=(*self.rules[:index], rule, *self.rules[index + 1 :]))

    def to_json(self) -> list[dict[str, Any]]:
        """The rules as JSON values, one object a site."""
        return [asdict(rule) for rule in self.rules]

    @classmethod
    def from_json(cls, rules: Sequence[dict[str, Any]]) -> PerSiteRules:
        """Read what `to_json` wrote, also after a way through a file.

        Raises:
            ValueError: If an object is neither rule.
        """
        return cls(tuple(_read_rule(rule) for rule in rules))


def _read_rule(rule: dict[str, Any]) -> SiteRule:
    try:
        return HeadRule(kept=tuple(rule["kept"])) if "kept" in rule else ExpertRule(**rule)
    except TypeError:
        raise ValueError(f"rule must have the fields of HeadRule or ExpertRule, got {rule}") from None


def native_rules(sites: Sequence[RoutingSite]) -> PerSiteRules:
    """Rules that choose what native routing chooses."""
    return PerSiteRules(tuple(_native_rule(site) for site in sites))


def _native_rule(site: RoutingSite) -> SiteRule:
    if site.kind == "heads":
        return HeadRule(kept=tuple(range(site.num_units)))
    return ExpertRule(most=site.native_units, least=site.native_units)


def expert_ladder(site: RoutingSite) -> list[ExpertRule]:
    """Every expert rule that greedy search knows, native and cheaper: top-k rules, and thresholds within native top-k.

    Each threshold stands twice, with and without at least one expert. In no order: what a rule costs depends on the
    text.
    """
    native = site.native_units
    rules = [ExpertRule(most=count, least=count) for count in range(native + 1)]
    for above in THRESHOLDS:
        rules += [ExpertRule(most=native, above=above, least=least) for least in (0, 1)]
    return rules

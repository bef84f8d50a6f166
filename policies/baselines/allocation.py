"""Fixed numbers of units for every layer, found on training text under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.compute import native_shares
from moe_backbone.sites import Backbone
from policies.baselines.prefix import PrefixCache
from policies.baselines.site_rules import ExpertRule, HeadRule, PerSiteRules, SiteRule, native_rules


@dataclass(frozen=True, kw_only=True)
class Option:
    """One number of units at one site."""

    rule: SiteRule
    compute: float
    """Fraction of native compute."""
    rise: float
    """Rise of the loss on the training text over the native number, the other sites unchanged; nats a token."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One option a site, as good as any that costs no more, if rises add up."""

    rules: tuple[SiteRule, ...]
    """In running order of the sites."""
    compute: float
    """Fraction of native compute."""
    rise: float
    """Sum of the sites' rises of the loss, nats a token."""

    def with_option(self, option: Option) -> Allocation:
        """The allocation with the next site added."""
        rules = (*self.rules, option.rule)
        return Allocation(rules=rules, compute=self.compute + option.compute, rise=self.rise + option.rise)

    @property
    def router(self) -> PerSiteRules:
        """What decides."""
        return PerSiteRules(self.rules)


def find_allocations(
    backbone: Backbone, tokens: Tensor, targets: Tensor, head_importance: Mapping[int, Tensor] | None = None
) -> list[Allocation]:
    """Best allocations over all budgets, by sensitivities on training text.

    Rises measured around native routing do not add up far from it, so they are measured once more around the
    allocation that the first answer has half-way down.

    Args:
        backbone: What computes.
        tokens: Training text (num_sequences, seq_len), int64.
        targets: Next tokens, same shape.
        head_importance: Of the heads of each head site, by the site's index (num_units,), the most important kept
            longest; None keeps all heads.

    Returns:
        Front of `allocate`, cheapest first.
    """
    cache = PrefixCache(backbone, tokens, targets)
    native = native_rules(backbone.sites)
    front = allocate(measure_options(cache, native, head_importance))
    half_way = within_budget(front, (front[0].compute + 1) / 2)
    return allocate(measure_options(cache, half_way.router, head_importance))


def measure_options(
    cache: PrefixCache, base: PerSiteRules, head_importance: Mapping[int, Tensor] | None = None
) -> list[list[Option]]:
    """What every site loses with fewer units while the others follow `base`; arguments as in `find_allocations`.

    Returns:
        Options of each site in running order, native first: the best k experts by gate score, the most important heads.
    """
    native = native_rules(cache.backbone.sites)
    cache.follow(base)
    options = []
    for index, share in enumerate(native_shares(cache.meter).tolist()):
        rules = _smaller_rules(native.rules[index], (head_importance or {}).get(index))
        losses = [cache.measure(base.with_rule(index, rule), index).loss for _, rule in rules]
        options.append(
            [
                Option(rule=rule, compute=count * share, rise=loss - losses[0])
                for (count, rule), loss in zip(rules, losses, strict=True)
            ]
        )
    return options


def _smaller_rules(native: SiteRule, importance: Tensor | None) -> list[tuple[int, SiteRule]]:
    """Rules of one site with their number of units, from native down to none."""
    if isinstance(native, ExpertRule):
        return [(k, ExpertRule(most=k, least=k)) for k in range(native.most, -1, -1)]
    num_heads = len(native.kept)
    if importance is None:
        return [(num_heads, native)]
    ranked = importance.argsort(descending=True, stable=True).tolist()
    return [(count, HeadRule(kept=tuple(sorted(ranked[:count])))) for count in range(num_heads, -1, -1)]


def allocate(options: Sequence[Sequence[Option]]) -> list[Allocation]:
    """Best allocations over all budgets by dynamic programming, site after site.

    Args:
        options: Of each site, from `measure_options`.

    Returns:
        Allocations that no other equals or beats at the same or less compute, cheapest first.

    Source: budgets of arXiv:2509.02753, dynamic programming of arXiv:2604.08133.

    Example: two sites with options of compute .5 and 0, rises 0 and .3 at the first, 0 and .1 at the second: compute 0
        with rise .4, compute .5 with rise .1 (the first site keeps its units), and compute 1 with rise 0.
    """
    front = [Allocation(rules=(), compute=0.0, rise=0.0)]
    for site_options in options:
        longer = [allocation.with_option(option) for allocation in front for option in site_options]
        front = []
        # rounded, as equal sums in another order differ in their last bit
        for allocation in sorted(longer, key=lambda allocation: (round(allocation.compute, 9), allocation.rise)):
            if not front or allocation.rise < front[-1].rise:
                front.append(allocation)
    return front


def within_budget(front: Sequence[Allocation], budget: float) -> Allocation:
    """The best allocation that costs at most `budget`, a fraction of native compute.

    Args:
        front: From `allocate`.
        budget: Fraction of native compute.

    Raises:
        ValueError: If every allocation costs more.
    """
    fitting = [allocation for allocation in front if allocation.compute <= budget + 1e-9]
    require(bool(fitting), f"budget must be at least {front[0].compute:.4f}, got {budget}")
    return fitting[-1]

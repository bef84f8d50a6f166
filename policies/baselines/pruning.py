"""Static pruning: the same heads and experts are off for every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_backbone import ranks
from moe_backbone.checks import require, require_at_least
from moe_backbone.sites import Backbone, NativeRouter, Router, RoutingSite, SiteView, best_units
from policies.baselines.fixed import heads_native
from policies.baselines.prefix import PrefixCache


@dataclass(frozen=True)
class UnitPruning:
    """Any router, with the pruned units switched off for every token: a mask on top of what it chooses."""

    router: Router
    """Chooses among the kept units."""
    kept: Mapping[int, Tensor]
    """Kept units of a site, by the site's index: bool (num_units,). Sites left out keep all units."""

    @property
    def overhead_flops(self) -> float:
        """FLOPs of the router; the mask costs nothing."""
        return float(getattr(self.router, "overhead_flops", 0.0))

    @property
    def compensation(self) -> Any:
        """The router's constants in place of skipped units, which stand in for pruned ones too; None without any."""
        return getattr(self.router, "compensation", None)

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        subset = self.router.select(view)
        return subset & self.kept[view.index].to(subset.device) if view.index in self.kept else subset


@dataclass(frozen=True)
class ExpertPruning:
    """The best `k` of the kept experts by gate score; heads native.

    Raises:
        ValueError: If `k` is negative.
    """

    kept: Mapping[int, Tensor]
    """Kept experts of an expert site, by the site's index: bool (num_units,). Sites left out keep all."""
    k: int | None = None
    """Experts of a token at every expert site, all kept ones where there are fewer; None for the native number."""

    def __post_init__(self) -> None:
        if self.k is not None:
            require_at_least(self, 0, "k")

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units).

        Example: probabilities (.5, .3, .2), experts 1 and 2 kept: k 1 gives the second, k 3 the second and third.
        """
        k = view.site.native_units if self.k is None else self.k
        if view.index not in self.kept:
            return best_units(view.scores, k)
        kept = self.kept[view.index].to(view.scores.device)
        return best_units(view.scores.masked_fill(~kept, -torch.inf), k) & kept


def head_importance(backbone: Backbone, tokens: Tensor, targets: Tensor) -> dict[int, Tensor]:
    """Rise of the native loss when one head is off for all tokens, head by head.

    A poor guide once many heads are gone, as heads back each other up.

    Args:
        backbone: What computes.
        tokens: Training text (num_sequences, seq_len), int64.
        targets: Next tokens, same shape.

    Returns:
        By index of the head site: float64 (num_units,), nats a token; negative where the loss falls.

    Source: arXiv:1905.10650.
    """
    return _leave_one_out(backbone, tokens, targets, "heads")


def expert_importance(backbone: Backbone, tokens: Tensor, targets: Tensor) -> dict[int, Tensor]:
    """Rise of the native loss when one expert is pruned and tokens use their next best, expert by expert.

    Arguments and result are those of `head_importance`, for expert sites.

    Source: the loss in place of the reconstruction error of arXiv:2402.14800.
    """
    return _leave_one_out(backbone, tokens, targets, "experts")


def _leave_one_out(backbone: Backbone, tokens: Tensor, targets: Tensor, kind: str) -> dict[int, Tensor]:
    cache = PrefixCache(backbone, tokens, targets)
    native = cache.follow(NativeRouter())
    importance = {}
    own = [(index, site) for index, site in enumerate(backbone.sites) if site.kind == kind]
    with ranks.bar(total=sum(site.num_units for _, site in own), desc=f"importance of {kind}", unit="unit") as bar:
        for index, site in own:
            losses = []
            for router in one_off_routers(site, index):
                losses.append(cache.measure(router, index).loss)
                bar.update()
            importance[index] = torch.tensor(losses, dtype=torch.float64) - native.loss
    return importance


def one_off_routers(site: RoutingSite, index: int) -> list[Router]:
    """Native routing without one unit of site `index`, unit by unit."""
    kept = [{index: units} for units in ~torch.eye(site.num_units, dtype=torch.bool)]
    if site.kind == "heads":
        return [UnitPruning(NativeRouter(), units) for units in kept]
    return [ExpertPruning(units) for units in kept]


@torch.no_grad()
def routing_mass(backbone: Backbone, tokens: Tensor) -> dict[int, Tensor]:
    """Gate probability that native routing gives each expert, zero where it is not chosen, mean over the text.

    Args:
        backbone: What computes.
        tokens: Training text (num_sequences, seq_len), int64.

    Returns:
        By index of the expert site: float64 (num_units,), fractions.
    """
    masses = {}
    state = backbone.begin(tokens)
    for index, site in enumerate(backbone.sites):
        view = backbone.observe(state)
        subset = NativeRouter().select(view)
        if site.kind == "experts":
            masses[index] = (view.scores.exp() * subset).double().mean(0)
        state = backbone.advance(state, subset)
    return masses


def prune_units(importance: Mapping[int, Tensor], keep: int) -> dict[int, Tensor]:
    """Keep the most important units over all layers.

    Args:
        importance: Of the units of each site, by the site's index: float64 (num_units,), any unit.
        keep: Units to keep in all.

    Returns:
        Kept units by index of the site: bool (num_units,).

    Raises:
        ValueError: If there are fewer units than `keep`.

    Example: importances {0: (.3, .1), 2: (.2, .4)} with keep 2 give {0: (True, False), 2: (False, True)}.
    """
    scores = torch.cat(list(importance.values())) if importance else torch.zeros(0)
    require(0 <= keep <= len(scores), f"keep must lie in [0, units={len(scores)}], got {keep}")
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:keep]] = True
    return dict(zip(importance, kept.split([len(site) for site in importance.values()]), strict=True))


def prune_share(sites: Sequence[RoutingSite], importance: Mapping[int, Tensor], share: float) -> dict[int, Tensor]:
    """Keep a share of the heads and the same share of the experts, the most important of each kind over all layers.

    Args:
        sites: Of the backbone.
        importance: Of the units of every site, by the site's index: float64 (num_units,); compared within a kind.
        share: To keep, a fraction, rounded to whole units of a kind.

    Returns:
        Kept units by index of the site: bool (num_units,).

    Raises:
        ValueError: If the share lies outside [0, 1].
    """
    require(0 <= share <= 1, f"share must lie in [0, 1], got {share}")
    kept: dict[int, Tensor] = {}
    for kind in ("heads", "experts"):
        of_kind = {index: scores for index, scores in importance.items() if sites[index].kind == kind}
        kept |= prune_units(of_kind, round(share * sum(map(len, of_kind.values()))))
    return kept

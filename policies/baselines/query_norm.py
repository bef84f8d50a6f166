"""Heads by the norm of the token's query: the router of mixture-of-head attention that has no parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_backbone.checks import require, require_at_least
from moe_backbone.sites import Backbone, NativeRouter, SiteView, best_units


@dataclass(frozen=True, eq=False)
class QueryNorm:
    """The `num_heads` heads in which the token's query is longest, and the best `k` experts by gate score.

    Source: arXiv:2410.11842, for a pretrained model.

    Raises:
        ValueError: If a count is negative, or on `select` larger than the site.
    """

    queries: Mapping[int, Tensor]
    """Query projections (num_heads, hidden_size, head_size), float32, by index of the head site."""
    num_heads: int
    """Heads of a token at every head site."""
    k: int | None = None
    """Experts of a token at every expert site; None for the native number."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "num_heads")
        if self.k is not None:
            require_at_least(self, 0, "k")

    @property
    def overhead_flops(self) -> int:
        """FLOPs of the queries of all heads of one token over all head sites.

        Counted in full: the kernels project the queries of chosen heads once more.
        """
        return sum(2 * weight.numel() for weight in self.queries.values())

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units).

        Example: features (3, 4), heads that project to 3 and to 4: one head gives the second.
        """
        if view.site.kind == "experts" and self.k is None:
            return NativeRouter().select(view)
        name, count = ("num_heads", self.num_heads) if view.site.kind == "heads" else ("k", self.k or 0)
        most = view.site.num_units
        require(count <= most, f"{name} must lie in [0, units={most}], got {count}")
        if view.site.kind == "experts":
            return best_units(view.scores, count)
        weight = self.queries[view.index].to(view.features.device)
        norms = torch.stack([(view.features @ head).square().sum(1) for head in weight], dim=1)
        return best_units(norms, count)


def query_projections(backbone: Backbone) -> dict[int, Tensor] | None:
    """Query weights of every head site for `QueryNorm`; None if the backbone does not show them."""
    attentions = getattr(backbone, "attentions", None)
    if attentions is None:
        return None
    heads = [(index, site) for index, site in enumerate(backbone.sites) if site.kind == "heads"]
    return {index: attentions[site.layer].query.detach() for index, site in heads}

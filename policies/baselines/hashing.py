"""Routers that look at the token's id only: a table made once, before any text is routed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_backbone.checks import require, require_at_least
from moe_backbone.sites import SiteView, best_units
from policies.baselines.fixed import heads_native, require_count


@dataclass(frozen=True)
class HashRouter:
    """`k` experts by a hash of the token's id, other ones at every site; heads native.

    Source: arXiv:2106.04426.

    Raises:
        ValueError: If `k` or `seed` is negative, or on `select` if `k` is larger than the site.
    """

    k: int
    """Experts a token uses at every expert site."""
    seed: int
    """Seed of the hash."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "k", "seed")

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        require_count(self.k, view)
        units = torch.arange(view.site.num_units, device=view.tokens.device)
        return best_units(_hash(view.tokens.flatten().unsqueeze(1), units, self.seed * 1009 + view.index), self.k)


@dataclass(frozen=True)
class TokenTable:
    """Experts of each token id from a frozen table that spreads a text evenly; heads native.

    Ids past the table's end, which that text does not have, begin again at its first row.

    Source: balanced assignment of arXiv:2106.04426.
    """

    table: Tensor
    """Experts of each id, bool (num_ids, num_experts)."""

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return self.table.to(view.tokens.device)[view.tokens.flatten() % len(self.table)]


def balanced_table(tokens: Tensor, num_experts: int, k: int) -> TokenTable:
    """Give each id the `k` experts with the least load so far, frequent ids first.

    Args:
        tokens: Training text, int64, any shape, not empty.
        num_experts: Experts of a site.
        k: Experts of an id, in [0, num_experts].

    Raises:
        ValueError: If `k` lies outside its range.

    Example: ids 0, 0, 0, 1, 1, 2 on two experts with k 1: id 0 gets expert 0, ids 1 and 2 get expert 1.
    """
    require(0 <= k <= num_experts, f"k must lie in [0, num_experts={num_experts}], got {k}")
    counts = tokens.flatten().bincount().tolist()
    load = [0] * num_experts
    table = torch.zeros(len(counts), num_experts, dtype=torch.bool)
    for token in sorted(range(len(counts)), key=lambda token: -counts[token]):
        for expert in sorted(range(num_experts), key=load.__getitem__)[:k]:
            table[token, expert] = True
            load[expert] += counts[token]
    return TokenTable(table)


def _hash(ids: Tensor, units: Tensor, seed: int) -> Tensor:
    """Pseudo-random numbers of (id, unit) pairs in [0, 1), float32, the same on every device.

    Multiplies and folds 31-bit integers, so that no product passes 2**63.
    """
    mixed = (ids + 1) * 1_000_003 + (units + 1) * 7_919 + seed * 104_729
    for factor in (0x45D9F3B, 0x119DE1F3):
        mixed = ((mixed ^ (mixed >> 15)) & 0x7FFFFFFF) * factor
    return ((mixed ^ (mixed >> 17)) & 0xFFFFFF).float() / 2**24

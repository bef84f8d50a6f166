"""Static head pruning by leave-one-out importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.sites import Backbone, NativeRouter, Router, SiteView
from policies.baselines.prefix import PrefixCache


@dataclass(frozen=True)
class HeadPruning:
    """Any router, with the pruned heads switched off for every token."""

    router: Router
    """Chooses among the kept heads, and the experts."""
    kept: Mapping[int, Tensor]
    """Kept heads of a head site, by the site's index: bool (num_units,). Sites left out keep all heads."""

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        subset = self.router.select(view)
        return subset & self.kept[view.index].to(subset.device) if view.index in self.kept else subset


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
    cache = PrefixCache(backbone, tokens, targets)
    native = cache.follow(NativeRouter())
    importance = {}
    for index, site in enumerate(backbone.sites):
        if site.kind == "heads":
            one_off = ~torch.eye(site.num_units, dtype=torch.bool)
            routers = [HeadPruning(NativeRouter(), {index: kept}) for kept in one_off]
            losses = [cache.measure(router, index).loss for router in routers]
            importance[index] = torch.tensor(losses, dtype=torch.float64) - native.loss
    return importance


def prune_heads(importance: Mapping[int, Tensor], keep: int) -> dict[int, Tensor]:
    """Keep the most important heads over all layers.

    Args:
        importance: From `head_importance`.
        keep: Heads to keep in all.

    Returns:
        Kept heads by index of the head site: bool (num_units,).

    Raises:
        ValueError: If there are fewer heads than `keep`.

    Example: importances {0: (.3, .1), 2: (.2, .4)} with keep 2 give {0: (True, False), 2: (False, True)}.
    """
    scores = torch.cat(list(importance.values())) if importance else torch.zeros(0)
    require(0 <= keep <= len(scores), f"keep must lie in [0, heads={len(scores)}], got {keep}")
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:keep]] = True
    return dict(zip(importance, kept.split([len(site) for site in importance.values()]), strict=True))

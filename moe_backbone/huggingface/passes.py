"""Who decides during one forward pass of a checkpoint: a router, or whoever walks from site to site."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_backbone.compensation import Compensation
from moe_backbone.sites import Router, RoutingSite, SiteView


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What runs at one site."""

    subset: Tensor
    """bool (num_tokens, num_units)."""
    switch: Tensor | None = None
    """See `MoETransformer.advance`."""
    compensation: Compensation | None = None
    """Constants in place of skipped units."""


@dataclass(kw_only=True)
class ForwardPass:
    """One forward pass of the model, which asks `decide` at every site."""

    decide: Callable[[SiteView], Decision]
    tokens: Tensor
    """Token ids (num_sequences, seq_len), int64."""
    price: Tensor | None = None
    """(num_tokens,), float32; None for zeros."""
    subsets: dict[int, Tensor] = field(default_factory=dict)
    """What ran at each site, bool (num_tokens, num_units)."""

    def ask(self, index: int, site: RoutingSite, features: Tensor, scores: Tensor) -> Decision:
        """Let it be decided what runs at a site; shapes as in `SiteView`."""
        device = self.tokens.device
        price = torch.zeros(len(features), device=device) if self.price is None else self.price
        seen = features.to(device, torch.float32), scores.to(device, torch.float32)
        view = SiteView(index=index, site=site, features=seen[0], scores=seen[1], price=price, tokens=self.tokens)
        decision = self.decide(view)
        self.subsets[index] = decision.subset
        return decision


def routed_by(router: Router) -> Callable[[SiteView], Decision]:
    """Decide as a router does, with its `compensation` if it has one."""
    compensation: Any = getattr(router, "compensation", None)
    return lambda view: Decision(subset=router.select(view), compensation=compensation)


current_pass: ContextVar[ForwardPass | None] = ContextVar("current_pass", default=None)
"""The pass under way; each walk from site to site has its own."""

"""Any router with constants in place of what it skips: the learned router's compensation, for its rivals too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_backbone import ranks
from moe_backbone.checks import require
from moe_backbone.compensation import Compensation
from moe_backbone.quality import token_divergence
from moe_backbone.sites import NativeRouter, Router, SiteView

LEARNING_RATE, MAX_NORM = 3e-3, 0.5
"""Of Adam, falling linearly to 0; and the clip of the gradient's norm. Those of the learned router's compensation."""


@dataclass(frozen=True, eq=False)
class CompensatedRouter:
    """A router with constants in place of the units that it skips."""

    router: Router
    """Chooses."""
    compensation: Compensation
    """From `fit_compensation`, for routers like this one."""

    @property
    def overhead_flops(self) -> float:
        """FLOPs of choosing and of the constants for one token over all sites."""
        return getattr(self.router, "overhead_flops", 0.0) + self.compensation.flops

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return self.router.select(view)


def fit_compensation(
    backbone: Any,
    routers: Sequence[Router],
    tokens: Tensor,
    *,
    steps: int = 300,
    num_sequences: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Compensation:
    """Train constants by back-propagation so that these routers stay as close to native routing as they can.

    One set serves all of them, as one set serves all prices of the learned router: every step takes one at random.

    Args:
        backbone: Frozen `MoETransformer`.
        routers: A family at its settings.
        tokens: Training text (num_windows, seq_len), int64, on the backbone's device.
        steps: Optimiser steps.
        num_sequences: Windows of a step.
        seed: Of windows and routers.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there is no router or no text.
    """
    require(len(routers) > 0, "routers must hold at least one, got none")
    require(len(tokens) > 0, "tokens must hold at least one window, got none")
    generator = torch.Generator().manual_seed(seed)
    compensation = Compensation(backbone.sites, backbone.hidden_size).to(tokens.device)
    optimizer = torch.optim.Adam(compensation.parameters(), lr=LEARNING_RATE, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, steps))
    for _ in ranks.bar(range(steps), desc="compensation", unit="step", disable=not progress):
        rows = torch.randint(len(tokens), (num_sequences,), generator=generator)
        router = routers[int(torch.randint(len(routers), (1,), generator=generator))]
        part = tokens[rows.to(tokens.device)]
        with torch.no_grad():
            native, _ = backbone.run(part, NativeRouter())
        logits, _ = backbone.run(part, CompensatedRouter(router, compensation))
        optimizer.zero_grad()
        token_divergence(native, logits).mean().backward()
        torch.nn.utils.clip_grad_norm_(compensation.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
    return compensation.requires_grad_(False)

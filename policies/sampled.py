"""A learned router as it is met in training: any price, units drawn at random, some sequences native."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.compensation import Compensation
from moe_backbone.sites import NativeRouter, SiteView
from policies.linear_router import LinearRouter


class SampledRouter:
    """Draws for each sequence whether it is native and else its price, then every unit with the router's chance.

    Args:
        router: Learned.
        native_share: Chance of a native sequence.
        prices: Lowest and highest price, nats per native compute; drawn log-uniformly.
        generator: Of all draws.

    Raises:
        ValueError: If `native_share` lies outside [0, 1] or the prices are not positive and ascending.
    """

    def __init__(
        self,
        router: LinearRouter,
        *,
        native_share: float,
        prices: tuple[float, float],
        generator: torch.Generator,
    ) -> None:
        require(0 <= native_share <= 1, f"native_share must lie in [0, 1], got {native_share}")
        require(0 < prices[0] <= prices[1], f"prices must be positive and ascending, got {prices}")
        self.router, self.native_share = router, native_share
        self.log_prices = torch.tensor(prices).log()
        self.generator = generator

    @property
    def compensation(self) -> Compensation | None:
        """The router's own; native sequences skip nothing, so it leaves them as they are."""
        return self.router.compensation

    @torch.no_grad()
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        if view.index == 0:
            num_sequences, seq_len = view.tokens.shape
            low, high = self.log_prices
            rows = self._uniform(view, 2, num_sequences).repeat_interleave(seq_len, dim=1)
            self._native, self._price = rows[0] < self.native_share, (low + (high - low) * rows[1]).exp()
        logits = self.router.view_logits(replace(view, price=self._price))
        drawn = self._uniform(view, *logits.shape) < logits.sigmoid()
        return torch.where(self._native.unsqueeze(1), NativeRouter().select(view), drawn)

    def _uniform(self, view: SiteView, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(view.scores.device)

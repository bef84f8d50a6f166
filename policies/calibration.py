"""What a price buys: compute at each price on calibration text, so that a budget can be turned into a price."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.compute import ComputeMeter
from moe_backbone.sites import Router
from policies.linear_router import LinearRouter

BATCH_SEQUENCES = 32
"""Sequences of one forward pass."""


@dataclass(frozen=True)
class Calibration:
    """Compute of a learned router over its prices."""

    prices: tuple[float, ...]
    """Nats per native compute, ascending."""
    computes: tuple[float, ...]
    """Fraction of native compute at each, the router's own cost included."""

    def price(self, cost_limit: float) -> float:
        """The lowest price at which compute stays within a budget, log-linear between the calibrated ones.

        Args:
            cost_limit: Fraction of native compute.

        Raises:
            ValueError: If no calibrated price is dear enough.

        Example: prices 0.1 and 0.4 with computes 0.8 and 0.4 give 0.2 for a budget of 0.6.
        """
        computes = np.minimum.accumulate(self.computes)  # noise aside, a dearer price buys less
        require(
            cost_limit >= computes[-1],
            f"cost_limit must be at least {computes[-1]:.3f}, what the highest price of this router leaves, "
            f"got {cost_limit}",
        )
        return float(np.exp(np.interp(-cost_limit, -computes, np.log(self.prices))))

    def to_json(self) -> dict[str, Any]:
        """A dictionary whose entries are the arguments of `Calibration`."""
        return {"prices": list(self.prices), "computes": list(self.computes)}


@torch.no_grad()
def mean_compute(router: Router, backbone: Any, tokens: Tensor) -> float:
    """Fraction of native compute that a router spends on a text, its own cost included.

    Args:
        router: Reads no price, as `LinearRouter.at_price` gives it.
        backbone: What computes.
        tokens: (num_sequences, seq_len), int64, on the backbone's device.
    """
    meter = ComputeMeter(backbone.sites, tokens.shape[1])
    flops = 0.0
    for part in tokens.split(BATCH_SEQUENCES):
        _, subsets = backbone.run(part, router)
        positions = torch.arange(part.shape[1], device=part.device).repeat(len(part))
        flops += sum(float(meter.flops(index, subset, positions).sum()) for index, subset in enumerate(subsets))
    return (flops / tokens.numel() + getattr(router, "overhead_flops", 0)) / meter.native_flops


def calibrate(router: LinearRouter, backbone: Any, tokens: Tensor, prices: Iterable[float]) -> Calibration:
    """Measure what a router spends at each price.

    Args:
        router: Learned.
        backbone: What computes.
        tokens: Calibration text, not that of the final scores (num_sequences, seq_len), int64.
        prices: Ascending, nats per native compute.
    """
    prices = tuple(prices)
    computes = tuple(mean_compute(router.at_price(price), backbone, tokens) for price in prices)
    return Calibration(prices, computes)

"""A budget instead of a price: a Lagrange multiplier finds the price at which compute meets the budget."""

from __future__ import annotations

import math
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback

from moe_backbone import ranks
from moe_backbone.checks import require

SPREAD = 1.25
"""Prices are drawn within this factor of the multiplier, so that the router learns which way its price moves it."""


class CostLimit(BaseCallback):
    """Moves the prices of the environment until its episodes cost what the budget allows.

    The multiplier is a price, so its logarithm is what takes the steps of dual ascent. It is kept in the model as
    `lagrangian_multiplier` and so in its checkpoints.

    Args:
        cost_limit: Mean compute of an episode, fraction of native; with the router's own cost.
        lagrangian_multiplier_init: First price, nats per native compute.
        lambda_lr: Step of the multiplier's logarithm per unit of compute above the budget.
        overhead: The router's own cost, fraction of native compute.
        bounds: Lowest and highest multiplier.

    Raises:
        ValueError: If the budget does not lie above the router's own cost.
    """

    def __init__(
        self,
        cost_limit: float,
        *,
        lagrangian_multiplier_init: float,
        lambda_lr: float = 0.2,
        overhead: float = 0.0,
        bounds: tuple[float, float] = (1e-4, 1e2),
    ) -> None:
        super().__init__()
        require(cost_limit > overhead, f"cost_limit must lie above the router's own {overhead:.3f}, got {cost_limit}")
        self.cost_limit, self.lambda_lr, self.overhead, self.bounds = cost_limit, lambda_lr, overhead, bounds
        self.start = lagrangian_multiplier_init

    def _on_training_start(self) -> None:
        if not hasattr(self.model, "lagrangian_multiplier"):
            self.model.lagrangian_multiplier = self.start  # type: ignore[attr-defined]
        self._set_prices()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        cost = self._cost() + self.overhead
        before: float = self.model.lagrangian_multiplier  # type: ignore[attr-defined]
        after = before * math.exp(self.lambda_lr * (cost - self.cost_limit))
        self.model.lagrangian_multiplier = min(max(after, self.bounds[0]), self.bounds[1])  # type: ignore[attr-defined]
        self._set_prices()
        self.logger.record("cost_limit/cost", cost)
        self.logger.record("cost_limit/lagrangian_multiplier", after)

    def _set_prices(self) -> None:
        multiplier: float = self.model.lagrangian_multiplier  # type: ignore[attr-defined]
        self._mdp.price_range = (multiplier / SPREAD, multiplier * SPREAD)

    def _cost(self) -> float:
        """Compute of the episode that ended last, as the router decides without chance where that is known."""
        mdp, episode = self._mdp, getattr(self.model, "_episode", None)
        chosen = mdp.subsets if episode is None else list(episode.chosen)
        compute = [
            mdp.meter.compute(index, subset[:, : site.num_units], mdp.state.positions).mean()
            for index, (site, subset) in enumerate(zip(mdp.backbone.sites, chosen, strict=True))
        ]
        return float(ranks.average(torch.as_tensor(sum(compute))))

    @property
    def _mdp(self) -> Any:
        return self.training_env.mdp  # type: ignore[attr-defined]

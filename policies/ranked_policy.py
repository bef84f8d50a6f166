"""The SB3 policy of the ranked codec: a fixed number of different units at every site."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from policies.plackett_luce import PlackettLuce
from policies.router_policy import RouterPolicy


class RankedRouterPolicy(RouterPolicy):
    """Ordered units without repeats, drawn by the logits of a `LinearRouter`; for A2C, PPO and `gae`.

    Args:
        observation_space: Flat `Box`.
        action_space: `MultiDiscrete`, one entry a unit that an action names.
        lr_schedule: Learning rate for remaining progress 1 to 0.
        **kwargs: Those of `RouterPolicy`.

    Raises:
        ValueError: If the action space is not `MultiDiscrete`.
    """

    codec: ClassVar[str] = "ranked"
    codec_space: ClassVar[type[spaces.Space[Any]]] = spaces.MultiDiscrete
    decides: Tensor

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        assert isinstance(self.action_space, spaces.MultiDiscrete)
        self.action_dist = PlackettLuce(len(self.action_space.nvec))
        decides = [float(site.num_units > self.action_dist.count) for site in self.router.spec.sites]
        self.register_buffer("decides", torch.tensor(decides).unsqueeze(1), persistent=False)

    def logits(self, observation: Tensor) -> Tensor:
        """Logits (num_lanes, max_units); all level where every unit runs anyway, so that nothing is learned there."""
        return super().logits(observation) * (self.split(observation)[2] @ self.decides)

    def get_distribution(self, obs: PyTorchObs) -> PlackettLuce:
        """Distribution of observations (num_lanes, size)."""
        assert isinstance(obs, Tensor)
        assert isinstance(self.action_dist, PlackettLuce)
        return self.action_dist.proba_distribution(self.logits(obs))

"""PPO on the planted problem, opened so that a check can see between its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stable_baselines3.common.callbacks import CallbackList
from torch import Tensor

from envs import EnvConfig, RoutingVecEnv, TokenSource
from envs.planted import PLANTED_CONFIG, PLANTED_RULES, PlantedSource, planted_backbone
from moe_backbone import MoETransformer
from policies.linear_router import LinearRouter, RouterSpec
from policies.router_policy import RouterPolicy
from policies.routing_ppo import Episode, RoutingPPO

NUM_SEQUENCES, NUM_SITES = 4, 2


class PlantedPPO(RoutingPPO):
    """Collects and learns one step at a time."""

    @property
    def router(self) -> LinearRouter:
        """What learns."""
        assert isinstance(self.policy, RouterPolicy)
        return self.policy.router

    def router_weights(self) -> Tensor:
        """Copy of all weights in one row (num_weights,), float32."""
        return torch.cat([weight.detach().flatten().clone() for weight in self.router.parameters()])

    def collect(self) -> Episode:
        """One episode of every lane."""
        _, callback = self._setup_learn(1, CallbackList([]))
        assert self.env is not None
        self.collect_rollouts(self.env, callback, self.rollout_buffer, NUM_SITES)
        return self._episode

    def one_update(self) -> dict[str, Any]:
        """Collect and learn once; what was logged."""
        self.collect()
        self.train()
        return dict(self.logger.name_to_value)

    def site_logits(self, episode: Episode) -> Tensor:
        """Of every decision of an episode (num_sites, num_lanes, max_units), float32."""
        return self.router.site_logits(episode.inputs, episode.priors, episode.log_price)

    def observations(self) -> Tensor:
        """Before each site, when all units run (num_sites, num_lanes, size), float32."""
        assert isinstance(self.env, RoutingVecEnv)
        observations = [self.env.reset_tensor()]
        everything = torch.ones(self.env.num_envs, PLANTED_CONFIG.num_experts, dtype=torch.bool)
        for _ in range(NUM_SITES - 1):
            observations.append(self.env.step_tensor(everything).observation)
        return torch.stack(observations)

    def observed_logits(self, observations: Tensor) -> Tensor:
        """Of the decisions at `observations` (num_sites, num_lanes, max_units), float32, without a graph."""
        assert isinstance(self.policy, RouterPolicy)
        return self.router.site_logits(*self.policy.episode_inputs(observations)).detach()


@pytest.fixture
def make_model() -> Callable[..., PlantedPPO]:
    """One minibatch an epoch and one epoch an update, unless told otherwise."""

    def make(
        rules: EnvConfig = PLANTED_RULES,
        *,
        source: TokenSource | None = None,
        num_sequences: int = NUM_SEQUENCES,
        seed: int = 0,
        price_range: tuple[float, float] | None = None,
        backbone: MoETransformer | None = None,
        **settings: Any,
    ) -> PlantedPPO:
        low, high = price_range or (rules.price_low, rules.price_high)
        backbone = backbone or planted_backbone()
        lanes = num_sequences * rules.rollouts_per_sequence * PLANTED_CONFIG.seq_len
        env = RoutingVecEnv(lanes, backbone, source or PlantedSource(), rules, seed=seed)
        spec = RouterSpec(hidden_size=32, sites=backbone.sites, price_low=low, price_high=high)
        settings = {"batch_size": NUM_SITES * lanes, "n_epochs": 1, "learning_rate": 0.01} | settings
        return PlantedPPO(
            "RouterPolicy", env, seed=seed, policy_kwargs={"router_spec": spec.to_json(), "critic": False}, **settings
        )

    return make

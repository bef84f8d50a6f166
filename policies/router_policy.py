"""The SB3 policy around a `LinearRouter`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import BernoulliDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from moe_backbone.precision import full_precision
from policies.linear_router import LinearRouter, RouterSpec


class RouterPolicy(ActorCriticPolicy):
    """Independent Bernoulli bits, one a unit, with the logits of a `LinearRouter`.

    Observation parts are found by the layout of the design: features, scores, site one-hot, log price.

    Args:
        observation_space: Flat `Box`.
        action_space: `MultiBinary(max_units)`.
        lr_schedule: Learning rate for remaining progress 1 to 0.
        router_spec: `RouterSpec.to_json()` of the backbone's sites and the prior.
        critic: Whether a value network is trained; `RoutingPPO` with leave-one-out advantages needs none, and
            predicts 0.
        critic_size: Width of the critic's hidden layer.
        **kwargs: Further arguments of `ActorCriticPolicy`.

    Raises:
        ValueError: If the action space is not `MultiBinary`.

    Attributes:
        codec: Name of the action codec that it speaks, and `codec_space` the class of its actions.
    """

    codec: ClassVar[str] = "subset"
    codec_space: ClassVar[type[spaces.Space[Any]]] = spaces.MultiBinary

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        router_spec: dict[str, Any] | None = None,
        critic: bool = True,
        critic_size: int = 64,
        **kwargs: Any,
    ) -> None:
        if not isinstance(action_space, self.codec_space):
            name = self.codec_space.__name__
            raise ValueError(f"action space must be {name} (action={self.codec!r}), got {action_space}")
        if router_spec is None:
            raise ValueError("router_spec must be RouterSpec.to_json(), got None")
        self.router_spec, self.critic_size, self.has_critic = router_spec, critic_size, critic
        kwargs.setdefault("optimizer_kwargs", {"eps": 1e-5})
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        spec = RouterSpec.from_json(self.router_spec)
        self.router = LinearRouter(spec)
        for weight in self.router.compensation_parameters():
            weight.requires_grad_(False)  # a part of the environment: its training needs gradients through the backbone
        self.critic = nn.Sequential(
            nn.Linear(self.features_dim, self.critic_size), nn.Tanh(), nn.Linear(self.critic_size, 1)
        )
        self.critic.requires_grad_(self.has_critic)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = self.optimizer_class(trained, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return data | {"router_spec": self.router_spec, "critic": self.has_critic, "critic_size": self.critic_size}

    def split(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, scores, site one-hot and log price of observations (..., size)."""
        spec = self.router.spec
        return observation.split((spec.hidden_size, spec.max_units, len(spec.sites), 1), dim=-1)

    def logits(self, observation: Tensor) -> Tensor:
        """Logits of lanes that may stand at different sites (num_lanes, max_units).

        Every site's map is applied and each lane keeps its own, so nothing is read back from the device.
        """
        site = self.split(observation)[2]
        logits = self.router.site_logits(*self.episode_inputs(observation.expand(site.shape[1], *observation.shape)))
        with full_precision(site.device):
            return torch.einsum("snu,ns->nu", logits, site)

    def episode_inputs(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `LinearRouter.site_logits` for observations (num_sites, num_lanes, size) of whole episodes."""
        features, scores, _, log_price = self.split(observation)
        return self.router.inputs(features, scores), self.router.priors(scores), log_price

    def step_inputs(self, observation: Tensor, index: int, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The same for lanes that all stand at site `index`, observation (num_lanes, size); `out` takes the inputs."""
        features, scores, _, log_price = self.split(observation)
        return self.router.inputs(features, scores, out), self.router.site_prior(index, scores), log_price

    def step_logits(self, observation: Tensor, index: int) -> Tensor:
        """Logits of lanes that all stand at site `index` (num_lanes, max_units)."""
        return self.router.one_site_logits(index, *self.step_inputs(observation, index))

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, values and log-probabilities of observations (num_lanes, size)."""
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, log-probabilities and entropies of given actions."""
        assert isinstance(obs, Tensor)
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """Bernoulli distribution of observations (num_lanes, size)."""
        assert isinstance(obs, Tensor)
        distribution = self.action_dist
        assert isinstance(distribution, BernoulliDistribution)
        return distribution.proba_distribution(self.logits(obs))

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Critic's return to go (num_lanes, 1); zeros without a critic."""
        assert isinstance(obs, Tensor)
        return self.critic(obs) if self.has_critic else obs.new_zeros(len(obs), 1)

"""DQN's value network as a `CountRouter`: what it learns is what it costs at inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor

from moe_backbone.sites import RoutingSite
from policies.count_router import CountRouter, CountSpec

UNIT_PENALTY = 0.02
"""What each unit more or less than the native ones is thought to lose before learning, in the rewards' unit."""


def value_spec(hidden_size: int, sites: Sequence[RoutingSite]) -> CountSpec:
    """Every site is decided, from 0 units on, by features, scores and price."""
    return CountSpec(hidden_size=hidden_size, sites=tuple(sites), heads=True, least=0, scores=True, priced=True)


class CountQNetwork(QNetwork):
    """Values of all counts, linear in features, scores and price, with weights of each site's own.

    Before learning the native count is worth most. Values of zero would promise more than any count can earn, as
    returns are negative, and the first policies would try them all at all sites at once.

    Args:
        *args: Those of `QNetwork`.
        count_spec: `value_spec(...).to_json()`.
        **kwargs: Those of `QNetwork`.
    """

    last: Tensor

    def __init__(self, *args: Any, count_spec: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "net_arch": []})
        spec = CountSpec.from_json(count_spec)
        router = CountRouter(spec)
        self.count_spec, self.q_net = count_spec, router  # type: ignore[assignment]
        counts = torch.arange(spec.max_units + 1)
        natives = torch.tensor([site.native_units for site in spec.sites]).unsqueeze(1)
        router.weight.data[:, -1] = -UNIT_PENALTY * (counts - natives).abs()
        last = torch.stack([counts.clamp_max(site.num_units) for site in spec.sites])
        self.register_buffer("last", last.unsqueeze(1), persistent=False)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters() | {"count_spec": self.count_spec}
        return {name: value for name, value in data.items() if name != "net_arch"}

    def forward(self, obs: PyTorchObs) -> Tensor:
        """Values of observations (num_lanes, size): (num_lanes, max_units + 1); more than all units are all units."""
        assert isinstance(obs, Tensor)
        router = self.q_net
        assert isinstance(router, CountRouter)
        spec = router.spec
        features, scores, site, log_price = obs.split((spec.hidden_size, spec.max_units, len(spec.sites), 1), dim=1)
        values = router.values(slice(None), router.inputs(features, scores), log_price.squeeze(1).exp())
        values = values.gather(2, self.last.expand(-1, len(obs), -1))
        return torch.einsum("snc,ns->nc", values, site)


class CountQPolicy(DQNPolicy):
    """Policy of SB3's DQN on the count codec, with a linear value network for each site.

    Args:
        *args: Those of `DQNPolicy`.
        count_spec: `value_spec(...).to_json()`.
        **kwargs: Those of `DQNPolicy`.
    """

    def __init__(self, *args: Any, count_spec: dict[str, Any], **kwargs: Any) -> None:
        self.count_spec = count_spec
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> CountQNetwork:
        """A value network that has learned nothing."""
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        arguments = {name: value for name, value in arguments.items() if name not in ("net_arch", "activation_fn")}
        return CountQNetwork(**arguments, count_spec=self.count_spec).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"count_spec": self.count_spec}

    @property
    def router(self) -> CountRouter:
        """What learns."""
        router = self.q_net.q_net
        assert isinstance(router, CountRouter)
        return router

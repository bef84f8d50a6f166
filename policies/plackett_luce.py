"""Choosing a fixed number of different units in order: the Plackett-Luce distribution."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor, nn


def sample_ranked(logits: Tensor, count: int) -> Tensor:
    """Draw `count` different units, one after the other, each by softmax over those that are left.

    Args:
        logits: (num_lanes, num_units), float32.
        count: Units to draw, at most num_units.

    Returns:
        Units in the order in which they were drawn (num_lanes, count), int64.

    Source: arXiv:1903.06059; the largest of logits with Gumbel noise, in order, are such a sample.
    """
    noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).topk(count, dim=1).indices


def ranked_log_prob(logits: Tensor, ranked: Tensor) -> Tensor:
    """Log-probability of ordered units, nats (num_lanes,).

    Args:
        logits: (num_lanes, num_units), float32.
        ranked: Different units in order (num_lanes, count), int64.

    Example: chances (.5, .3, .2) give the order 0, 1 the log of .5 * .3 / (.3 + .2) = .3.
    """
    total = logits.new_zeros(len(logits))
    for unit in ranked.split(1, dim=1):
        total = total + (logits.gather(1, unit) - logits.logsumexp(1, keepdim=True)).squeeze(1)
        logits = logits.scatter(1, unit, -torch.inf)
    return total


class PlackettLuce(Distribution):
    """SB3's face of the distribution; it has no entropy in closed form.

    SB3 then takes minus the log-probability of the actions drawn, whose mean is the entropy.

    Args:
        count: Units that an action names.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: the logits are the router's.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("logits come from the router of the policy")

    def proba_distribution(self, logits: Tensor) -> PlackettLuce:
        """Take logits (num_lanes, num_units), float32."""
        self.logits = logits
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of actions (num_lanes, count), of any dtype: (num_lanes,), nats."""
        return ranked_log_prob(self.logits, actions.long())

    def entropy(self) -> None:
        """None: SB3 estimates it from the actions drawn."""
        return None

    def sample(self) -> Tensor:
        """Draw actions (num_lanes, count), int64."""
        return sample_ranked(self.logits, self.count)

    def mode(self) -> Tensor:
        """The likeliest order (num_lanes, count), int64."""
        return self.logits.topk(self.count, dim=1).indices

    def actions_from_params(self, logits: Tensor, deterministic: bool = False) -> Tensor:
        """Actions for logits."""
        return self.proba_distribution(logits).get_actions(deterministic)

    def log_prob_from_params(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Actions for logits, and their log-probability."""
        actions = self.actions_from_params(logits)
        return actions, self.log_prob(actions)

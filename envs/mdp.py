"""The routing MDP on batched tensors: the only copy of its rules.

State: a token (a lane) before a routed site. Action: the subset of the site's units that run for it. Transition: the
site runs. Reward: minus price times compute at every site, plus quality against the native rollout at the last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs.config import EnvConfig
from envs.layout import OBSERVATION_BOUND, ObservationLayout
from envs.reward import quality, shared, step_reward
from envs.token_source import TokenSource
from moe_backbone import ComputeMeter, MoETransformer, NativeRouter, best_units
from moe_backbone.checks import require_price


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences of one episode and what native routing predicts for them.

    Attributes:
        tokens: (num_sequences, seq_len), int64; copies of one sequence lie next to each other.
        targets: Next tokens, same shape.
        price: Nats per native compute (num_sequences,), float32.
        native_logits: (num_sequences, seq_len, vocab_size), float32.
    """

    tokens: Tensor
    targets: Tensor
    price: Tensor
    native_logits: Tensor

    def token(self, position: int) -> TokenBatch:
        """The one token at `position` of every sequence."""
        return replace(
            self,
            tokens=self.tokens[:, position : position + 1],
            targets=self.targets[:, position : position + 1],
            native_logits=self.native_logits[:, position : position + 1],
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """Outcome of one site for all lanes; every tensor is (num_lanes, ...), float32.

    Attributes:
        observation: Of the next site, or of the end when `terminated`.
        reward: `quality - price * cost`.
        cost: Fraction of native compute that this step spent.
        quality: Zeros before the last site.
        terminated: Whether this was the last site; the same for all lanes.
    """

    observation: Tensor
    reward: Tensor
    cost: Tensor
    quality: Tensor
    terminated: bool


class RoutingMDP:
    """Runs every site once for all lanes.

    Args:
        backbone: Frozen, in evaluation mode.
        source: Where sequences come from.
        config: Rules.
        num_sequences: Different sequences of an episode; each is there `rollouts_per_sequence` times.

    Attributes:
        layout: Slices of an observation.
        num_lanes: `num_sequences * rollouts_per_sequence * seq_len`.
        subsets: What ran at each site of the current episode, bool (num_lanes, num_units).
        logits: Of the episode that ended last (num_sequences, seq_len, vocab_size).
        quality: What that episode was paid at its end (num_lanes,), float32.
    """

    def __init__(
        self, backbone: MoETransformer, source: TokenSource, config: EnvConfig, *, num_sequences: int = 1
    ) -> None:
        if num_sequences < 1:
            raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")
        self.backbone, self.source, self.config = backbone, source, config
        self.num_sequences = num_sequences
        self.device = next(backbone.parameters()).device
        self.meter = ComputeMeter(backbone.sites, source.seq_len)
        self.layout = ObservationLayout(
            hidden_size=backbone.config.hidden_size,
            max_units=backbone.config.max_units,
            num_sites=len(backbone.sites),
        )
        self.num_lanes = num_sequences * config.rollouts_per_sequence * source.seq_len
        self.subsets: list[Tensor] = []
        self.logits: Tensor | None = None
        self.quality: Tensor | None = None

    @property
    def observation_space(self) -> spaces.Box:
        """Observation of one lane."""
        return spaces.Box(-OBSERVATION_BOUND, OBSERVATION_BOUND, (self.layout.size,), np.float32)

    @property
    def action_space(self) -> spaces.Space[Any]:
        """Action of one lane."""
        if self.config.action == "count":
            return spaces.Discrete(self.layout.max_units + 1)
        return spaces.MultiBinary(self.layout.max_units)

    @torch.no_grad()
    def draw(
        self,
        generator: np.random.Generator,
        *,
        tokens: Tensor | None = None,
        targets: Tensor | None = None,
        price: float | None = None,
    ) -> TokenBatch:
        """Draw sequences and prices, and run them natively once.

        Args:
            generator: The only source of chance.
            tokens: Sequences to use instead (num_sequences, seq_len), int64.
            targets: Their next tokens; needed with `tokens`.
            price: One price for all instead of drawn ones.

        Raises:
            ValueError: If the price is not positive and finite, or tokens come without targets of the same shape.
        """
        if tokens is None:
            tokens, targets = self.source.draw(self.num_sequences, generator)
        expected = (self.num_sequences, self.source.seq_len)
        if targets is None or tokens.shape != targets.shape or tuple(tokens.shape) != expected:
            raise ValueError(f"tokens and targets must both have shape {expected}, got {tuple(tokens.shape)}")
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        prices = self._prices(generator, price)
        native_logits, _ = self.backbone.run(tokens, NativeRouter())
        copies = self.config.rollouts_per_sequence
        return TokenBatch(
            tokens=tokens.repeat_interleave(copies, 0),
            targets=targets.repeat_interleave(copies, 0),
            price=prices.repeat_interleave(copies),
            native_logits=native_logits.repeat_interleave(copies, 0),
        )

    def _prices(self, generator: np.random.Generator, price: float | None) -> Tensor:
        low, high = self.config.price_low, self.config.price_high
        if price is not None:
            require_price("price", price)
            low = high = price
        drawn = np.exp(generator.uniform(np.log(low), np.log(high), self.num_sequences))
        return torch.as_tensor(drawn, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def begin(self, batch: TokenBatch, cache: Any | None = None) -> Tensor:
        """Stand before the first site: observations (num_lanes, size), float32.

        Args:
            batch: Sequences, or one token of each (then `cache` holds the earlier ones).
            cache: Keys and values of earlier tokens.
        """
        self.batch = batch
        lane_prices = batch.price.repeat_interleave(batch.tokens.shape[1])
        self.state = self.backbone.begin(batch.tokens, lane_prices, cache)
        self.subsets = []
        return self.layout.pack(self.backbone.observe(self.state))

    def reset(self, generator: np.random.Generator) -> Tensor:
        """Begin with newly drawn sequences."""
        return self.begin(self.draw(generator))

    @torch.no_grad()
    def step(self, action: Tensor) -> Step:
        """Run the current site.

        Args:
            action: bool (num_lanes, max_units), or int64 (num_lanes,) for the count codec.
        """
        index, positions, price = self.state.site_index, self.state.positions, self.state.price
        subset = self.decode(action)
        cost = self.meter.compute(index, subset, positions)
        self.state = self.backbone.advance(self.state, subset)
        self.subsets.append(subset)
        terminated = index + 1 == len(self.backbone.sites)
        if terminated:
            gained = self.quality = self._quality()
            reward = step_reward(price, cost, gained)
            observation = self.layout.pack_terminal(self.state.features.flatten(0, 1), price)
        else:
            gained = torch.zeros_like(cost)
            reward = step_reward(price, cost, None)
            observation = self.layout.pack(self.backbone.observe(self.state))
        return Step(observation=observation, reward=reward, cost=cost, quality=gained, terminated=terminated)

    @property
    def unit_price(self) -> Tensor:
        """What one unit of the current site costs each lane, nats: price times its compute (num_lanes,), float32."""
        flops = self.meter.unit_flops(self.state.site_index, self.state.positions)
        return self.state.price * (flops / self.meter.native_flops).float()

    def decode(self, action: Tensor) -> Tensor:
        """Subset of the current site that an action means: bool (num_lanes, num_units)."""
        view = self.backbone.observe(self.state)
        if self.config.action == "count":
            return best_units(view.scores, action)
        return action[:, : view.site.num_units]

    def _quality(self) -> Tensor:
        self.logits = self.backbone.finish(self.state)
        value = quality(self.config.quality, self.batch.native_logits, self.logits, self.batch.targets)
        return shared(value, self.config.credit).flatten()

"""The routing MDP on batched tensors: the only copy of its rules.

State: a token (a lane) before a routed site. Action: the subset of the site's units that run for it. Transition: the
site runs. Reward: minus price times compute at every site, plus quality against the native rollout at the last; by
option also minus what an uneven load of the experts costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs.config import EnvConfig
from envs.layout import OBSERVATION_BOUND, ObservationLayout
from envs.native import NativeReference, to_device
from envs.reward import quality, step_reward
from envs.rollout import Rollout, TokenBatch
from envs.token_source import TokenSource
from moe_backbone import Backbone, ComputeMeter, best_units
from moe_backbone.checks import require, require_price
from moe_backbone.compensation import Compensation
from moe_backbone.compute import earlier_keys
from moe_backbone.precision import full_precision
from moe_backbone.quality import credited
from moe_backbone.transformer import RoutingState


@dataclass(frozen=True, kw_only=True)
class Step:
    """Outcome of one site for all lanes; every tensor is (num_lanes, ...), float32.

    Attributes:
        observation: Of the next site, or of the end when `terminated`.
        reward: `quality - price * cost`, minus `balance` where it is priced.
        cost: Fraction of native compute that this step spent, and `cache_price` times the share of the native cache
            that it leaves behind.
        quality: Zeros before the last site.
        terminated: Whether this was the last site; the same for all lanes.
        truncated: Always False: an episode is never cut off.
        balance: What loads and nodes of the chosen units cost, nats; None where neither is priced.
    """

    observation: Tensor
    reward: Tensor
    cost: Tensor
    quality: Tensor
    terminated: bool
    truncated: bool = False
    balance: Tensor | None = None


class RoutingMDP:
    """Runs every site once for all lanes.

    Args:
        backbone: Frozen, in evaluation mode.
        source: Where sequences come from.
        config: Rules.
        num_sequences: Different sequences of an episode; each is there `rollouts_per_sequence` times.

    Attributes:
        layout: Slices of an observation.
        drops_keys: Whether tokens drop their keys in heads that they do not use (head meaning `query_key_value`).
        num_lanes: `num_sequences * rollouts_per_sequence * seq_len`.
        subsets: What ran at each site of the current episode, bool (num_lanes, num_units).
        quality: What the episode that ended last was paid at its end (num_lanes,), float32.
        price_range: Lowest and highest price drawn, nats per native compute; the config's, may be set at any time.
        compensation: Constants that a router brings in place of skipped units, or None; may be set at any time.
    """

    def __init__(self, backbone: Backbone, source: TokenSource, config: EnvConfig, *, num_sequences: int = 1) -> None:
        if num_sequences < 1:
            raise ValueError(f"num_sequences must be at least 1, got {num_sequences}")
        self.drops_keys = any(site.drops_keys for site in backbone.sites)
        rule = "cache_price must be 0 where every token leaves all keys and values (head_meaning query)"
        require(self.drops_keys or config.cache_price == 0, f"{rule}, got {config.cache_price}")
        self.backbone, self.source, self.config = backbone, source, config
        self.load_prices = config.load_prices
        self.num_sequences = num_sequences
        self.device = next(backbone.parameters()).device
        self.meter = ComputeMeter(backbone.sites, source.seq_len)
        positions = torch.arange(source.seq_len, device=self.device)
        self._site_flops = [self.meter.unit_flops(index, positions) for index in range(len(backbone.sites))]
        self.layout = ObservationLayout(
            hidden_size=backbone.config.hidden_size,
            max_units=backbone.config.max_units,
            num_sites=len(backbone.sites),
        )
        ranked, most = config.ranked_units, self.layout.max_units
        if config.action == "ranked":
            require(ranked <= most, f"ranked_units must be at most max_units={most}, got {ranked}")
        self.num_lanes = num_sequences * config.rollouts_per_sequence * source.seq_len
        self._native = NativeReference(backbone, config.native_cache_mb * 2**20)
        self.subsets: list[Tensor] = []
        self.quality: Tensor | None = None
        self.compensation: Compensation | None = None
        self.price_range = (config.price_low, config.price_high)

    @property
    def observation_space(self) -> spaces.Box:
        """Observation of one lane."""
        return spaces.Box(-OBSERVATION_BOUND, OBSERVATION_BOUND, (self.layout.size,), np.float32)

    @property
    def action_space(self) -> spaces.Space[Any]:
        """Action of one lane."""
        if self.config.action == "count":
            return spaces.Discrete(self.layout.max_units + 1)
        if self.config.action == "ranked":
            return spaces.MultiDiscrete([self.layout.max_units] * self.config.ranked_units)
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
        prices = self._prices(generator, price)
        copies = self.config.rollouts_per_sequence
        return TokenBatch(
            tokens=to_device(tokens, self.device).repeat_interleave(copies, 0),
            targets=to_device(targets, self.device).repeat_interleave(copies, 0),
            price=prices.repeat_interleave(copies),
            native=self._native.logits(tokens),
        )

    def _prices(self, generator: np.random.Generator, price: float | None) -> Tensor:
        low, high = self.price_range
        if price is not None:
            require_price("price", price)
            low = high = price
        drawn = np.exp(generator.uniform(np.log(low), np.log(high), self.num_sequences))
        return to_device(torch.as_tensor(drawn, dtype=torch.float32), self.device)

    @torch.no_grad()
    def begin(self, batch: TokenBatch, cache: Any | None = None) -> Tensor:
        """Stand before the first site: observations (num_lanes, size), float32.

        Args:
            batch: Sequences, or one token of each (then `cache` holds the earlier ones).
            cache: Keys and values of earlier tokens.
        """
        self.batch = batch
        self._rollout = Rollout(self.backbone, batch, cache)
        self.subsets = []
        return self._rollout.observation(self.layout)

    def reset(self, generator: np.random.Generator) -> Tensor:
        """Begin with newly drawn sequences."""
        return self.begin(self.draw(generator))

    @torch.no_grad()
    def step(self, action: Tensor) -> Step:
        """Run the current site.

        Args:
            action: bool (num_lanes, max_units); int64 (num_lanes,) for the count codec, (num_lanes, ranked_units) for
                the ranked one.
        """
        subset, price = self.decode(action), self.price
        cost = self._cost(subset)
        balance = self.balance(self._rollout.site_index, subset) if self.load_prices.any else None
        self._rollout.advance(subset, self.compensation)
        self.subsets.append(subset)
        terminated = self._rollout.ended
        if terminated:
            gained = self.quality = self._quality()
            reward = step_reward(price, cost, gained, balance)
        else:
            gained = torch.zeros_like(cost)
            reward = step_reward(price, cost, None, balance)
        observation = self._rollout.observation(self.layout)
        return Step(
            observation=observation, reward=reward, cost=cost, quality=gained, terminated=terminated, balance=balance
        )

    @property
    def price(self) -> Tensor:
        """Price of every lane, nats per native compute (num_lanes,), float32."""
        return self._rollout.price

    @property
    def state(self) -> RoutingState:
        """Where all lanes stand; many lanes are copied at each call."""
        return self._rollout.state

    @property
    def logits(self) -> Tensor:
        """Predictions of the current episode, which has ended (num_sequences, seq_len, vocab_size), float32."""
        return self._rollout.logits()

    def _cost(self, subset: Tensor) -> Tensor:
        """What the chosen units of the current site cost, see `Step.cost`: float32 (num_lanes,)."""
        index, meter = self._rollout.site_index, self.meter
        if not meter.sites[index].drops_keys:
            return (self._by_sequence(subset.sum(1)) * self._unit_flops / meter.native_flops).float().flatten()
        flops = meter.flops(index, subset, self._rollout.positions_of_lanes, self._rollout.earlier_keys)
        share = meter.cache_bytes(index, subset) / meter.native_cache_bytes
        return (flops / meter.native_flops + self.config.cache_price * share).float()

    @property
    def unit_price(self) -> Tensor:
        """What one unit of the current site costs each lane, nats: price times its compute (num_lanes,), float32.

        Every earlier token is taken to be a key; see `prices_follow_draws`.
        """
        return (self._by_sequence(self.price) * (self._unit_flops / self.meter.native_flops).float()).flatten()

    @property
    def prices_follow_draws(self) -> bool:
        """Whether what a unit costs depends on what other lanes do: on loads, or on the keys that earlier tokens kept.

        Then `unit_prices` says it, not `unit_price`.
        """
        return self.load_prices.any or self.drops_keys

    def unit_prices(self, action: Tensor) -> Tensor:
        """What each unit of the current site costs each lane when all lanes act like this, whether it uses it or not.

        Args:
            action: As `step` takes it.

        Returns:
            Nats (num_lanes, max_units), float32; zeros for units that the site does not have.
        """
        index, subset = self._rollout.site_index, self.decode(action)
        if self.meter.sites[index].drops_keys:
            prices = self.price.unsqueeze(1) * self._unit_costs(index, subset)
        else:
            loads = self.load_prices.unit_prices(subset, self.backbone.sites[index])
            prices = self.unit_price.unsqueeze(1) + loads
        return torch.nn.functional.pad(prices, (0, self.layout.max_units - subset.shape[1]))

    def _unit_costs(self, index: int, subset: Tensor) -> Tensor:
        """What each head would cost each lane, its key and value included: float32 (num_lanes, num_units)."""
        site, meter = self.meter.sites[index], self.meter
        keys = 1 + earlier_keys(subset, self._rollout.positions_of_lanes, self._rollout.earlier_keys)
        flops = site.unit_flops + site.unit_flops_per_key * keys.double()
        share = site.unit_cached_numbers * meter.bytes_per_number / meter.native_cache_bytes
        return (flops / meter.native_flops + self.config.cache_price * share).float()

    def balance(self, index: int, subset: Tensor) -> Tensor:
        """What loads and nodes of the chosen units at site `index` cost each lane, nats (num_lanes,), float32.

        The part of loads is a mean-field term: every lane takes those of all lanes, its own use in them, as given.

        Args:
            index: Which site; it costs nothing at heads.
            subset: What all lanes use there, bool (num_lanes, num_units).

        Example: of four lanes three use expert 0 and one expert 1, natively one of two: at a `balance_price` of .1 the
        three pay .05 and the one gets .05; see `load_excess` and `LoadPrices`.
        """
        with full_precision(subset.device):
            return self.load_prices.paid(subset, self.backbone.sites[index])

    def decode(self, action: Tensor) -> Tensor:
        """Subset of the current site that an action means: bool (num_lanes, num_units)."""
        if self.config.action == "count":
            return best_units(self._rollout.scores(), action)
        num_units = self.backbone.sites[self._rollout.site_index].num_units
        if self.config.action == "ranked":
            subset = torch.full((len(action), self.layout.max_units), num_units <= action.shape[1], device=self.device)
            return subset.scatter(1, action, True)[:, :num_units]
        return action[:, :num_units]

    @property
    def _unit_flops(self) -> Tensor:
        """FLOPs of one unit of the current site for each token of a sequence: float64."""
        return self._site_flops[self._rollout.site_index][self._rollout.positions]

    def _by_sequence(self, lanes: Tensor) -> Tensor:
        """(num_lanes,) as (num_sequences, num_tokens)."""
        return lanes.view(len(self.batch.tokens), -1)

    def _quality(self) -> Tensor:
        values = []
        for batch, logits in self._rollout.finish():
            groups = (-1, batch.copies)  # copies of a sequence share one native row
            routed, targets = logits.unflatten(0, groups), batch.targets.unflatten(0, groups)
            value = quality(self.config.quality, batch.native.unsqueeze(1), routed, targets)
            values.append(credited(value.flatten(0, 1), batch.targets, self.config.credit).flatten())
        return torch.cat(values)

"""Ada-K (arXiv:2410.10456): how many experts each token needs, learned by PPO against the native rollout.

One linear allocator a layer maps the token's features to a distribution over 1 to `num_experts` experts; which ones
stays the frozen gate's order, heads stay native, and nothing else is trained. All layers are paid with the change in
log-likelihood of the true next token against the native rollout of the same token, which stands in for a critic. The
expected count under the policy is an exact term of the loss. One `cost_weight` gives one point of the trade-off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_backbone.checks import require, require_at_least
from policies.count_router import CountRouter, CountSpec

BISECTIONS = 30


@dataclass(frozen=True, kw_only=True)
class AdaKConfig:
    """How the allocators learn; the paper's values where it states them.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    cost_weight: float = 3e-3
    """Nats that one expert more at one layer must bring; the paper's lambda."""
    cost: Literal["loss", "reward"] = "loss"
    """`loss`: the expected count is a term of the loss. `reward`: the sampled count is taken off the reward."""
    warm_start: Literal["top_p", "native_k", "none"] = "top_p"
    """Labels that the allocators are fitted to first: `top_p`: experts that reach a gate mass, whose mean is native k
    (P-Warm). `native_k`: native k for every token. `none`: no fitting, all counts are equally likely."""
    warm_updates: int = 24
    """Native rollouts that the warm start is fitted to."""
    updates: int = 120
    """Rollouts of PPO."""
    n_epochs: int = 2
    """Passes over a rollout."""
    batch_size: int = 512
    """Tokens of a minibatch, each with all its layers."""
    learning_rate: float = 1e-3
    """Of AdamW; falls as a cosine in the warm start, constant in PPO."""
    weight_decay: float = 0.1
    """Of AdamW."""
    clip_range: float = 0.2
    """Clip of the probability ratio; the paper does not state it."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "n_epochs", "batch_size")
        require_at_least(self, 0, "cost_weight", "warm_updates", "updates")
        for name, known in (("cost", ("loss", "reward")), ("warm_start", ("top_p", "native_k", "none"))):
            value = getattr(self, name)
            require(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")


class Allocation(NamedTuple):
    """One rollout; every tensor is (num_layers, num_lanes, ...), and `quality` is the same for all layers."""

    features: Tensor
    """(num_layers, num_lanes, hidden_size), float32."""
    scores: Tensor
    """Log-softmax of the native gate (num_layers, num_lanes, num_experts), float32."""
    counts: Tensor
    """Experts that ran, int64."""
    log_probs: Tensor
    """Of the counts when they were drawn, nats."""
    quality: Tensor
    """Log-likelihood against the native rollout (1, num_lanes), nats."""


class AdaK:
    """Trains the allocators.

    Args:
        env: `RoutingVecEnv` with `EnvConfig(action="count", quality="log_likelihood")`; its price is not read.
        config: See there.
        seed: Of the counts drawn and of minibatches.
        router: Allocators to go on with, such as those of a warm start; None for new ones.

    Raises:
        ValueError: If the environment has other rules, or expert sites differ in size.
    """

    def __init__(self, env: Any, config: AdaKConfig, seed: int, router: CountRouter | None = None) -> None:
        rules, backbone = env.mdp.config, env.mdp.backbone
        require(rules.action == "count", f"action must be 'count' for Ada-K, got {rules.action!r}")
        expected = "quality must be 'log_likelihood' for Ada-K"
        require(rules.quality == "log_likelihood", f"{expected}, got {rules.quality!r}")
        spec = CountSpec(hidden_size=backbone.hidden_size, sites=tuple(backbone.sites))
        sizes = {(site.num_units, site.native_units) for site in spec.sites if site.kind == "experts"}
        require(len(sizes) == 1, f"expert sites must have one size for Ada-K, got {sorted(sizes)}")
        ((self.num_experts, self.native_k),) = sizes
        self.env, self.config = env, config
        self.router = (router or CountRouter(spec)).to(env.mdp.device).requires_grad_(True)
        self.generator = torch.Generator(env.mdp.device).manual_seed(seed)

    def warm_up(self, progress: Callable[[], object] = lambda: None) -> None:
        """Fit the allocators to the labels of `warm_start`; `progress` is called after each rollout.

        Every rollout is native, so its counts are the labels of `native_k`.
        """
        if self.config.warm_start == "none":
            return
        optimizer = self._optimizer()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.config.warm_updates))
        for _ in range(self.config.warm_updates):
            rollout = self._play(native=True)
            labels = rollout.counts
            if self.config.warm_start == "top_p":
                labels = top_p_counts(rollout.scores, calibrated_mass(rollout.scores, self.native_k))
            for rows in self._minibatches():
                logits = self.router.values(slice(None), rollout.features[:, rows])
                self._descend(optimizer, F.cross_entropy(logits.flatten(0, 1), labels[:, rows].flatten()))
            schedule.step()
            progress()

    def learn(self, progress: Callable[[], object] = lambda: None) -> None:
        """Improve the allocators by PPO; `progress` is called after each rollout."""
        optimizer = self._optimizer()
        for _ in range(self.config.updates):
            rollout = self._play(native=False)
            for _ in range(self.config.n_epochs):
                for rows in self._minibatches():
                    self._descend(optimizer, self.loss(Allocation(*(tensor[:, rows] for tensor in rollout))))
            progress()

    def loss(self, rollout: Allocation) -> Tensor:
        """Clipped surrogate (arXiv:1707.06347) plus the cost, nats, scalar."""
        config = self.config
        log_probs = self.router.values(slice(None), rollout.features).log_softmax(-1)
        advantage = rollout.quality
        if config.cost == "reward":  # the native rollout that it is measured against pays too
            advantage = advantage - config.cost_weight * (rollout.counts - self.native_k).sum(0, keepdim=True)
        ratio = (log_probs.gather(-1, rollout.counts.unsqueeze(-1)).squeeze(-1) - rollout.log_probs).exp()
        clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        loss = -torch.min(advantage * ratio, advantage * clipped).mean()
        if config.cost == "loss":
            loss = loss + config.cost_weight * expected_count(log_probs).mean()
        return loss

    @torch.no_grad()
    def _play(self, *, native: bool) -> Allocation:
        """One episode of every lane with counts drawn from the allocators, or with native ones."""
        env, router = self.env, self.router
        hidden_size = router.spec.hidden_size
        layers: list[tuple[Tensor, ...]] = []
        observation = env.begin_tensor(env.draw_batch())
        for site in router.spec.sites:
            counts = torch.full((env.num_envs,), site.native_units, device=observation.device)
            if site.kind == "experts":
                features = observation[:, :hidden_size]
                scores = observation[:, hidden_size : hidden_size + self.num_experts]
                chances = router.values([len(layers)], features)[0].log_softmax(-1)
                if not native:
                    counts = torch.multinomial(chances.exp(), 1, generator=self.generator).squeeze(1)
                log_probs = chances.gather(1, counts.unsqueeze(1)).squeeze(1)
                layers.append((features, scores, counts, log_probs))
            step = env.step_tensor(counts)
            observation = step.observation
        features, scores, counts, log_probs = (torch.stack(parts) for parts in zip(*layers, strict=True))
        return Allocation(features, scores, counts, log_probs, step.quality.unsqueeze(0))

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(self.router.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)

    def _minibatches(self) -> Iterator[Tensor]:
        """Every lane once."""
        device = self.env.mdp.device
        order = torch.randperm(self.env.num_envs, generator=self.generator, device=device)
        yield from order.split(self.config.batch_size)

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def expected_count(log_probs: Tensor) -> Tensor:
    """Mean count under log-probabilities (..., num_counts) of 0, 1, 2, ...: same shape without the last dimension."""
    counts = torch.arange(log_probs.shape[-1], device=log_probs.device, dtype=log_probs.dtype)
    return (log_probs.exp() * counts).sum(-1)


def top_p_counts(scores: Tensor, mass: float) -> Tensor:
    """Experts in the smallest set whose gate probabilities add up to `mass`.

    Args:
        scores: Log-softmax of the gate (..., num_experts), float32.
        mass: Fraction.

    Returns:
        (...), int64, at least 1.

    Example: probabilities (.5, .3, .2) and mass .6 give 2.
    """
    ordered = scores.exp().sort(dim=-1, descending=True).values
    return (ordered.cumsum(-1) - ordered < mass).sum(-1)


def calibrated_mass(scores: Tensor, mean_count: float) -> float:
    """The gate mass at which `top_p_counts` is `mean_count` on average, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if top_p_counts(scores, middle).float().mean() < mean_count:
            low = middle
        else:
            high = middle
    return (low + high) / 2

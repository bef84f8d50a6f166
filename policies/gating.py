"""Trains a router by back-propagation through the frozen backbone: a rival of PPO, and where PPO starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from moe_backbone import ranks
from moe_backbone.checkpoints import read_checkpoint, write_checkpoint
from moe_backbone.checks import require, require_at_least, require_finite
from moe_backbone.compute import ComputeMeter
from moe_backbone.loads import LoadPrices
from moe_backbone.quality import credited, token_divergence, token_log_likelihood, tokens_per_scored
from moe_backbone.sites import SiteView
from policies.linear_router import LinearRouter

Relaxation = Literal["straight_through", "hard_concrete"]
TEMPERATURE, STRETCH = 2 / 3, (-0.1, 1.1)
"""Of hard-concrete gates, as in arXiv:1712.01312."""
END_FACTOR = 0.03
"""Share of the learning rate that is left at the end."""


@dataclass(frozen=True, kw_only=True)
class GatingConfig:
    """How gates are trained.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    steps: int = 400
    """Optimiser steps before the first update of PPO; 0 for none."""
    per_update: int = 1
    """Optimiser steps between two updates of PPO; 0 for none."""
    num_sequences: int = 8
    """Sequences of a step."""
    learning_rate: float = 3e-3
    """Adam's learning rate at the start; falls linearly to 3 % of it."""
    relaxation: Relaxation = "straight_through"
    """`straight_through`: units are sampled, and a bit's gradient is what turning its unit round would change, to first
    order. `hard_concrete`: units run to a sampled degree (arXiv:1712.01312)."""
    sharpness: tuple[float, float] = (1.0, 5.0)
    """Factor on the router's logits at the start and at the end, linear between; PPO draws with it too. The larger, the
    closer are the units drawn to those that the router decides for without chance, on which it is judged; and the
    fewer others it tries."""
    price_balance: float = 0.5
    """Sequences count in proportion to `price ** -price_balance`."""
    max_grad_norm: float = 0.5
    """Clip of the gradient's norm, for the router and for its compensation each."""
    save_every: int = 50
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "steps", "per_update")
        require_at_least(self, 1, "num_sequences", "save_every")
        require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        require(min(self.sharpness) > 0, f"sharpness must be positive, got {self.sharpness}")
        known = get_args(Relaxation)
        require(self.relaxation in known, f"relaxation must be one of {', '.join(known)}, got {self.relaxation!r}")


class Batch(Protocol):
    """Text of a step, as `envs.TokenBatch` has it, each sequence once."""

    @property
    def tokens(self) -> Tensor:
        """(num_sequences, seq_len), int64."""

    @property
    def targets(self) -> Tensor:
        """Next tokens, same shape; `UNSCORED` where nothing is to be predicted."""

    @property
    def price(self) -> Tensor:
        """Nats per native compute (num_sequences,), float32."""

    @property
    def native(self) -> Tensor:
        """Logits of native routing (num_sequences, seq_len, vocab_size), float32."""


class Spent(NamedTuple):
    """What each token is expected to cost; every tensor is (num_tokens,), float32."""

    compute: Tensor
    """Fraction of native compute."""
    cache: Tensor
    """Share of the native keys and values that it keeps; zeros where these are not priced."""
    balance: Tensor
    """What loads and nodes of its experts cost, nats, see `LoadPrices`; zeros where they are not priced."""


class GateTrainer:
    """Trains a `LinearRouter`, and its compensation if it has one, on quality minus price times expected compute.

    Args:
        router: Trained in place.
        backbone: Frozen `MoETransformer`.
        draw: Returns the next `Batch`.
        config: How.
        quality: `kl` or `log_likelihood`, as in the environment.
        credit: `token` or `sequence`, as in the environment; they differ where some tokens are not scored.
        load_prices: As in the environment; loads are expected ones, taken as given.
        cache_price: As in the environment, a fraction of native compute.
        seed: Of the sampled units.
        checkpoint: File to go on from if it exists, and to keep the training in; None for neither.
        later_steps: Steps to come after `run`, by `train`; the learning rate falls over all.
        report: Called with the step and figures by name whenever a checkpoint is due.
        generators: State of what `draw` draws from: a getter and a setter of JSON values, for exact resumption.

    Raises:
        ValueError: If the quality has no gradient.
    """

    def __init__(
        self,
        router: LinearRouter,
        backbone: Any,
        draw: Callable[[], Batch],
        config: GatingConfig,
        *,
        quality: str = "kl",
        credit: str = "token",
        load_prices: LoadPrices | None = None,
        cache_price: float = 0.0,
        seed: int = 0,
        checkpoint: Path | None = None,
        later_steps: int = 0,
        report: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
        generators: tuple[Callable[[], Any], Callable[[Any], None]] | None = None,
    ) -> None:
        require(quality in ("kl", "log_likelihood"), f"quality must be kl or log_likelihood for gates, got {quality}")
        self.router, self.backbone, self.draw, self.config, self.quality = router, backbone, draw, config, quality
        self.checkpoint, self.report, self.generators, self.step = checkpoint, report, generators, 0
        self.credit, self.load_prices, self.cache_price = credit, load_prices or LoadPrices(), cache_price
        self.total = config.steps + later_steps
        self.meter = ComputeMeter(backbone.sites, backbone.config.seq_len)
        self.noise = torch.Generator().manual_seed(ranks.own_seed(seed))
        maps, constants = [router.weight, router.price_weight], list(router.compensation_parameters())
        self.groups = [group for group in (maps, constants) if group]
        self.optimizer = torch.optim.Adam(maps + constants, lr=config.learning_rate, eps=1e-5)
        self._sharpen()

    def run(self, *, progress: bool = True, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train for the configured steps; False if `stop`, asked before each, ended it, after a checkpoint was kept.

        Training that was not begun here goes on from `checkpoint`. Ranks stop together.
        """
        if self.step == 0 and self.checkpoint is not None:
            read_checkpoint(self.checkpoint, "gates", self.restore, self.router.weight.device)
        end, every = self.config.steps, self.config.save_every
        with ranks.bar(total=end, initial=self.step, desc="gates", unit="step", disable=not progress) as bar:
            while self.step < end and not ranks.any_rank(stop()):
                figures = self.train(1)
                bar.update()
                if self.step % every == 0 or self.step == end:
                    bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
                    self.report(self.step, figures)
                    self._write()
        if self.step < end:
            self._write()
        return self.step >= end

    def train(self, steps: int) -> dict[str, float]:
        """Train for some steps; `loss` and expected `compute` of the last one, none without a step."""
        weights = [weight for group in self.groups for weight in group]
        before = [weight.requires_grad for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        figures, first = [self._train_step() for _ in range(steps)], self.step - steps
        for weight, was in zip(weights, before, strict=True):
            weight.requires_grad_(was).grad = None
        if not figures:
            return {}
        losses, computes = torch.stack(figures).t().tolist()
        require_finite(losses, "gates' loss", lambda index: f"step {first + index}", "lower warm_start.learning_rate")
        return {"loss": losses[-1], "compute": computes[-1]}

    def _train_step(self) -> Tensor:
        """One step: loss and mean expected compute."""
        remaining = 1 - self.step / self.total
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (END_FACTOR + (1 - END_FACTOR) * remaining)
        loss, compute = self._loss(self.draw())
        self.optimizer.zero_grad()
        loss.backward()
        ranks.average_gradients(weight for weights in self.groups for weight in weights)
        for weights in self.groups:
            torch.nn.utils.clip_grad_norm_(weights, self.config.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        self._sharpen()
        return torch.stack((loss, compute.mean())).detach()

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted mean of loss plus what routing is expected to cost, and the expected compute of each token."""
        seq_len = batch.tokens.shape[1]
        price = batch.price.repeat_interleave(seq_len)
        with self.backbone.compensated(self.router.compensation):
            logits, spent = self._episode(batch.tokens, price)
        if self.quality == "kl":
            lost = token_divergence(batch.native, logits, batch.targets)
        else:
            lost = -token_log_likelihood(logits, batch.targets)
        if self.credit == "token":
            lost = credited(lost, batch.targets, "token")
        else:  # as a mean, what `credited` shares out
            lost = lost * tokens_per_scored(batch.targets)
        weight = price**-self.config.price_balance
        paid = lost.flatten() + price * spent.compute
        if self.cache_price:
            paid = paid + self.cache_price * price * spent.cache
        if self.load_prices.any:
            paid = paid + spent.balance
        return (weight * paid).mean(), spent.compute

    def _episode(self, tokens: Tensor, price: Tensor) -> tuple[Tensor, Spent]:
        """Logits of sampled routing and what it is expected to cost, with gradients."""
        state, compute = self.backbone.begin(tokens, price), torch.zeros_like(price)
        cache = balance = torch.zeros_like(price)
        while state.site_index < len(self.backbone.sites):
            view = self.backbone.observe(state)
            logits = self.router.view_logits(_detached(view))
            positions = state.positions
            if self.config.relaxation == "straight_through":
                chance = logits.sigmoid()
                subset = self._uniform(chance) < chance
                state = self.backbone.advance(state, subset, subset + (chance - chance.detach()))
            else:
                low, high = STRETCH
                chance = (logits - TEMPERATURE * torch.tensor(-low / high).log().to(logits)).sigmoid()
                degree = ((self._uniform(logits).logit(1e-6) + logits) / TEMPERATURE).sigmoid() * (high - low) + low
                state = self.backbone.advance(state, None, degree.clamp(0, 1))
            compute = compute + self.meter.expected_compute(view.index, chance, positions)
            if self.cache_price:
                cache = cache + self.meter.cache_bytes(view.index, chance) / self.meter.native_cache_bytes
            balance = balance + self.load_prices.paid(chance, view.site)
        return self.backbone.finish(state), Spent(compute, cache, balance)

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.noise).to(like.device)

    def _sharpen(self) -> None:
        """The router's sharpness for the next step."""
        first, last = self.config.sharpness
        self.router.sharpness = first + (last - first) * self.step / max(1, self.total)

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on to the bit, on all ranks."""
        kept = json.dumps(self.generators[0]()) if self.generators else ""
        draws = ranks.gather({"noise": self.noise.get_state(), "generators": kept})
        state = {"step": self.step, "draws": draws}
        return state | {"router": self.router.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.step = state["step"]
        self.router.load_state_dict(state["router"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._sharpen()
        if (draws := ranks.own_part(state["draws"])) is not None:
            self.noise.set_state(draws["noise"].cpu())
            if self.generators and draws["generators"]:
                self.generators[1](json.loads(draws["generators"]))

    def _write(self) -> None:
        if self.checkpoint is not None:
            write_checkpoint(self.checkpoint, self.state())


def _detached(view: SiteView) -> SiteView:
    """A router judges what it sees; what it sees is not changed to please it."""
    return SiteView(
        index=view.index,
        site=view.site,
        features=view.features.detach(),
        scores=view.scores.detach(),
        price=view.price,
        tokens=view.tokens,
    )

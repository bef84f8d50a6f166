"""Text in, trained backbone out; cached by the hash of everything that shapes the weights."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_backbone import ranks
from moe_backbone.checkpoints import discard_checkpoint, read_checkpoint, write_checkpoint
from moe_backbone.checks import require, require_finite
from moe_backbone.config import BackboneConfig
from moe_backbone.corpus import Corpus, Split
from moe_backbone.files import locked, read_whole, write_atomic
from moe_backbone.precision import autocast, loss_scaler
from moe_backbone.pretrain_config import PretrainConfig, shaping
from moe_backbone.quality import mean_scored, token_log_likelihood
from moe_backbone.random_routing import RandomRouting, disagreement
from moe_backbone.sites import NativeRouter, Router, SiteView
from moe_backbone.transformer import MoETransformer, balance_loss

logger = logging.getLogger(__name__)

RouterMaker = Callable[[torch.Generator], Router]
RECIPE_VERSION = 2
"""Raised when this file trains other weights from the same settings."""


class _Recorder:
    """Remembers the gates of expert sites for the balance loss."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.compensation = getattr(router, "compensation", None)
        self.scores: list[Tensor] = []
        self.subsets: list[Tensor] = []

    def select(self, view: SiteView) -> Tensor:
        subset = self.router.select(view)
        if view.site.kind == "experts":
            self.scores.append(view.scores)
            self.subsets.append(subset)
        return subset


def cache_folder() -> Path:
    """Where trained backbones are kept: $ROUTEGYM_CACHE, else the user's cache folder."""
    if folder := os.environ.get("ROUTEGYM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "routegym"


def backbone_key(corpus: Corpus, config: BackboneConfig, pretrain: PretrainConfig) -> str:
    """Hash of everything that shapes the weights."""
    return content_key([RECIPE_VERSION, corpus.sha256, asdict(config), shaping(pretrain)])


def content_key(content: Any) -> str:
    """Short hash of JSON values, for the names of kept files."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def load_or_train(
    corpus: Corpus, config: BackboneConfig, pretrain: PretrainConfig, *, device: str = "cpu"
) -> MoETransformer:
    """The trained backbone, from the cache if it was trained before.

    An interrupted training goes on from its last look at the validation documents.

    Returns:
        The backbone in evaluation mode, frozen, on `device`.
    """
    path = cache_folder() / f"backbone-{backbone_key(corpus, config, pretrain)}.safetensors"
    logger.info("backbone: %s%s", "" if path.exists() else "training once, then kept at ", path)
    return train_once(path, config, lambda partial: Pretraining(corpus, config, pretrain, device, partial), device)


def train_once(path: Path, config: BackboneConfig, begin: Callable[[Path], Pretraining], device: str) -> MoETransformer:
    """The backbone kept at `path`, frozen on `device`; trained first if it is not there, from where it was stopped."""
    backbone = MoETransformer(config)
    partial = path.with_suffix(".partial")
    if not ranks.broadcast(path.exists):
        with locked(partial, "backbone", waiting=lambda: logger.info("backbone: another process trains it; waiting")):
            if not ranks.broadcast(path.exists):
                trained = begin(partial).run()
                with ranks.first_alone():
                    write_atomic(path, lambda temporary: save_file(trained.cpu().state_dict(), temporary))
                discard_checkpoint(partial)
    load_weights(backbone, path)
    return backbone.requires_grad_(False).eval().to(device)


def load_weights(backbone: MoETransformer, path: Path) -> None:
    """Give a backbone the weights of a `.safetensors` file.

    Raises:
        ValueError: If it is damaged or of other sizes.
    """
    read_whole(path, "backbone", lambda file: backbone.load_state_dict(load_file(file)))


class Pretraining:
    """One training run of a backbone."""

    title = "pretraining"
    """What its progress bar is called."""

    def __init__(
        self,
        corpus: Corpus,
        config: BackboneConfig,
        pretrain: PretrainConfig,
        device: str,
        partial: Path,
        start: MoETransformer | None = None,
    ) -> None:
        """Seeded weights, or those of `start`, or those of an interrupted run if `partial` exists."""
        torch.manual_seed(pretrain.seed)
        share = pretrain.sequences // 2 if pretrain.consistency else pretrain.sequences
        rule = f"pretrain.sequences must be spread evenly over {ranks.world_size()} ranks"
        require(share % ranks.world_size() == 0, f"{rule}, got {pretrain.sequences}")
        self.corpus, self.config, self.pretrain, self.device, self.partial = corpus, config, pretrain, device, partial
        self.backbone = self._begin(start).to(device)
        self.optimizer = torch.optim.AdamW(
            [weight for weight in self.backbone.parameters() if weight.requires_grad],
            lr=pretrain.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=pretrain.weight_decay,
        )
        self.batches = np.random.default_rng(pretrain.seed)
        self.noise = torch.Generator().manual_seed(ranks.own_seed(pretrain.seed))
        self.scaler = loss_scaler(pretrain.precision, device)
        self.step, self.best_loss, self.best_step = 0, math.inf, 0
        self.step_losses: list[Tensor] = []
        """Of the steps since the last look; read only then."""
        self.best_weights = self._weights()
        read_checkpoint(partial, "interrupted training", self._restore, device)

    def _begin(self, start: MoETransformer | None) -> Any:
        """What is trained, before its first step."""
        backbone = MoETransformer(self.config)
        if start is not None:
            backbone.load_state_dict(start.state_dict())
            backbone.head_meaning = start.head_meaning
        return backbone

    def run(self, report: Callable[[int, float], None] | None = None) -> MoETransformer:
        """Train to the end or until the validation loss stops falling; keep the best weights seen.

        Args:
            report: Called with the step and the validation loss in nats a token at every look.
        """
        total = self.pretrain.steps
        with ranks.bar(total=total, initial=self.step, desc=self.title, unit="step") as bar:
            while self.step < total and self._looks_without_gain() < self.pretrain.patience:
                self._train_step()
                bar.update()
                if self.step % self.pretrain.eval_every == 0 or self.step == total:
                    loss = self._look()
                    bar.set_postfix(validation_loss=f"{loss:.4f}")
                    if report is not None:
                        report(self.step, loss)
        self._load(self.best_weights)
        return self.backbone

    def _train_step(self) -> None:
        settings = self.pretrain
        drawn = self._draw(math.ceil(settings.sequences / 2) if self._twice else settings.sequences)
        tokens, targets = (part[ranks.rank() :: ranks.world_size()] for part in drawn)
        if self._twice:
            tokens, targets = tokens.repeat(2, 1), targets.repeat(2, 1)
        loss = self._loss(tokens.to(self.device), targets.to(self.device))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(self.step, settings.steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        ranks.average_gradients(self.backbone.parameters())
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step_losses.append(loss.detach())
        self.step += 1

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens of the step, each (count, seq_len)."""
        return self.corpus.train.sample(count, self.config.seq_len, self.batches)

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """What the step lowers, nats a token."""
        router = _Recorder(self._router())
        with autocast(self.pretrain.precision, self.device):
            logits, _ = self.backbone.run(tokens, router)
        loss = self._text_loss(logits, tokens, targets)
        return loss + self.pretrain.balance_weight * balance_loss(router.scores, router.subsets)

    def _text_loss(self, logits: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """What predictions (num_sequences, seq_len, vocab_size), float32, are held against: the text."""
        loss = -mean_scored(token_log_likelihood(logits, targets), targets)
        return loss + self.pretrain.consistency * disagreement(logits) if self._twice else loss

    @property
    def _twice(self) -> bool:
        """Whether the step runs half as many different sequences on two routes each."""
        return self.pretrain.consistency > 0 and self._random_share() > 0

    def _router(self) -> Router:
        """What routes the step."""
        share = self._random_share()
        return RandomRouting(1 - share, self.noise, self.pretrain.random_units) if share > 0 else NativeRouter()

    def _random_share(self) -> float:
        """Share of the step's sequences under random subsets."""
        settings = self.pretrain
        start = settings.steps * settings.random_from
        if self.step < start:
            return 0.0
        if settings.random_schedule == "constant":
            return settings.random_routing
        return settings.random_routing * (self.step + 1 - start) / max(1.0, settings.steps - start)

    def _validation_loss(self) -> float:
        return native_loss(self.backbone, self.corpus.validation, max_tokens=16_384, device=self.device)

    def _look(self) -> float:
        losses = torch.stack(self.step_losses).tolist() if self.step_losses else []
        self.step_losses = []
        since = self.step - len(losses)
        require_finite(losses, "training loss", lambda index: f"step {since + index}", "lower learning_rate")
        loss = self._validation_loss()
        require(
            math.isfinite(loss), f"validation loss must be finite, got {loss} at step {self.step}: lower learning_rate"
        )
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.best_weights = loss, self.step, self._weights()
        write_checkpoint(self.partial, self._state())
        return loss

    def _looks_without_gain(self) -> int:
        return (self.step - self.best_step) // self.pretrain.eval_every

    def _weights(self) -> dict[str, Tensor]:
        """A copy of all that training may change."""
        return {name: weight.detach().clone() for name, weight in self.backbone.state_dict().items()}

    def _load(self, weights: dict[str, Tensor]) -> None:
        """The reverse."""
        self.backbone.load_state_dict(weights)

    def _state(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("step", "best_loss", "best_step", "best_weights")}
        generators = {
            "batches": json.dumps(self.batches.bit_generator.state),
            "noise": ranks.gather(self.noise.get_state()),
        }
        learners = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return state | generators | learners | {"weights": self._weights()}

    def _restore(self, state: dict[str, Any]) -> None:
        for name in ("step", "best_loss", "best_step", "best_weights"):
            setattr(self, name, state[name])
        self._load(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.batches.bit_generator.state = json.loads(state["batches"])
        if (noise := ranks.own_part(state["noise"])) is not None:
            self.noise.set_state(noise.cpu())
        logger.info("backbone: going on at step %d of an interrupted training", self.step)


class FineTuning(Pretraining):
    """More training of a backbone, under a router: its weights then make up for what the router skips.

    Args:
        corpus: Text.
        start: Backbone to go on from; it is left as it is.
        settings: Learning rate, steps and the rest; its random routing is not used.
        make_router: Makes what routes from the generator that it may draw from, which resumption brings back.
        device: Where to train.
        partial: File to go on from if it exists.
    """

    def __init__(
        self,
        corpus: Corpus,
        start: MoETransformer,
        settings: PretrainConfig,
        make_router: RouterMaker,
        device: str,
        partial: Path,
    ) -> None:
        super().__init__(corpus, start.config, settings, device, partial, start)
        self.routing = make_router(self.noise)

    def _router(self) -> Router:
        return self.routing

    def _random_share(self) -> float:
        return 0.0

    def _validation_loss(self) -> float:
        """Mean of the losses under native routing and under the router."""
        where: dict[str, Any] = {"max_tokens": 16_384, "device": self.device}
        routers: tuple[Router, ...] = (NativeRouter(), self.routing)
        return sum(routed_loss(self.backbone, router, self.corpus.validation, **where) for router in routers) / 2


def fine_tune(
    path: Path, corpus: Corpus, start: MoETransformer, settings: PretrainConfig, make_router: RouterMaker, device: str
) -> MoETransformer:
    """A fine-tuned copy of a backbone, from `path` if it was trained before, else kept there.

    Returns:
        The backbone in evaluation mode, frozen, on `device`, under the head meaning of `start`.
    """
    backbone = train_once(
        path, start.config, lambda partial: FineTuning(corpus, start, settings, make_router, device, partial), device
    )
    backbone.head_meaning = start.head_meaning
    return backbone


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over 4 % of the steps, then a cosine to 0.

    Example: 100 steps give .25 at step 0, 1 at step 4 and .5 at step 52.
    """
    warmup = max(1, steps // 25)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def native_loss(backbone: MoETransformer, split: Split, *, max_tokens: int, device: str) -> float:
    """Mean loss under native routing, nats a token."""
    return routed_loss(backbone, NativeRouter(), split, max_tokens=max_tokens, device=device)


@torch.no_grad()
def routed_loss(backbone: MoETransformer, router: Router, split: Split, *, max_tokens: int, device: str) -> float:
    """Mean loss under a router, nats a token."""
    tokens, targets, _ = split.windows(backbone.config.seq_len, max_tokens)
    losses = []
    for start in range(0, len(tokens), 32):
        logits, _ = backbone.run(tokens[start : start + 32].to(device), router)
        losses.append(-token_log_likelihood(logits, targets[start : start + 32].to(device)))
    return mean_scored(torch.cat(losses), targets.to(device)).item()

"""A trained backbone is trained on, on a mixture of corpora, and measured on each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_backbone.corpus import Split
from moe_backbone.mixture import Mixture
from moe_backbone.pretrain import RECIPE_VERSION, PretrainConfig, Pretraining, content_key, native_loss
from moe_backbone.quality import token_divergence, token_log_likelihood
from moe_backbone.tuning import TuningConfig, begin_tuning, frozen_sha256, merged, trained_parameters

VALIDATION_TOKENS = 16_384
"""Of each corpus, at every look."""


class Continual(Pretraining):
    """More training of a backbone on a mixture.

    Training stops early by the validation loss weighted by the mixture, mean over its first and its last shares. What
    is kept is the best seen, the start among them.

    Args:
        mixture: Text.
        start: Backbone to go on from; it is left as it is.
        tuning: What learns, and how.
        device: Where to train.
        partial: File to go on from if it exists.
        max_tokens: Test tokens of each corpus.
        seq_len: Tokens of a window; None for the backbone's own.

    Attributes:
        parameters: Numbers of the start.
        trained_parameters: Numbers that learn.
        frozen_parameters: Numbers that do not.
        frozen: Hash of these, before the first step.
        before: Loss of the start on the test documents of each corpus, nats a token.
        losses: Validation loss of each corpus at the last look, nats a token.
    """

    title = "continual training"

    def __init__(
        self,
        mixture: Mixture,
        start: Any,
        tuning: TuningConfig,
        device: str,
        partial: Path,
        *,
        max_tokens: int = 65_536,
        seq_len: int | None = None,
    ) -> None:
        self.mixture, self.tuning, self.max_tokens = mixture, tuning, max_tokens
        self.seq_len: int = seq_len or start.config.seq_len
        self.losses: dict[str, float] = {}
        super().__init__(mixture.corpora[0], start.config, self._settings(), device, partial, start)

    def _settings(self) -> PretrainConfig:
        return self.tuning.training

    def _begin(self, start: Any) -> Any:
        self.start = self._kept(start) if self.tuning.distill else None
        self.before, self.parameters = self.test_losses(start), sum(weight.numel() for weight in start.parameters())
        model = self._adapt(start)
        self.frozen, self.trained_parameters = frozen_sha256(model), trained_parameters(model)
        self.frozen_parameters = sum(weight.numel() for weight in model.parameters()) - self.trained_parameters
        return model

    def _kept(self, start: Any) -> Any:
        """The start as it will be when training has begun."""
        return start

    def _adapt(self, start: Any) -> Any:
        """What is trained: the start with what the method adds."""
        backbone = super()._begin(start)
        begin_tuning(backbone, self.tuning)
        return backbone

    def run(self, report: Callable[[int, float], None] | None = None) -> Any:
        """Train to the end or until the validation loss stops falling.

        Args:
            report: Called with the step and the validation loss, weighted by the mixture, at every look.

        Returns:
            The best backbone seen, plain and frozen.

        Raises:
            RuntimeError: If a weight that should not learn has changed.
        """
        if self.step == 0:
            loss = self._look()
            if report is not None:
                report(0, loss)
        super().run(report)
        if frozen_sha256(self.backbone) != self.frozen:
            raise RuntimeError("weights that do not learn must stay as they were, but some changed")
        return self._merged()

    def _merged(self) -> Any:
        return merged(self.backbone)

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        progress = self.step / max(1, self.pretrain.steps - 1)
        tokens, targets, drawn = self.mixture.sample(count, self.seq_len, progress, self.batches)
        self.replayed = drawn == 0
        return tokens, targets

    def _text_loss(self, logits: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        if self.start is None or not self.replayed.any():
            return super()._text_loss(logits, tokens, targets)
        replayed = self.replayed.to(tokens.device)
        with torch.no_grad():
            reference = self._logits(self.start, tokens[replayed])
        apart = token_divergence(reference, logits[replayed]).sum()
        surprise = -token_log_likelihood(logits[~replayed], targets[~replayed]).sum()
        return (self.tuning.distill * apart + surprise) / targets.numel()

    def _logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens)

    def _validation_loss(self) -> float:
        splits = [corpus.validation for corpus in self.mixture.corpora]
        losses = [self._loss_on(self.backbone, split, VALIDATION_TOKENS) for split in splits]
        self.losses = dict(zip(self.mixture.names, losses, strict=True))
        weights = (self.mixture.shares(0) + self.mixture.shares(1)) / 2
        return float(np.dot(weights, losses))

    def _loss_on(self, model: Any, split: Split, max_tokens: int) -> float:
        return native_loss(model, split, max_tokens=max_tokens, device=self.device)

    def test_losses(self, model: Any) -> dict[str, float]:
        """Loss of a model on the test documents of each corpus, nats a token."""
        pairs = zip(self.mixture.names, self.mixture.corpora, strict=True)
        return {name: self._loss_on(model, corpus.test, self.max_tokens) for name, corpus in pairs}

    def _weights(self) -> dict[str, Tensor]:
        named = self.backbone.named_parameters()
        return {name: weight.detach().clone() for name, weight in named if weight.requires_grad}

    def _load(self, weights: dict[str, Tensor]) -> None:
        learning = {name: weight for name, weight in self.backbone.named_parameters() if weight.requires_grad}
        with torch.no_grad():
            for name, weight in weights.items():
                learning[name].copy_(weight)


def continual_key(mixture: Mixture, start_sha256: str, tuning: TuningConfig) -> str:
    """Hash of everything that shapes the weights."""
    texts = [[name, corpus.sha256] for name, corpus in zip(mixture.names, mixture.corpora, strict=True)]
    return content_key([RECIPE_VERSION, start_sha256, texts, mixture.first, mixture.last, asdict(tuning)])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a continual training did."""

    before: dict[str, float]
    """Loss of the start on the test documents of each corpus, nats a token."""
    after: dict[str, float]
    """The same of what came out."""
    steps: int
    """Steps that were trained."""
    best_step: int
    """Step of the weights that were kept."""
    trained_parameters: int
    """Numbers that learned."""
    parameters: int
    """Numbers of the start."""
    frozen_parameters: int
    """Numbers that did not."""
    frozen_sha256: str
    """Hash of these, which is the same before and after."""


def tune(training: Continual, report: Callable[[int, float], None] | None = None) -> tuple[Any, Outcome]:
    """Train to the end, and measure what came out.

    Args:
        training: Fresh, or brought back by its partial file, which is still there afterwards.
        report: See `Continual.run`.

    Returns:
        The trained model, and what became of it.
    """
    model = training.run(report)
    outcome = Outcome(
        before=training.before,
        after=training.test_losses(model),
        steps=training.step,
        best_step=training.best_step,
        trained_parameters=training.trained_parameters,
        parameters=training.parameters,
        frozen_parameters=training.frozen_parameters,
        frozen_sha256=training.frozen,
    )
    return model, outcome

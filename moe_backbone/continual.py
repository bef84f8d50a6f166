"""A trained backbone is trained on, on a mixture of corpora, and measured on each of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_backbone.corpus import Split
from moe_backbone.mixture import Mixture
from moe_backbone.pretrain import RECIPE_VERSION, Pretraining, native_loss
from moe_backbone.transformer import MoETransformer
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

    Attributes:
        frozen: Hash of the weights that do not learn, before the first step.
        losses: Validation loss of each corpus at the last look, nats a token.
    """

    title = "continual training"

    def __init__(self, mixture: Mixture, start: Any, tuning: TuningConfig, device: str, partial: Path) -> None:
        self.mixture, self.tuning = mixture, tuning
        self.losses: dict[str, float] = {}
        super().__init__(mixture.corpora[0], start.config, self._settings(), device, partial, start)

    def _settings(self) -> Any:
        return self.tuning.training

    def _begin(self, start: Any) -> Any:
        backbone = super()._begin(start)
        begin_tuning(backbone, self.tuning)
        self.frozen = frozen_sha256(backbone)
        return backbone

    @property
    def trained_parameters(self) -> int:
        """Numbers that learn."""
        return trained_parameters(self.backbone)

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
        return self.mixture.sample(count, self.config.seq_len, progress, self.batches)

    def _validation_loss(self) -> float:
        splits = [corpus.validation for corpus in self.mixture.corpora]
        losses = [self._held_out_loss(split) for split in splits]
        self.losses = dict(zip(self.mixture.names, losses, strict=True))
        weights = (self.mixture.shares(0) + self.mixture.shares(1)) / 2
        return float(np.dot(weights, losses))

    def _held_out_loss(self, split: Split) -> float:
        return native_loss(self.backbone, split, max_tokens=VALIDATION_TOKENS, device=self.device)

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
    content = [RECIPE_VERSION, start_sha256, texts, mixture.first, mixture.last, asdict(tuning)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def held_out_losses(backbone: MoETransformer, mixture: Mixture, *, max_tokens: int, device: str) -> dict[str, float]:
    """Loss on the test documents of each corpus, nats a token."""
    return {
        name: native_loss(backbone, corpus.test, max_tokens=max_tokens, device=device)
        for name, corpus in zip(mixture.names, mixture.corpora, strict=True)
    }

"""Training of a backbone on a task: its weights go on from a language model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_backbone.checks import require_fraction
from moe_backbone.pretrain import PretrainConfig, Pretraining, train_once
from moe_backbone.quality import UNSCORED, credited, mean_scored, scored, token_log_likelihood
from moe_backbone.tasks.load import TaskCorpus
from moe_backbone.tasks.split import TEXT_END, WORD_END
from moe_backbone.transformer import MoETransformer

RECIPE_VERSION = 1
"""Raised when this file trains other weights from the same settings."""
HIDDEN_BYTE = 0x00
"""Stands for the bytes of a word that is hidden; no text holds it."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig(PretrainConfig):
    """How the backbone is trained on a task.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    steps: int = 1600
    """Most optimiser steps; early stopping may end before."""
    sequences: int = 4
    """Windows of a step."""
    learning_rate: float = 1e-3
    """Peak of the AdamW learning rate; warmed up, then a cosine to 0."""
    patience: int = 6
    """Looks without improvement before training stops early."""
    text_weight: float = 0.05
    """Weight of predicting the text itself, against forgetting and overfitting."""
    prefix_weight: float = 0.5
    """Weight of predicting the label of a text behind each of its words; in classification only."""
    hidden_words: float = 0.05
    """Share of the words whose bytes are hidden while training."""
    smoothing: float = 0.05
    """Share of a label's probability that training spreads over all labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self, "text_weight", "prefix_weight", "hidden_words", "smoothing")


class TaskTuning(Pretraining):
    """More training of a backbone, on the labels of a task.

    Args:
        task: What is learned; its validation part decides when to stop.
        start: Backbone to go on from; it is left as it is.
        settings: How.
        device: Where to train.
        partial: File to go on from if it exists.
    """

    def __init__(
        self, task: TaskCorpus, start: MoETransformer, settings: TuningConfig, device: str, partial: Path
    ) -> None:
        super().__init__(task, start.config, settings, device, partial, start)
        self.task, self.settings = task, settings
        self._label_values = torch.tensor(task.label_bytes.values, device=device)

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        tokens, targets = super()._draw(count)
        self._clean = tokens
        separators = (tokens == WORD_END) | (tokens == TEXT_END)
        words = separators.long().cumsum(1)
        hidden = torch.rand(words.shape, generator=self.noise).gather(1, words)
        return tokens.masked_fill((hidden < self.settings.hidden_words) & ~separators, HIDDEN_BYTE), targets

    def _text_loss(self, logits: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """Of labels, of labels behind earlier words, and of the text, each a mean over its own tokens."""
        loss = self._label_loss(logits, targets)
        if self.settings.prefix_weight and not self.task.tagging:
            following = credited(targets.clamp_min(0).float(), targets, "token").long()
            earlier = following.masked_fill((tokens != WORD_END) | (following == 0), UNSCORED)
            loss = loss + self.settings.prefix_weight * self._label_loss(logits, earlier)
        if self.settings.text_weight:
            text = self._clean[:, 1:].to(targets.device).masked_fill(scored(targets[:, :-1]), UNSCORED)
            text_loss = -mean_scored(token_log_likelihood(logits[:, :-1], text), text)
            loss = loss + self.settings.text_weight * text_loss
        return loss

    def _label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy over all tokens, a share of the probability spread over the labels."""
        here = scored(targets)
        log_probabilities = logits[here].log_softmax(-1)
        exact = cross_entropy(log_probabilities, targets[here])
        spread = -log_probabilities[:, self._label_values].mean()
        return (1 - self.settings.smoothing) * exact + self.settings.smoothing * spread


def widened(backbone: MoETransformer, seq_len: int) -> MoETransformer:
    """The same weights for windows of another length, under the same head meaning."""
    other = MoETransformer(replace(backbone.config, seq_len=seq_len))
    other.load_state_dict(backbone.state_dict())
    other.head_meaning = backbone.head_meaning
    return other


def tune(
    path: Path, task: TaskCorpus, start: MoETransformer, settings: TuningConfig, device: str = "cpu"
) -> MoETransformer:
    """The backbone trained on a task, kept at `path`; from there if it is, else from where training was stopped.

    Returns:
        The backbone in evaluation mode, frozen, on `device`.
    """
    return train_once(path, start.config, lambda partial: TaskTuning(task, start, settings, device, partial), device)

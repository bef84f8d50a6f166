"""How well logits predict text: the one copy of each formula."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood of each target token in nats.

    Args:
        logits: (num_sequences, seq_len, vocab_size), float32.
        targets: (num_sequences, seq_len), int64.

    Returns:
        (num_sequences, seq_len), float32, at most 0.
    """
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def token_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the likeliest token is the target: (num_sequences, seq_len), float32, 0 or 1."""
    return (logits.argmax(-1) == targets).float()


def token_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) of each token's prediction in nats.

    Args:
        reference: Logits of the native rollout (num_sequences, seq_len, vocab_size), float32.
        logits: Logits of the routed rollout, same shape.

    Returns:
        (num_sequences, seq_len), float32, at least 0 up to rounding.
    """
    expected = reference.log_softmax(-1)
    return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)

"""How well logits predict text: the one copy of each formula."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood of each target token in nats.

    Args:
        logits: (..., vocab_size), float32.
        targets: (...), int64.

    Returns:
        (...), float32, at most 0.
    """
    return -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


def token_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the likeliest token is the target: same shape as `targets`, float32, 0 or 1."""
    return (logits.argmax(-1) == targets).float()


def token_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) of each token's prediction in nats.

    Args:
        reference: Logits of the native rollout (..., vocab_size), float32; may be broadcast.
        logits: Logits of the routed rollout (..., vocab_size), float32.

    Returns:
        (...), float32, at least 0 up to rounding.
    """
    expected = reference.log_softmax(-1)
    return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)

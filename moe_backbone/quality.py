"""How well logits predict text: the one copy of each formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UNSCORED = -100
"""Target of a token whose prediction counts for nothing; PyTorch's own sign for it."""


def scored(targets: Tensor) -> Tensor:
    """Which tokens count: bool, same shape as `targets`."""
    return targets != UNSCORED


def mean_scored(values: Tensor, targets: Tensor) -> Tensor:
    """Mean of `values` over scored tokens, a scalar; they must be 0 at all others, and have the shape of `targets`."""
    return values.mean() * tokens_per_scored(targets.flatten().unsqueeze(0)).squeeze()


def credited(values: Tensor, targets: Tensor, credit: str) -> Tensor:
    """What each token is paid of what the predictions are worth.

    Args:
        values: Worth of each prediction (num_sequences, seq_len), float32, 0 where it is not scored.
        targets: Same shape, int64.
        credit: `sequence`: each token is paid the mean over the scored tokens of its sequence. `token`: each is paid
            for the next scored token, itself if it is one; nothing where none follows.

    Example: values 0 2 0 4 0, of which 2 and 4 are scored, pay 3 3 3 3 3 for `sequence` and 2 2 4 4 0 for `token`.
    """
    if credit == "sequence":
        return (values.mean(1, keepdim=True) * tokens_per_scored(targets)).expand_as(values)
    places = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    places = torch.where(scored(targets), places, targets.shape[1] - 1)  # what stands last is 0 if nothing is scored
    return values.gather(1, places.flip(1).cummin(1).values.flip(1))


def tokens_per_scored(targets: Tensor) -> Tensor:
    """Tokens over scored ones of each sequence (num_sequences, 1), float32; exactly 1 where all are scored."""
    return targets.shape[1] / scored(targets).sum(1, keepdim=True).clamp_min(1)


def token_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood of each target token in nats.

    Args:
        logits: (..., vocab_size), float32.
        targets: (...), int64; `UNSCORED` where nothing is to be predicted.

    Returns:
        (...), float32, at most 0, and 0 where nothing is scored.
    """
    return -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


def token_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the likeliest token is the target: same shape as `targets`, float32, 0 or 1; 0 if not scored."""
    return (logits.argmax(-1) == targets).float()


def token_divergence(reference: Tensor, logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """KL(reference || logits) of each token's prediction in nats.

    Args:
        reference: Logits of the native rollout (..., vocab_size), float32; may be broadcast.
        logits: Logits of the routed rollout (..., vocab_size), float32.
        targets: (...), int64, for what is scored; None if all is.

    Returns:
        (...), float32, at least 0 up to rounding, and 0 where nothing is scored.
    """
    expected = reference.log_softmax(-1)
    divergence = (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)
    return divergence if targets is None else torch.where(scored(targets), divergence, 0.0)

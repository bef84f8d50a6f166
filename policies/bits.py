"""Independent bits: log-probability, entropy and expected count from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def bits_log_prob(logits: Tensor, bits: Tensor) -> Tensor:
    """Log-probability of independent bits, summed over the last dimension; bits is bool of the same shape."""
    return (logits * bits - F.softplus(logits)).sum(-1)


def bits_entropy(logits: Tensor) -> Tensor:
    """Entropy of independent bits in nats, summed over the last dimension."""
    return (F.softplus(logits) - logits * logits.sigmoid()).sum(-1)


class BitsTerms(torch.autograd.Function):
    """`bits_log_prob`, `bits_entropy` and the expected number of bits, with one sigmoid and one softplus for all."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three tensors of the shape of `logits` without its last dimension, float32."""
        chance, bits, soft = logits.sigmoid(), bits.to(logits.dtype), F.softplus(logits)
        ctx.save_for_backward(logits, bits, chance)
        ctx.set_materialize_grads(False)
        log_prob = torch.addcmul(-soft, logits, bits).sum(-1)
        return log_prob, torch.addcmul(soft, logits, chance, value=-1).sum(-1), chance.sum(-1)

    @staticmethod
    def backward(ctx: Any, *pulls: Tensor | None) -> tuple[Tensor, None]:
        """`bits - p` for the log-probability, `-logits * p * (1 - p)` for the entropy, `p * (1 - p)` for the count."""
        logits, bits, chance = ctx.saved_tensors
        of_log_prob, of_entropy, of_count = (None if pull is None else pull.unsqueeze(-1) for pull in pulls)
        gradient = torch.zeros_like(logits) if of_log_prob is None else of_log_prob * (bits - chance)
        spread = torch.addcmul(chance, chance, chance, value=-1)
        if of_entropy is not None:
            gradient -= of_entropy * logits * spread
        if of_count is not None:
            gradient += of_count * spread
        return gradient, None


def bits_terms(logits: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability and entropy of independent bits in nats, and how many are on in expectation.

    Args:
        logits: (..., num_units), float32.
        bits: The bits drawn, bool, same shape.

    Returns:
        Each (...), float32.
    """
    return BitsTerms.apply(logits, bits)

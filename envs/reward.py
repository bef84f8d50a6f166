"""Reward terms as pure functions."""

from __future__ import annotations

from torch import Tensor

from moe_backbone import token_correct, token_divergence, token_log_likelihood


def quality(kind: str, native_logits: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """What a rollout is worth against the native rollout of the same tokens; 0 for the native rollout itself.

    Args:
        kind: `kl`: minus KL(native || routed), nats, at most 0 and free of label noise. `log_likelihood`: change of
            the true next token's log-likelihood, nats. `accuracy`: change of 0/1 accuracy.
        native_logits: (..., vocab_size), float32; may be broadcast, as copies of a sequence share theirs.
        logits: Of the routed rollout (..., vocab_size), float32.
        targets: True next tokens (...), int64.

    Returns:
        (...), float32; 0 where nothing is scored.
    """
    if kind == "kl":
        return -token_divergence(native_logits, logits, targets)
    measure = token_log_likelihood if kind == "log_likelihood" else token_correct
    return measure(logits, targets) - measure(native_logits.expand_as(logits), targets)


def step_reward(price: Tensor, compute: Tensor, quality: Tensor | None, balance: Tensor | None = None) -> Tensor:
    """`quality - price * compute - balance`.

    Args:
        price: Nats per native compute (num_lanes,).
        compute: Fraction of native compute that this step cost (num_lanes,).
        quality: (num_lanes,), or None before the last site.
        balance: What the units' loads cost, nats (num_lanes,), or None where they cost nothing.
    """
    reward = -price * compute
    if quality is not None:
        reward = reward + quality
    return reward if balance is None else reward - balance

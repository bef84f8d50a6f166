"""Heads that drop keys, under switches that have gradients: which keys to keep can be trained by back-propagation."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_backbone.kernels import rotate
from moe_backbone.kernels.rows import record_rows

MOST_FORCE = 60.0
"""Log of what a dropped key may weigh beside those that are kept; only gradients see it."""
LEAST_REST = 1e-4
"""Share of the attention that is left to the other keys, at least, when the gradient takes one away."""


def switch_kept_heads(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor | None,
    switch: Tensor,
    projection: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
) -> Tensor:
    """`kept_head_attention` of whole sequences under switches; computes every head and every pair of tokens.

    A switch does two things. On the query's side it weighs the head's output for its token. On the key's side it
    decides whether later tokens find the token there: with a subset the gradient is what putting in or taking out that
    key would change for each of them, all other keys staying; without, a key counts to the degree of its switch. A
    token always finds its own key.

    Args:
        hidden: Token rows (num_sequences, num_tokens, hidden_size).
        weights: Head weights (num_sequences, num_tokens, num_heads).
        subset: Heads that run, bool, same shape; None to run all to the degree of `switch`.
        switch: Float, same shape.
        projection: See `kernels.reference.kept_head_attention`, as the rest.
        output_weight: (num_heads, head_size, hidden_size).
        rotation: (2, num_tokens, head_size / 2).

    Returns:
        (num_sequences, num_tokens, hidden_size).

    Example: a second token attends to its own key with value 2; the first token's key, as strong and of value 6, is not
    kept. To keep it would change the output from 2 to 4, so the gradient by the first token's switch is 2.
    """
    num_sequences, num_tokens, num_heads = switch.shape
    joint = hidden @ projection.transpose(0, 1).flatten(1)
    query, keys, values = joint.view(num_sequences, num_tokens, num_heads, 3, -1).permute(3, 0, 2, 1, 4)
    record_rows("heads", switch.numel())
    past = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=hidden.device).tril(-1)
    by_key = switch.transpose(1, 2).unsqueeze(2)  # (num_sequences, num_heads, 1, num_keys)
    degree = by_key if subset is None else subset.transpose(1, 2).unsqueeze(2).to(switch.dtype)
    kept = past * degree + torch.eye(num_tokens, dtype=switch.dtype, device=switch.device)
    scores = rotate(query, rotation) @ rotate(keys, rotation).mT * query.shape[-1] ** -0.5
    highest = scores.detach().masked_fill(kept == 0, -torch.inf).amax(-1, keepdim=True)
    force = (scores.masked_fill(past.mT, -torch.inf) - highest).clamp_max(MOST_FORCE).exp()
    total = (kept * force).sum(-1, keepdim=True)
    mixed = (kept * force) @ values / total
    if subset is not None:
        mixed = mixed + _turned_keys(by_key, past, kept.detach(), force.detach(), total.detach(), values, mixed)
    mixed = mixed.transpose(1, 2) * (weights * switch).unsqueeze(-1)
    return mixed.flatten(2) @ output_weight.flatten(0, 1)


def _turned_keys(
    by_key: Tensor, past: Tensor, kept: Tensor, force: Tensor, total: Tensor, values: Tensor, mixed: Tensor
) -> Tensor:
    """Zeros like `mixed` whose gradient by a switch is what turning that key round would change for later tokens.

    With weight e beside a total of Z a new key of value v moves the output o by e / (Z + e) * (v - o); one that goes
    had moved it by e / (Z - e) * (v - o).
    """
    rest = torch.maximum(total + (1 - 2 * kept) * force, LEAST_REST * total)
    turned = (by_key - by_key.detach()) * (past * force / rest)
    return turned @ values.detach() - turned.sum(-1, keepdim=True) * mixed.detach()

"""One attention layer of a checkpoint: heads that a token does not use are not attended with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_backbone.kernels.rows import record_rows


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, subset: Tensor) -> Tensor:
    """Attention of chosen (token, head) pairs only.

    Args:
        query: (num_sequences, num_heads, num_queries, head_size).
        key: (num_sequences, num_key_value_heads, num_keys, head_size).
        value: (num_sequences, num_key_value_heads, num_keys, value_size).
        mask: Added to the scores, or bool where True may be seen (num_sequences or 1, 1, num_queries, num_keys); None
            for causal.
        scaling: Factor on the scores.
        subset: Heads that each token uses, bool (num_sequences, num_queries, num_heads).

    Returns:
        (num_sequences, num_queries, num_heads, value_size); zeros where a head is not used.
    """
    num_sequences, num_heads, num_queries, _ = query.shape
    group = num_heads // key.shape[1]
    bias = _bias(mask, num_queries, key.shape[2], query)
    mixed = query.new_zeros(num_sequences, num_queries, num_heads, value.shape[3])
    for sequence in range(num_sequences):
        seen = bias[min(sequence, len(bias) - 1), 0]
        for head in subset[sequence].any(0).nonzero().squeeze(1).tolist():
            rows = subset[sequence, :, head].nonzero().squeeze(1)
            keys, values = key[sequence, head // group], value[sequence, head // group]
            scores = torch.addmm(seen.index_select(0, rows), query[sequence, head, rows], keys.mT, alpha=scaling)
            mixed[sequence, rows, head] = scores.softmax(1, dtype=torch.float32).to(values.dtype) @ values
            record_rows("heads", len(rows))
    return mixed


def _bias(mask: Tensor | None, num_queries: int, num_keys: int, like: Tensor) -> Tensor:
    """What is added to the scores (num_sequences or 1, 1, num_queries, num_keys)."""
    if mask is None:
        mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=like.device)
        mask = mask.tril(num_keys - num_queries)
    mask = mask[..., :num_keys]
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    lowest = torch.finfo(like.dtype).min  # a padded query that sees nothing stays finite
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, lowest)


def switched(mixed: Tensor, subset: Tensor, switch: Tensor | None) -> Tensor:
    """All heads' output (num_sequences, num_queries, num_heads, value_size), masked, with the gradient of a switch."""
    factor: Any = subset.to(mixed.dtype)
    if switch is not None:
        factor = factor + (switch - switch.detach()).to(mixed.dtype)
    return mixed * factor.unsqueeze(-1)

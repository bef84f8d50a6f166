"""Heads that are really skipped on a CPU: only chosen (token, head) rows are projected and scored."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_backbone.kernels.reference import rotate
from moe_backbone.kernels.rows import record_rows


def head_attention(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
) -> Tensor:
    """Equal to `reference.head_attention`; work follows the subset.

    Example: two tokens, head 0 chosen for the second only, multiplies one query row by head 0's two keys.
    """
    num_sequences, num_queries, num_heads = subset.shape
    flat = hidden.flatten(0, 1)
    result = torch.zeros_like(flat)
    hidden_bias = _future_bias(num_queries, keys.shape[2], hidden)
    counts = subset.sum(1).tolist()
    for head in range(num_heads):
        rows = subset[:, :, head].flatten().nonzero().squeeze(1)
        if rows.numel() == 0:
            continue
        positions = rows % num_queries
        query = rotate(flat[rows] @ query_weight[head], rotation[:, positions])
        record_rows("heads", query.shape[0])
        bias = hidden_bias[positions]
        mixed, start = [], 0
        for sequence in range(num_sequences):
            stop = start + counts[sequence][head]
            if stop > start:
                scores = torch.addmm(
                    bias[start:stop], query[start:stop], keys[sequence, head].T, alpha=query.shape[1] ** -0.5
                )
                mixed.append(scores.softmax(1) @ values[sequence, head])
            start = stop
        update = (torch.cat(mixed) * weights[:, :, head].flatten()[rows].unsqueeze(1)) @ output_weight[head]
        result.index_add_(0, rows, update)
    return result.unflatten(0, (num_sequences, num_queries))


def _future_bias(num_queries: int, num_keys: int, like: Tensor) -> Tensor:
    """Minus infinity where a key lies after the query (num_queries, num_keys), else zero."""
    bias = torch.full((num_queries, num_keys), float("-inf"), dtype=like.dtype, device=like.device)
    return bias.triu(num_keys - num_queries + 1)

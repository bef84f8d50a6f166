"""Every op in plain PyTorch: the definition that faster paths must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_backbone.kernels.rows import record_rows


def expert_mlp(hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Weighted sum of the chosen SwiGLU experts; only chosen rows are multiplied.

    Args:
        hidden: Token rows (num_tokens, hidden_size).
        weights: Mixing weights (num_tokens, num_experts); read where `subset` is True.
        subset: Chosen experts, bool (num_tokens, num_experts).
        gate_up: Gate and up projections side by side (num_experts, hidden_size, 2 * intermediate_size).
        down: Down projections (num_experts, intermediate_size, hidden_size).

    Returns:
        (num_tokens, hidden_size); a token with an empty subset gets zeros.

    Example: one token, experts 0 and 2 chosen with weights .25 and .75, gives .25 * f0(x) + .75 * f2(x).
    Source: SwiGLU, arXiv:2002.05202.
    """
    updates, chosen_rows = [], []
    for expert, (gate_up_e, down_e) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        rows = subset[:, expert].nonzero().squeeze(1)
        if rows.numel() == 0:
            continue
        gate, up = (hidden.index_select(0, rows) @ gate_up_e).chunk(2, dim=1)
        record_rows("experts", gate.shape[0])
        inner = F.silu(gate) * up * weights[:, expert].index_select(0, rows).unsqueeze(1)
        updates.append(inner @ down_e)
        chosen_rows.append(rows)
    if not updates:
        return torch.zeros_like(hidden)
    return torch.zeros_like(hidden).index_add(0, torch.cat(chosen_rows), torch.cat(updates))


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
    """Causal attention in which each token uses a subset of the heads; computes every head, then masks.

    Args:
        hidden: Token rows (num_sequences, num_queries, hidden_size).
        weights: Head weights (num_sequences, num_queries, num_heads); read where `subset` is True.
        subset: Chosen heads, bool (num_sequences, num_queries, num_heads).
        query_weight: Query projections (num_heads, hidden_size, head_size).
        keys: Rotated keys (num_sequences, num_heads, num_keys, head_size); the queries are the last positions.
        values: (num_sequences, num_heads, num_keys, head_size).
        output_weight: Output projections (num_heads, head_size, hidden_size).
        rotation: Cosines and sines of the query positions (2, num_queries, head_size / 2).

    Returns:
        (num_sequences, num_queries, hidden_size); zeros for a token with an empty subset.
    """
    num_queries, num_keys = hidden.shape[1], keys.shape[2]
    num_heads, hidden_size, head_size = query_weight.shape
    query = hidden @ query_weight.transpose(0, 1).reshape(hidden_size, num_heads * head_size)
    query = rotate(query.unflatten(2, (num_heads, head_size)).transpose(1, 2), rotation)
    record_rows("heads", hidden.shape[0] * num_queries * num_heads)
    visible = None
    if num_queries != num_keys:
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, is_causal=visible is None)
    mixed = mixed.transpose(1, 2) * (weights * subset).unsqueeze(-1)
    return mixed.flatten(2) @ output_weight.flatten(0, 1)


def rotate(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding: turn each pair (first half, second half) by its position's angle.

    Args:
        vectors: (..., num_positions, head_size).
        rotation: Cosines and sines (2, num_positions, head_size / 2).

    Returns:
        Same shape as `vectors`.

    Example: head_size 2 at a quarter turn maps (1, 0) to (0, 1).
    Source: arXiv:2104.09864.
    """
    first, second = vectors.chunk(2, dim=-1)
    cosine, sine = rotation
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

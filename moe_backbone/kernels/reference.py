"""Every op in plain PyTorch: the definition that faster paths must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


def kept_head_attention(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    projection: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
    past: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Causal attention in which only tokens that use a head are keys there; computes every head, then masks.

    Args:
        hidden: Token rows (num_sequences, num_queries, hidden_size).
        weights: Head weights (num_sequences, num_queries, num_heads); read where `subset` is True.
        subset: Chosen heads, bool (num_sequences, num_queries, num_heads).
        projection: Query, key and value projections side by side (num_heads, hidden_size, 3 * head_size).
        output_weight: Output projections (num_heads, head_size, hidden_size).
        rotation: Cosines and sines of the query positions (2, num_queries, head_size / 2).
        past: Rotated keys and values that were kept of earlier tokens (2, num_kept, head_size), head after head,
            sequence after sequence; empty where there are no earlier tokens.

    Returns:
        (num_sequences, num_queries, hidden_size), zeros for a token with an empty subset; and the keys and values of
        the chosen heads (2, num_rows, head_size), head after head, sequence after sequence, by token.

    Example: of three tokens the first and the third use the only head: the third attends to the first and to itself,
    and the second to nothing.
    """
    num_sequences, num_queries, num_heads = subset.shape
    joint = hidden @ projection.transpose(0, 1).flatten(1)
    query, keys, values = joint.view(num_sequences, num_queries, num_heads, 3, -1).permute(3, 0, 2, 1, 4)
    query, keys = rotate(query, rotation), rotate(keys, rotation)
    record_rows("heads", subset.numel())
    own = torch.eye(num_queries, dtype=torch.bool, device=hidden.device)  # keeps the rows that are not chosen finite
    visible = (subset.transpose(1, 2).unsqueeze(2) & torch.ones_like(own).tril()) | own
    rows = torch.stack((keys, values)).transpose(1, 2)[:, subset.permute(2, 0, 1)]
    if past:
        lengths = torch.tensor([kept.shape[1] for kept in past], device=hidden.device)
        padded = pad_sequence([kept.transpose(0, 1) for kept in past], batch_first=True)
        padded = padded.unflatten(0, (num_heads, num_sequences)).permute(3, 1, 0, 2, 4)
        keys, values = torch.cat((padded, torch.stack((keys, values))), dim=3)
        known = torch.arange(padded.shape[3], device=hidden.device) < lengths.unsqueeze(1)
        known = known.unflatten(0, (num_heads, num_sequences)).transpose(0, 1).unsqueeze(2)
        visible = torch.cat((known.expand(-1, -1, num_queries, -1), visible), dim=3)
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
    mixed = mixed.transpose(1, 2) * (weights * subset).unsqueeze(-1)
    return mixed.flatten(2) @ output_weight.flatten(0, 1), rows


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
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(vectors.dtype)  # the table is float32

"""Work that follows the subset on a CPU: only chosen (token, unit) rows are gathered and multiplied. No gradients.

The rows of a unit are filled up to one of a few lengths (`layouts.common_length`); what is filled up is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_backbone.kernels import reference
from moe_backbone.kernels.layouts import common_length, joint_product, products
from moe_backbone.kernels.rows import record_rows


def expert_mlp(hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Equal to `reference.expert_mlp`; experts without rows are not touched.

    Example: two tokens, expert 1 chosen for the second only, multiplies one row by expert 1 and touches no other.
    """
    if len(hidden) == 1:
        return _one_token_experts(hidden, weights, subset, gate_up, down)
    rows = _chosen_rows(subset)
    outputs = []
    for inputs, count, widen, narrow in zip(
        rows.gather(hidden), rows.counts, products(gate_up), products(down), strict=True
    ):
        if count:
            gate, up = widen(inputs).chunk(2, dim=1)
            outputs.append(narrow(F.silu(gate).mul_(up))[:count])
    if not outputs:
        return torch.zeros_like(hidden)
    return rows.combine("experts", torch.cat(outputs), weights)


def _one_token_experts(hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same for a single token, as in decoding, whose rows need no order."""
    experts = subset[0].nonzero().squeeze(1)
    outputs = []
    for expert in experts.tolist():
        gate, up = (hidden @ gate_up[expert]).chunk(2, dim=1)
        outputs.append(F.silu(gate).mul_(up) @ down[expert])
    record_rows("experts", len(outputs))
    if not outputs:
        return torch.zeros_like(hidden)
    return weights.index_select(1, experts) @ torch.cat(outputs)


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
    """Equal to `reference.head_attention`; heads without queries are not touched.

    Example: two tokens, head 0 chosen for the second only, multiplies one query row by head 0's two keys.
    """
    if subset.all():  # nothing to skip
        return all_heads(hidden, weights, subset, query_weight, keys, values, output_weight, rotation)
    rows = _chosen_rows(subset.flatten(0, 1))
    if not rows.tokens.numel():
        return torch.zeros_like(hidden)
    per_head = zip(rows.gather(hidden.flatten(0, 1)), rows.counts, products(query_weight), strict=True)
    projected = [project(inputs)[:count] for inputs, count, project in per_head]
    positions = rows.tokens % hidden.shape[1]
    query = reference.rotate(torch.cat(projected), rotation[:, positions])
    if hidden.shape[1] == 1:
        mixed = _mix_one_query(query, rows, keys, values)
    else:
        counts = subset.sum(1).t().flatten().tolist()  # head after head, sequence after sequence
        mixed = _mix(query, positions, counts, hidden.shape[1], keys, values)
    outputs = [project(part) for part, project in zip(mixed.split(rows.counts), products(output_weight), strict=True)]
    return rows.combine("heads", torch.cat(outputs), weights.flatten(0, 1)).view_as(hidden)


def kept_head_attention(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    projection: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
    past: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Equal to `reference.kept_head_attention`; queries, keys and values of chosen heads only are computed.

    Example: two tokens, head 0 chosen for the second only, multiplies one row by head 0's projections and attends to
    one key.
    """
    rows = _chosen_rows(subset.flatten(0, 1))
    if not rows.tokens.numel():
        return torch.zeros_like(hidden), hidden.new_empty(2, 0, output_weight.shape[1])
    per_head = zip(rows.gather(hidden.flatten(0, 1)), rows.counts, products(projection), strict=True)
    query, keys, values = torch.cat([project(inputs)[:count] for inputs, count, project in per_head]).chunk(3, dim=1)
    turns = rotation[:, rows.tokens % hidden.shape[1]]
    key_values = torch.stack((reference.rotate(keys, turns), values))
    counts = subset.sum(1).t().flatten().tolist()  # head after head, sequence after sequence
    mixed = _mix_kept(reference.rotate(query, turns), counts, key_values, past)
    outputs = [project(part) for part, project in zip(mixed.split(rows.counts), products(output_weight), strict=True)]
    update = rows.combine("heads", torch.cat(outputs), weights.flatten(0, 1))
    return update.view_as(hidden), key_values


def cheapest_head_attention(hidden: Tensor, weights: Tensor, subset: Tensor, *rest: Tensor) -> Tensor:
    """Skip heads where that takes less time than to compute all of them and mask; arguments of `head_attention`.

    Small products, one a head and sequence, are slower than a large one: with few keys or narrow heads only a low share
    of chosen heads repays them (measured on two cores, where the two meet at about the share below).
    """
    keys = rest[1]
    worth_skipping = (keys.shape[2] * keys.shape[3]) ** 0.5 / 240
    skips = subset.sum() < min(worth_skipping, 0.7) * subset.numel()
    return (head_attention if skips else all_heads)(hidden, weights, subset, *rest)


def all_heads(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
) -> Tensor:
    """Equal to `reference.head_attention` and computes as much, on weights that are laid out once."""
    num_sequences, num_queries, num_heads = subset.shape
    query = joint_product(query_weight, units_in=False)(hidden.flatten(0, 1))
    query = query.view(num_sequences, num_queries, num_heads, keys.shape[3]).transpose(1, 2)
    visible = None
    if 1 < num_queries != keys.shape[2]:
        visible = hidden.new_ones(num_queries, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - num_queries)
    mixed = F.scaled_dot_product_attention(
        reference.rotate(query, rotation), keys, values, attn_mask=visible, is_causal=num_queries == keys.shape[2]
    )
    mixed = (mixed.transpose(1, 2) * (weights * subset).unsqueeze(-1)).flatten(0, 1).flatten(1)
    record_rows("heads", subset.numel())
    return joint_product(output_weight, units_in=True)(mixed).view_as(hidden)


class _Rows(NamedTuple):
    """Chosen (token, unit) pairs, unit after unit and by token inside a unit."""

    tokens: Tensor
    """Token of each row (num_rows,), int64."""
    pairs: Tensor
    """Where the rows lie in the flat subset, token after token (num_rows,), int64."""
    counts: list[int]
    """Rows of each unit."""
    by_token: Tensor
    """Numbers of the rows token after token (num_rows,), int64."""
    first: Tensor
    """Where each token's rows begin in `by_token` (num_tokens,), int64."""

    def gather(self, hidden: Tensor) -> Iterator[Tensor]:
        """Each unit's rows of `hidden` (num_tokens, hidden_size), and after them some that do not count."""
        lengths = [common_length(count) for count in self.counts]
        tokens = self.tokens if lengths == self.counts else F.pad(self.tokens, (0, max(lengths)))
        start = 0
        for count, length in zip(self.counts, lengths, strict=True):
            yield hidden.index_select(0, tokens[start : start + length])
            start += count

    def combine(self, kind: str, outputs: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of each token's rows (num_tokens, hidden_size); zeros for a token without any.

        Args:
            kind: Of the units, for the row counters.
            outputs: Of the units (num_rows, hidden_size).
            weights: Of tokens and units (num_tokens, num_units).
        """
        record_rows(kind, outputs.shape[0])
        weights = weights.reshape(-1).index_select(0, self.pairs)
        return F.embedding_bag(self.by_token, outputs, self.first, mode="sum", per_sample_weights=weights)


def _chosen_rows(subset: Tensor) -> _Rows:
    """Rows of a subset (num_tokens, num_units), bool.

    Example: subset [[1, 1], [0, 1]] has the rows (token 0, unit 0), (0, 1) and (1, 1); token 0 owns the first two.
    """
    num_tokens, num_units = subset.shape
    pairs = subset.flatten().nonzero().squeeze(1)
    tokens, units = pairs // num_units, pairs % num_units
    order = units.to(torch.int16).argsort(stable=True)  # short keys sort several times faster
    by_token = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = units.bincount(minlength=num_units).tolist()
    per_token = tokens.bincount(minlength=num_tokens)
    return _Rows(tokens.index_select(0, order), pairs, counts, by_token, per_token.cumsum(0) - per_token)


def _mix(query: Tensor, positions: Tensor, counts: list[int], num_queries: int, keys: Tensor, values: Tensor) -> Tensor:
    """What each chosen query attends to (num_rows, head_size), by one small product a head and sequence.

    Args:
        query: Rotated (num_rows, head_size), head after head, sequence after sequence.
        positions: Of the rows among the queries (num_rows,), int64.
        counts: Rows of each head and sequence.
        num_queries: Queries of a sequence before any were skipped.
        keys: (num_sequences, num_heads, num_keys, head_size).
        values: Same shape.
    """
    num_keys = keys.shape[2]
    hidden_future = query.new_full((num_queries, num_keys), float("-inf")).triu(num_keys - num_queries + 1)
    mixed = torch.empty_like(query)
    parts = (tensor.split(counts) for tensor in (query * query.shape[1] ** -0.5, positions, mixed))
    caches = ([own for head in cache.unbind(1) for own in head.unbind(0)] for cache in (keys.mT, values))
    for queries, places, mixture, own_keys, own_values in zip(*parts, *caches, strict=True):
        if len(queries):
            scores = torch.addmm(hidden_future.index_select(0, places), queries, own_keys)
            torch.mm(scores.softmax(1), own_values, out=mixture)
    return mixed


def _mix_kept(query: Tensor, counts: list[int], key_values: Tensor, past: Sequence[Tensor]) -> Tensor:
    """What each chosen query attends to (num_rows, head_size) where keys are the rows of the same head and sequence.

    Args:
        query: Rotated (num_rows, head_size), head after head, sequence after sequence.
        counts: Rows of each head and sequence.
        key_values: Of the same rows (2, num_rows, head_size).
        past: See `reference.kept_head_attention`.
    """
    most = max(counts) + max((kept.shape[1] for kept in past), default=0)
    hidden_future = query.new_full((most, most), float("-inf")).triu(1)
    mixed = torch.empty_like(query)
    parts = ((query * query.shape[1] ** -0.5).split(counts), key_values.split(counts, 1), mixed.split(counts))
    for index, (queries, own, mixture) in enumerate(zip(*parts, strict=True)):
        if len(queries):
            own_keys, own_values = torch.cat((past[index], own), dim=1) if past else own
            places = slice(len(own_keys) - len(queries), len(own_keys))
            scores = torch.addmm(hidden_future[places, : len(own_keys)], queries, own_keys.mT)
            torch.mm(scores.softmax(1), own_values, out=mixture)
    return mixed


def _mix_one_query(query: Tensor, rows: _Rows, keys: Tensor, values: Tensor) -> Tensor:
    """The same where each sequence has one query, which attends to every key: chosen caches side by side."""
    units = torch.arange(keys.shape[1], device=keys.device).repeat_interleave(
        torch.tensor(rows.counts, device=keys.device)
    )
    chosen = rows.tokens * keys.shape[1] + units
    own_keys, own_values = (cache.flatten(0, 1).index_select(0, chosen).unsqueeze(1) for cache in (keys, values))
    return F.scaled_dot_product_attention(query[:, None, None], own_keys, own_values)[:, 0, 0]

"""Attention sublayer in which each token uses a subset of the heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_backbone.config import BackboneConfig
from moe_backbone.kernels import HEAD_ATTENTION, HeadBackend, rotate

if TYPE_CHECKING:
    from moe_backbone.transformer import RoutingState


class KeyValueCache:
    """Keys and values of the tokens decoded so far, per layer (num_sequences, num_heads, length, head_size).

    Attributes:
        length: Tokens that went through all layers.
    """

    def __init__(self, num_layers: int) -> None:
        """Start empty."""
        self.length = 0
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions and return all of them."""
        old_keys, old_values = self._keys[layer], self._values[layer]
        if old_keys is not None and old_values is not None:
            keys = torch.cat((old_keys, keys), dim=2)
            values = torch.cat((old_values, values), dim=2)
        self._keys[layer], self._values[layer] = keys, values
        return keys, values


class Attention(nn.Module):
    """Causal multi-head attention; keys and values of every head are computed for every token.

    Args:
        config: `head_gate` adds a gate whose probabilities, times `num_heads`, weight the heads.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width, heads, size = config.hidden_size, config.num_heads, config.head_size
        self.num_heads = heads
        self.query = nn.Parameter(torch.randn(heads, width, size) * width**-0.5)
        self.key_value = nn.Parameter(torch.randn(width, 2 * width) * width**-0.5)
        self.output = nn.Parameter(torch.randn(heads, size, width) * (2 * config.num_layers * width) ** -0.5)
        self.gate = nn.Linear(width, heads, bias=False) if config.head_gate else None

    def scores(self, features: Tensor) -> Tensor | None:
        """Log-softmax of the head gate (num_tokens, num_heads), or None without one."""
        return None if self.gate is None else self.gate(features).log_softmax(1)

    def forward(self, state: RoutingState, subset: Tensor, rotation: Tensor, backend: HeadBackend) -> Tensor:
        """Update of the residual stream (num_sequences, seq_len, hidden_size)."""
        hidden = state.features
        num_sequences, seq_len, _ = hidden.shape
        keys, values = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (hidden @ self.key_value).chunk(2, 2)
        )
        keys = rotate(keys, rotation)
        if state.cache is not None:
            keys, values = state.cache.extend(state.site_index // 2, keys, values)
        if state.scores is None:
            weights = hidden.new_ones(1, 1, 1).expand(num_sequences, seq_len, self.num_heads)
        else:
            weights = self.num_heads * state.scores.exp().unflatten(0, (num_sequences, seq_len))
        subset = subset.unflatten(0, (num_sequences, seq_len))
        return HEAD_ATTENTION[backend](hidden, weights, subset, self.query, keys, values, self.output, rotation)


def rotation_table(config: BackboneConfig) -> Tensor:
    """Cosines and sines of every position up to `seq_len` (2, seq_len, head_size / 2), float32."""
    half = config.head_size // 2
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(config.seq_len, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))

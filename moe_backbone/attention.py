"""Attention sublayer in which each token uses a subset of the heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_backbone.checks import require
from moe_backbone.compensation import HeadCompensation
from moe_backbone.config import BackboneConfig
from moe_backbone.kernels import Backend, Derived, head_attention, kept_head_attention, linear, rotate
from moe_backbone.precision import full_precision
from moe_backbone.sites import HeadMeaning
from moe_backbone.switched_heads import switch_kept_heads

if TYPE_CHECKING:
    from moe_backbone.transformer import RoutingState

BLOCK_TOKENS = 1024
"""Tokens whose attention a CPU computes at a time: larger intermediate results would not stay in its caches."""


class KeyValueCache:
    """Keys and values of the tokens decoded so far, in memory that is taken once.

    Args:
        num_layers: Layers of the backbone.
        capacity: Most positions of a sequence.

    Attributes:
        length: Tokens that went through all layers.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._memory: list[Tensor | None] = [None] * num_layers

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions behind `length` and return all of them: views that the next write does not move.

        Args:
            layer: Whose keys and values these are.
            keys: (num_sequences, num_heads, num_new, head_size).
            values: Same shape.

        Raises:
            ValueError: If other sequences are in the cache.
        """
        memory, new = self._memory[layer], torch.stack((keys, values))
        if memory is not None and memory.shape[:3] != new.shape[:3]:
            raise ValueError(f"cache must get the same {memory.shape[1]} sequences again, got {new.shape[1]}")
        stop = self.length + new.shape[3]
        if memory is None or not self._writable(memory, new):
            past = [] if memory is None else [memory[:, :, :, : self.length]]
            room = [] if new.requires_grad else [new.new_zeros(*new.shape[:3], self.capacity - stop, new.shape[4])]
            memory = self._memory[layer] = torch.cat([*past, new, *room], dim=3)
        else:
            memory[:, :, :, self.length : stop] = new
        return memory[0, :, :, :stop], memory[1, :, :, :stop]

    @staticmethod
    def _writable(memory: Tensor, new: Tensor) -> bool:
        """Whether new positions may be written in place: not where a gradient or inference mode forbids it."""
        if new.requires_grad or memory.requires_grad:
            return False
        return torch.is_inference_mode_enabled() or not memory.is_inference()


class KeptCache:
    """Keys and values of the tokens decoded so far, of each token only in the heads that it used.

    Args:
        num_layers: Layers of the backbone.

    Attributes:
        length: Tokens that went through all layers.
    """

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self._rows: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._kept: list[Tensor | None] = [None] * num_layers

    def counts(self, layer: int) -> Tensor | None:
        """Keys kept of the first `length` tokens (num_sequences, num_heads), int64; None where nothing was written."""
        kept = self._kept[layer]
        return None if kept is None else kept[:, : self.length].sum(1)

    def past(self, layer: int, num_sequences: int) -> list[Tensor]:
        """Rotated keys and values of the first `length` tokens, as `kept_head_attention` takes them.

        Raises:
            ValueError: If other sequences are in the cache.
        """
        counts = self.counts(layer)
        if counts is None:
            return []
        if len(counts) != num_sequences:
            raise ValueError(f"cache must get the same {len(counts)} sequences again, got {num_sequences}")
        lengths = counts.t().flatten().tolist()
        return [rows[:, :length] for rows, length in zip(self._rows[layer], lengths, strict=True)]

    def extend(self, layer: int, subset: Tensor, rows: Tensor) -> None:
        """Write new tokens behind `length`.

        Args:
            layer: Whose keys and values these are.
            subset: Heads that the tokens use, bool (num_sequences, num_new, num_heads).
            rows: Keys and values as `kept_head_attention` returns them.
        """
        past, kept = self.past(layer, len(subset)), self._kept[layer]
        new = rows.split(subset.sum(1).t().flatten().tolist(), dim=1)
        pairs = zip(past, new, strict=True) if past else ((part[:, :0], part) for part in new)
        self._rows[layer] = [torch.cat(pair, dim=1) if pair[1].shape[1] else pair[0] for pair in pairs]
        self._kept[layer] = subset if kept is None else torch.cat((kept[:, : self.length], subset), dim=1)


class Attention(nn.Module):
    """Causal multi-head attention; what a token skips in a head that it does not use is the caller's choice.

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
        self._projection = Derived(projection_by_head)

    def scores(self, features: Tensor) -> Tensor | None:
        """Log-softmax of the head gate (num_tokens, num_heads), or None without one."""
        if self.gate is None:
            return None
        with full_precision(features.device):
            return linear(features, self.gate.weight).log_softmax(1)

    def forward(
        self,
        state: RoutingState,
        subset: Tensor | None,
        rotation: Tensor,
        backend: Backend = "auto",
        head_meaning: HeadMeaning = "query",
        switch: Tensor | None = None,
        compensation: HeadCompensation | None = None,
    ) -> Tensor:
        """Update of the residual stream (num_sequences, seq_len, hidden_size); see `MoETransformer.advance`."""
        hidden = state.features
        num_sequences, seq_len, _ = hidden.shape
        if state.scores is None:
            weights = hidden.new_ones(1, 1, 1).expand(num_sequences, seq_len, self.num_heads)
        else:
            weights = self.num_heads * state.scores.exp().unflatten(0, (num_sequences, seq_len))
        on = subset if switch is None else switch
        assert on is not None
        if switch is not None and head_meaning == "query_key_value":
            update = self._update_switched(state, weights, subset, switch, rotation)
        else:
            if switch is not None:  # heads add up: what one would add is its output, which is computed for all
                weights = weights * switch.unflatten(0, (num_sequences, seq_len))
                subset = torch.ones_like(switch, dtype=torch.bool)
            assert subset is not None
            subset = subset.unflatten(0, (num_sequences, seq_len))
            block = num_sequences
            if state.cache is None and hidden.device.type == "cpu" and not torch.is_grad_enabled():
                block = max(1, BLOCK_TOKENS // max(1, seq_len))
            parts = zip(hidden.split(block), weights.split(block), subset.split(block), strict=True)
            run = self._update if head_meaning == "query" else self._update_kept
            updates = [run(state, *part, rotation, backend) for part in parts]
            update = updates[0] if len(updates) == 1 else torch.cat(updates)
        return update if compensation is None else compensation(update.flatten(0, 1), on).view_as(update)

    def _update(
        self, state: RoutingState, hidden: Tensor, weights: Tensor, subset: Tensor, rotation: Tensor, backend: Backend
    ) -> Tensor:
        """The same for some of the sequences, or for all if there is a cache."""
        keys, values = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in linear(hidden, self.key_value, outputs_first=False).chunk(2, dim=2)
        )
        keys = rotate(keys, rotation)
        if state.cache is not None:  # of any kind with this `extend`; `begin` refuses one of the other head meaning
            assert not isinstance(state.cache, KeptCache)
            keys, values = state.cache.extend(state.site_index // 2, keys, values)
        return head_attention(hidden, weights, subset, self.query, keys, values, self.output, rotation, backend)

    def _update_kept(
        self, state: RoutingState, hidden: Tensor, weights: Tensor, subset: Tensor, rotation: Tensor, backend: Backend
    ) -> Tensor:
        """The same where only tokens that use a head are keys there."""
        (projection,) = self._projection(self.query, self.key_value)
        layer, cache = state.site_index // 2, state.cache
        past = cache.past(layer, len(hidden)) if isinstance(cache, KeptCache) else []
        update, rows = kept_head_attention(
            hidden, weights, subset, projection, self.output, rotation, past, backend=backend
        )
        if isinstance(cache, KeptCache):
            cache.extend(layer, subset, rows)
        return update

    def _update_switched(
        self, state: RoutingState, weights: Tensor, subset: Tensor | None, switch: Tensor, rotation: Tensor
    ) -> Tensor:
        """The same under switches, of whole sequences."""
        require(state.cache is None, "cache must be None where switches drop keys, as it holds none of their gradients")
        shape = state.tokens.shape
        chosen = None if subset is None else subset.unflatten(0, shape)
        (projection,) = self._projection(self.query, self.key_value)
        return switch_kept_heads(
            state.features, weights, chosen, switch.unflatten(0, shape), projection, self.output, rotation
        )


def projection_by_head(query: Tensor, key_value: Tensor) -> tuple[Tensor]:
    """All that a head makes of a token, side by side.

    Args:
        query: (num_heads, hidden_size, head_size).
        key_value: Keys of all heads, then values of all heads (hidden_size, 2 * num_heads * head_size).

    Returns:
        Query, key and value projections (num_heads, hidden_size, 3 * head_size).
    """
    keys, values = (part.unflatten(1, (len(query), -1)).transpose(0, 1) for part in key_value.chunk(2, dim=1))
    return (torch.cat((query, keys, values), dim=2),)


def rotation_table(config: BackboneConfig) -> Tensor:
    """Cosines and sines of every position up to `seq_len` (2, seq_len, head_size / 2), float32."""
    half = config.head_size // 2
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(config.seq_len, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))

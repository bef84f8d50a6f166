"""All lanes on their way through the sites, a block of sequences at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from envs.layout import ObservationLayout
from moe_backbone import Backbone
from moe_backbone.compensation import Compensation
from moe_backbone.transformer import RoutingState

BLOCK_TOKENS = 2048
"""Tokens that run at once on a CPU: the intermediate results of more leave its cache and need fresh pages."""


def block_sequences(tokens: Tensor, copies: int = 1) -> int:
    """Sequences that run at once, a multiple of `copies`; a GPU is fastest with all (num_sequences, seq_len)."""
    num_sequences, seq_len = tokens.shape
    return num_sequences if tokens.is_cuda else copies * max(1, BLOCK_TOKENS // (copies * seq_len))


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences of one episode and what native routing predicts for them.

    Attributes:
        tokens: (num_sequences, seq_len), int64; copies of one sequence lie next to each other.
        targets: Next tokens, same shape.
        price: Nats per native compute (num_sequences,), float32.
        native: Native logits of the different sequences (num_sequences / copies, seq_len, vocab_size), float32.
    """

    tokens: Tensor
    targets: Tensor
    price: Tensor
    native: Tensor

    @property
    def copies(self) -> int:
        """Times that every sequence is there."""
        return len(self.tokens) // len(self.native)

    @property
    def native_logits(self) -> Tensor:
        """Native logits of every sequence (num_sequences, seq_len, vocab_size), float32."""
        return self.native.repeat_interleave(self.copies, 0)

    def split(self, num_sequences: int) -> list[TokenBatch]:
        """Blocks of `num_sequences`, a multiple of `copies`; the last may be shorter."""
        parts = zip(
            self.tokens.split(num_sequences),
            self.targets.split(num_sequences),
            self.price.split(num_sequences),
            self.native.split(num_sequences // self.copies),
            strict=True,
        )
        return [TokenBatch(tokens=part[0], targets=part[1], price=part[2], native=part[3]) for part in parts]

    def token(self, position: int) -> TokenBatch:
        """The one token at `position` of every sequence."""
        return replace(
            self,
            tokens=self.tokens[:, position : position + 1],
            targets=self.targets[:, position : position + 1],
            native=self.native[:, position : position + 1],
        )


class Rollout:
    """Runs each site for all lanes of one episode.

    Blocks change how much runs at once, not what is computed: a sequence never reads another one.

    Args:
        backbone: Frozen, in evaluation mode.
        batch: Sequences, or one token of each (then `cache` holds the earlier ones).
        cache: Keys and values of earlier tokens of all sequences.

    Attributes:
        price: Of every lane, nats per native compute (num_lanes,), float32.
        positions: Place of the batch's tokens in their sequences.
    """

    def __init__(self, backbone: Backbone, batch: TokenBatch, cache: Any | None = None) -> None:
        num_sequences, num_tokens = batch.tokens.shape
        rows = num_sequences if cache is not None else block_sequences(batch.tokens, batch.copies)
        self.backbone = backbone
        self.price = batch.price.repeat_interleave(num_tokens)
        self._batches, self._lanes = batch.split(rows), rows * num_tokens
        prices = self.price.split(self._lanes)
        self._states: list[RoutingState] = [
            backbone.begin(part.tokens, price, cache) for part, price in zip(self._batches, prices, strict=True)
        ]
        first = self._states[0].first_position
        self.positions = slice(first, first + num_tokens)

    @property
    def site_index(self) -> int:
        """Place of the current site in running order."""
        return self._states[0].site_index

    @property
    def positions_of_lanes(self) -> Tensor:
        """Place of each lane's token in its sequence (num_lanes,), int64."""
        places = torch.arange(self.positions.start, self.positions.stop, device=self.price.device)
        return places.repeat(len(self.price) // len(places))

    @property
    def earlier_keys(self) -> Tensor | None:
        """Keys kept of tokens before the batch's, see `RoutingState.earlier_keys`."""
        return self._states[0].earlier_keys  # only a cache holds any, and then there is one block

    @property
    def ended(self) -> bool:
        """Whether all sites have run."""
        return self.site_index == len(self.backbone.sites)

    @property
    def state(self) -> RoutingState:
        """Where all lanes stand; joins the blocks, so each call copies."""
        if len(self._states) == 1:
            return self._states[0]
        parts = {
            field.name: [getattr(state, field.name) for state in self._states] for field in fields(self._states[0])
        }
        joined: dict[str, Any] = {
            name: torch.cat(values) for name, values in parts.items() if isinstance(values[0], Tensor)
        }
        return replace(self._states[0], **joined)

    def scores(self) -> Tensor:
        """Log-softmax of the native gate of the current site (num_lanes, num_units), float32."""
        return torch.cat([self.backbone.observe(state).scores for state in self._states])

    def observation(self, layout: ObservationLayout) -> Tensor:
        """What a router sees of the current site, or of the end (num_lanes, size), float32."""
        observation = torch.zeros(len(self.price), layout.size, device=self.price.device)
        for rows, state in zip(observation.split(self._lanes), self._states, strict=True):
            if self.ended:
                layout.fill_terminal(rows, state.features.flatten(0, 1), state.price)
            else:
                layout.fill(rows, self.backbone.observe(state))
        return observation

    def advance(self, subset: Tensor, compensation: Compensation | None = None) -> None:
        """Run the current site with `subset`, bool (num_lanes, num_units), and constants for what it skips."""
        blocks = zip(self._states, subset.split(self._lanes), strict=True)
        with self.backbone.compensated(compensation):
            self._states = [self.backbone.advance(state, part) for state, part in blocks]

    def finish(self) -> Iterator[tuple[TokenBatch, Tensor]]:
        """Close the episode: each block and its logits (num_sequences, seq_len, vocab_size), float32."""
        for batch, state in zip(self._batches, self._states, strict=True):
            yield batch, self.backbone.finish(state)

    def logits(self) -> Tensor:
        """Predictions behind the last site (num_sequences, seq_len, vocab_size), float32; computed at each call."""
        assert self.ended, "the episode has not ended"
        return torch.cat([self.backbone.finish(replace(state, cache=None)) for state in self._states])

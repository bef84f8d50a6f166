"""Counterfactual rollouts of single tokens: one site of one token changed, its past native, all else as chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_backbone.compute import ComputeMeter
from moe_backbone.sites import Backbone, NativeRouter, SiteView

Quality = Callable[[Tensor], Tensor]
"""From logits (num_rows, vocab_size) of rows that belong to tokens (num_rows,) to nats (num_rows,)."""


class PastKeys:
    """Keys and values of the positions before the token, shared by all rollouts of it; the backbone's `cache`.

    Args:
        memory: Of each layer, as it was written.
        length: Positions written.
        rows: Token of each rollout, which adds one position (num_rollouts,), int64; None while the past is written.
    """

    def __init__(self, memory: dict[int, tuple[Tensor, Tensor]], length: int = 0, rows: Tensor | None = None) -> None:
        self.memory, self.length, self.rows = memory, length, rows

    def branch(self, rows: Tensor) -> PastKeys:
        """The same past for other rollouts."""
        return PastKeys(self.memory, self.length, rows)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the past before `keys` and `values` (num_rollouts, num_heads, num_new, head_size)."""
        if self.rows is None:
            self.memory[layer] = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))  # room for the token itself
        if self.rows is None or self.length == 0:
            return keys, values
        own_keys, own_values = (part[self.rows] for part in self.memory[layer])
        own_keys[:, :, -1:], own_values[:, :, -1:] = keys, values
        return own_keys, own_values


class Moves(NamedTuple):
    """Other subsets of one site for every token."""

    subsets: Tensor
    """bool (num_tokens, num_moves, num_units)."""
    allowed: Tensor
    """Moves that are to be tried, bool (num_tokens, num_moves)."""


class TokenRollouts:
    """Tokens at one position, each with a subset of every site, and what becomes of it when one site changes.

    Args:
        backbone: What computes; its `cache` is asked for `length` and `extend` only.
        tokens: Text up to and with the token (num_tokens, position + 1), int64.
        seq_len: Length of a full sequence, whose native cost is the unit of compute.

    Attributes:
        chosen: Subset of each site, bool (num_tokens, num_units); native at first.
        logits: Under these subsets (num_tokens, vocab_size), float32.
        every: Numbers of the tokens (num_tokens,), int64.
        unit_compute: Fraction of native compute that one unit of each site costs at this position (num_sites,),
            float64.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor, seq_len: int) -> None:
        self.backbone, self._tokens = backbone, tokens[:, -1:]
        meter, position = ComputeMeter(backbone.sites, seq_len), torch.tensor(tokens.shape[1] - 1)
        flops = [meter.unit_flops(index, position) for index in range(len(backbone.sites))]
        self.unit_compute = torch.stack(flops).to(tokens.device) / meter.native_flops
        self._past = PastKeys({})
        if tokens.shape[1] > 1:
            self._walk(tokens[:, :-1], self._past, lambda view: NativeRouter().select(view))
        self.every = torch.arange(len(tokens), device=tokens.device)
        self.chosen: list[Tensor] = []
        self._states, self.logits = self._walk(self._tokens, self._past.branch(self.every), self._choose_natively)

    def _choose_natively(self, view: SiteView) -> Tensor:
        self.chosen.append(NativeRouter().select(view))
        return self.chosen[-1]

    @torch.no_grad()
    def _walk(self, tokens: Tensor, cache: PastKeys, choose: Callable[[SiteView], Tensor]) -> tuple[list[Any], Tensor]:
        """States before every site, and logits of the last position."""
        with _all_keys(self.backbone):
            states = [self.backbone.begin(tokens, cache=cache)]
            for _ in self.backbone.sites:
                subset = choose(self.backbone.observe(states[-1]))
                states.append(self.backbone.advance(states[-1], subset))
            return states[:-1], self.backbone.finish(states[-1])[:, -1]

    def choose(self, chosen: Sequence[Tensor]) -> None:
        """Take other subsets, shapes as in `chosen`."""
        self.chosen = list(chosen)
        subsets = iter(chosen)
        self._states, self.logits = self._walk(self._tokens, self._past.branch(self.every), lambda _: next(subsets))

    def view(self, index: int) -> SiteView:
        """What a router sees of site `index` under the chosen subsets."""
        return self.backbone.observe(self._states[index])

    @property
    def compute(self) -> Tensor:
        """Of the chosen subsets, fraction of native compute (num_tokens,), float64."""
        return subset_compute(self.chosen, self.unit_compute)

    @torch.no_grad()
    def qualities(self, moves: Sequence[Moves], quality: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Quality of each token after each move, one at a time.

        All rollouts are one batch, which grows from site to site as the moves of that site branch off.

        Args:
            moves: Of every site, in running order.
            quality: Of logits (num_rows, vocab_size) and the tokens (num_rows,) that they belong to, in nats.

        Returns:
            For every site (num_tokens, num_moves), float32; minus infinity where a move is not allowed.
        """
        state, rows = None, self.every[:0]
        for index, (subsets, allowed) in enumerate(moves):
            own = allowed.nonzero()[:, 0]
            branch = _take(self._states[index], own)
            state = branch if state is None else _join(state, branch)
            subset = torch.cat((self.chosen[index][rows], subsets[allowed]))
            rows = torch.cat((rows, own))
            if not len(rows):
                state = None
                continue
            with _all_keys(self.backbone):
                state = self.backbone.advance(replace(state, cache=self._past.branch(rows)), subset)
        results = [torch.full(allowed.shape, -torch.inf, device=rows.device) for _, allowed in moves]
        if len(rows):
            reached = quality(self.backbone.finish(state)[:, -1], rows)
            parts = reached.split([int(allowed.sum()) for _, allowed in moves])
            for result, (_, allowed), part in zip(results, moves, parts, strict=True):
                result[allowed] = part
        return results


def _all_keys(backbone: Any) -> AbstractContextManager[None]:
    """Compute under the head meaning whose cache `PastKeys` is.

    Any gives the same here, as the past is native and a token finds its own key. What a unit costs follows the
    backbone's own.
    """
    return backbone.using(head_meaning="query") if hasattr(backbone, "using") else nullcontext()


def subset_compute(subsets: Sequence[Tensor], unit_compute: Tensor) -> Tensor:
    """Compute of subsets (..., num_units) of every site: (...), float64, in the unit of `unit_compute` (num_sites,)."""
    counts = torch.stack([subset.sum(-1) for subset in subsets], dim=-1)
    return (counts * unit_compute).sum(-1)


def _take(state: Any, rows: Tensor) -> Any:
    """Some rows of every tensor of a state of one position."""
    parts = {field.name: getattr(state, field.name) for field in fields(state)}
    return replace(state, **{name: part[rows] for name, part in parts.items() if isinstance(part, Tensor)})


def _join(state: Any, other: Any) -> Any:
    """Rows of two states before the same site."""
    parts = {field.name: (getattr(state, field.name), getattr(other, field.name)) for field in fields(state)}
    return replace(state, **{name: torch.cat(pair) for name, pair in parts.items() if isinstance(pair[0], Tensor)})

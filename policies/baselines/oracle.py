"""The best subset of a single token by counterfactual search: head-room of any router, no router itself.

The token's past stays native, so nothing that is chosen here can hurt or help a later token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.quality import token_divergence, token_log_likelihood
from moe_backbone.sites import Backbone, best_units
from policies.baselines.rollouts import Moves, TokenRollouts, subset_compute

OracleQuality = Literal["divergence", "log_likelihood"]

TINY_SITE = 4
"""Most units of a site of which every subset is tried."""
SHORTLIST = 2
"""Units to drop and to add, the best alone, whose exchanges within a site are tried."""
DROPPED = 0.0625
"""Share of a token's units that a step on the way down drops, rounded up."""
LEAST_GAIN = 1e-4
"""Nats below which a move does not count as a gain."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OracleChoice:
    """The best subsets found at one price."""

    subsets: list[Tensor]
    """Of each site, bool (num_tokens, num_units)."""
    logits: Tensor
    """Under these subsets (num_tokens, vocab_size), float32."""
    quality: Tensor
    """(num_tokens,), float32, nats; native is 0."""
    compute: Tensor
    """Fraction of native compute (num_tokens,), float64."""


class OracleSearch:
    """Subsets of all sites that maximise quality minus price times compute, for tokens at one position.

    First units are dropped, always those that cost the least quality per compute, from native routing down to nothing.
    Then, for a price, the best subset on that way is improved: by any single drop or addition, by
    exchanges within a site, and at tiny sites by any subset, as long as something helps. Each of these is measured,
    none predicted; that no other subset is better is not proved.

    Args:
        backbone: What computes.
        tokens: Text up to and with the token (num_tokens, position + 1), int64.
        targets: Next tokens (num_tokens,), int64; read for quality `log_likelihood` only.
        seq_len: Length of a full sequence, whose native cost is the unit of compute.
        quality: `divergence`, minus KL(native || routed), needs no label; `log_likelihood`, the gain over native, knows
            the answer and so is a bound that no router can reach.

    Raises:
        ValueError: If `quality` is unknown.
    """

    def __init__(
        self, backbone: Backbone, tokens: Tensor, targets: Tensor, *, seq_len: int, quality: OracleQuality
    ) -> None:
        known = get_args(OracleQuality)
        require(quality in known, f"quality must be one of {', '.join(known)}, got {quality}")
        self._rollouts = TokenRollouts(backbone, tokens, seq_len)
        self._targets, self._kind, self._sites = targets, quality, backbone.sites
        self.native_logits, self.native_compute = self._rollouts.logits, self._rollouts.compute
        self._path = self._descend()

    def _quality(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Of logits (num_rows, vocab_size) that belong to tokens `rows`, nats (num_rows,)."""
        if self._kind == "divergence":
            return -token_divergence(self.native_logits[rows], logits)
        targets = self._targets[rows]
        return token_log_likelihood(logits, targets) - token_log_likelihood(self.native_logits[rows], targets)

    def _descend(self) -> list[tuple[list[Tensor], Tensor]]:
        """Subsets and quality on a way from native routing to the empty subset."""
        rollouts, quality = self._rollouts, torch.zeros(len(self._targets), device=self._targets.device)
        path = [(rollouts.chosen, quality)]
        while any(subset.any() for subset in rollouts.chosen):
            after = rollouts.qualities([flips(subset, subset) for subset in rollouts.chosen], self._quality)
            units = rollouts.unit_compute.float()
            ratios = [(part - quality.unsqueeze(1)) / unit for part, unit in zip(after, units, strict=True)]
            sizes = [subset.shape[1] for subset in rollouts.chosen]
            chosen = torch.cat(rollouts.chosen, dim=1)
            count = torch.ceil(chosen.sum(1) * DROPPED).long()
            rollouts.choose((chosen & ~best_units(torch.cat(ratios, dim=1), count)).split(sizes, dim=1))
            quality = self._quality(rollouts.logits, rollouts.every)
            path.append((rollouts.chosen, quality))
        return path

    def best(self, price: float, start: OracleChoice | None = None) -> OracleChoice:
        """Search at one price.

        Args:
            price: Nats per native compute.
            start: What another price gave, to start from where it is better than what the way down has; from high to
                low prices finds more in less time than the other way round.
        """
        quality = self._start(price, start)
        active = torch.ones_like(quality, dtype=torch.bool)
        while active.any():
            moves = [self._site_moves(index, active) for index in range(len(self._sites))]
            moved, quality, gains = self._improve(moves, price, quality)
            stuck = active & ~moved
            exchanges = [self._exchanges(index, gain, stuck) for index, gain in enumerate(gains)]
            exchanged, quality, _ = self._improve(exchanges, price, quality)
            active = moved | exchanged
        rollouts = self._rollouts
        return OracleChoice(subsets=rollouts.chosen, logits=rollouts.logits, quality=quality, compute=rollouts.compute)

    def _start(self, price: float, start: OracleChoice | None) -> Tensor:
        """Choose the best subsets known at this price; their quality."""
        known = self._path if start is None else [*self._path, (start.subsets, start.quality)]
        qualities = torch.stack([quality for _, quality in known])
        by_site = [torch.stack(subsets) for subsets in zip(*(chosen for chosen, _ in known), strict=True)]
        values = qualities - price * subset_compute(by_site, self._rollouts.unit_compute)
        place = values.argmax(0)
        self._rollouts.choose([subsets[place, self._rollouts.every] for subsets in by_site])
        return qualities[place, self._rollouts.every]

    def _site_moves(self, index: int, active: Tensor) -> Moves:
        """Single flips of active tokens, or every other subset of a tiny site."""
        chosen, site = self._rollouts.chosen[index], self._sites[index]
        if site.num_units <= TINY_SITE:
            units = torch.arange(site.num_units, device=chosen.device)
            table = torch.arange(2**site.num_units, device=chosen.device).unsqueeze(1) >> units & 1 == 1
            subsets = table.expand(len(chosen), *table.shape)
            return Moves(subsets, (subsets != chosen.unsqueeze(1)).any(2) & active.unsqueeze(1))
        in_play = best_units(self._rollouts.view(index).scores, 2 * site.native_units)
        return flips(chosen, (chosen | in_play) & active.unsqueeze(1))

    def _exchanges(self, index: int, gains: Tensor, active: Tensor) -> Moves:
        """One unit dropped and one added, of those whose single flips (num_tokens, num_units) gain the most."""
        chosen = self._rollouts.chosen[index]
        if self._sites[index].num_units <= TINY_SITE:
            return flips(chosen, torch.zeros_like(chosen))  # every subset was tried
        dropped, added = (gains.masked_fill(away, -torch.inf).topk(SHORTLIST) for away in (~chosen, chosen))
        units = torch.eye(chosen.shape[1], dtype=torch.bool, device=chosen.device)
        pairs = units[dropped.indices].unsqueeze(2) | units[added.indices].unsqueeze(1)
        tried = dropped.values.isfinite().unsqueeze(2) & added.values.isfinite().unsqueeze(1)
        return Moves(chosen.unsqueeze(1) ^ pairs.flatten(1, 2), tried.flatten(1, 2) & active.unsqueeze(1))

    def _improve(self, moves: Sequence[Moves], price: float, quality: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Try moves and take each token's best, if it gains: which tokens moved, quality, gains of all moves."""
        rollouts, gains = self._rollouts, []
        qualities = rollouts.qualities(moves, self._quality)
        parts = zip(moves, rollouts.chosen, qualities, rollouts.unit_compute.float(), strict=True)
        for (subsets, _), chosen, after, unit in parts:
            more = (subsets.sum(2) - chosen.sum(1, keepdim=True)) * unit
            gains.append(after - quality.unsqueeze(1) - price * more)
        return *self._take_best(moves, gains, qualities, quality), gains

    def _take_best(
        self, moves: Sequence[Moves], gains: Sequence[Tensor], qualities: Sequence[Tensor], quality: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Give each token its best move, if that is a gain: which tokens moved, and their quality."""
        best, place = torch.cat(list(gains), dim=1).max(dim=1)
        moved, every = best > LEAST_GAIN, self._rollouts.every
        chosen = []
        first = 0
        for present, (subsets, allowed) in zip(self._rollouts.chosen, moves, strict=True):
            own = place - first
            here = moved & (own >= 0) & (own < allowed.shape[1])
            chosen.append(torch.where(here.unsqueeze(1), subsets[every, own.clamp(0, allowed.shape[1] - 1)], present))
            first += allowed.shape[1]
        self._rollouts.choose(chosen)
        return moved, torch.where(moved, torch.cat(list(qualities), dim=1)[every, place], quality)


def flips(chosen: Tensor, allowed: Tensor) -> Moves:
    """The moves that switch one unit of a subset (num_tokens, num_units)."""
    units = torch.eye(chosen.shape[1], dtype=torch.bool, device=chosen.device)
    return Moves(chosen.unsqueeze(1) ^ units, allowed)

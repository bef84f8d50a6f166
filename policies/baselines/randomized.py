"""Routers that draw their choice at random, reproducibly.

Every draw comes from a generator of its own, seeded from the router's seed, the site's index and the tokens. So the
same router gives the same choice for the same input, in whatever order and on whatever device it is asked, other
batches get other draws, and PyTorch's global generator is neither read nor moved. There is no state to reset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_backbone.checks import require_at_least, require_fraction
from moe_backbone.sites import NativeRouter, SiteView, best_units
from policies.baselines.fixed import heads_native, require_count


@dataclass(frozen=True)
class RandomK:
    """`k` random experts for every token, each equally likely: at k 1 with P = 1 / num_experts; heads native.

    Raises:
        ValueError: If `k` or `seed` is negative, or on `select` if `k` is larger than the site.
    """

    k: int
    """Experts a token uses at every expert site."""
    seed: int
    """Seed of the draws."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "k", "seed")

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        require_count(self.k, view)
        return best_units(_uniform(self.seed, view, len(view.scores)), self.k)


@dataclass(frozen=True)
class RandomSubset:
    """Every unit of every site on with the same probability, independently for each token.

    Raises:
        ValueError: If `rate` lies outside [0, 1] or `seed` is negative.
    """

    rate: float
    """Probability that a unit runs."""
    seed: int
    """Seed of the draws."""

    def __post_init__(self) -> None:
        require_fraction(self, "rate")
        require_at_least(self, 0, "seed")

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return _uniform(self.seed, view, len(view.scores)) < self.rate


@dataclass(frozen=True)
class RandomHeads:
    """A random share of the heads, the same for all tokens of a sequence or each token its own; experts native.

    Sequences are the rows of `view.tokens`: when a model decodes, every call draws anew.

    Raises:
        ValueError: If `share` lies outside [0, 1] or `seed` is negative.
    """

    share: float = 0.5
    """Fraction of a site's heads that run, rounded to whole heads."""
    seed: int = 0
    """Seed of the draws."""
    per_token: bool = False
    """Whether each token draws its own heads."""

    def __post_init__(self) -> None:
        require_fraction(self, "share")
        require_at_least(self, 0, "seed")

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        if view.site.kind != "heads":
            return NativeRouter().select(view)
        num_sequences, seq_len = view.tokens.shape
        count = round(self.share * view.site.num_units)
        if self.per_token:
            return best_units(_uniform(self.seed, view, len(view.scores)), count)
        return best_units(_uniform(self.seed, view, num_sequences), count).repeat_interleave(seq_len, dim=0)


def _uniform(seed: int, view: SiteView, rows: int) -> Tensor:
    """Draws from [0, 1), float32 (rows, num_units), on the device of the tokens."""
    places = torch.arange(1, view.tokens.numel() + 1, device=view.tokens.device)
    checksum = int((view.tokens.flatten() * places).sum())
    entropy = np.random.SeedSequence([seed, view.index, checksum])
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
    # Drawn on the CPU, as generators of different devices give different numbers.
    return torch.rand(rows, view.site.num_units, generator=generator).to(view.tokens.device)

"""Routers that follow one fixed rule over the gate scores; attention heads stay native."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from moe_backbone.checks import require, require_at_least, require_fraction
from moe_backbone.sites import NativeRouter, SiteView, best_units


def heads_native(choose: Callable[[Any, SiteView], Tensor]) -> Callable[[Any, SiteView], Tensor]:
    """Make the `select` of a router out of a rule for expert sites: heads are chosen as the backbone would."""

    @wraps(choose)
    def select(self: Any, view: SiteView) -> Tensor:
        return choose(self, view) if view.site.kind == "experts" else NativeRouter().select(view)

    return select


@dataclass(frozen=True)
class TopK:
    """The best `k` experts of every token by gate score.

    Raises:
        ValueError: If `k` is negative, or on `select` larger than the site.
    """

    k: int
    """Experts a token uses at every expert site."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "k")

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        require_count(self.k, view)
        return best_units(view.scores, self.k)


@dataclass(frozen=True)
class Threshold:
    """The experts whose gate probability exceeds a threshold.

    Raises:
        ValueError: If `probability` lies outside [0, 1].
    """

    probability: float
    """Threshold, a fraction."""
    at_least_one: bool
    """Whether a token with no such expert uses its best one instead of none."""

    def __post_init__(self) -> None:
        require_fraction(self, "probability")

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units).

        Example: probabilities (.5, .3, .2) and threshold .25 give the first two experts; threshold .6 gives none,
        or the first one with `at_least_one`.
        """
        chosen = view.scores.exp() > self.probability
        return chosen | best_units(view.scores, 1) if self.at_least_one else chosen


@dataclass(frozen=True)
class TopP:
    """The smallest set of experts whose gate probabilities add up to `mass`.

    Source: arXiv:2403.07652.

    Raises:
        ValueError: If `mass` lies outside (0, 1].
    """

    mass: float
    """Gate probability to reach, a fraction."""

    def __post_init__(self) -> None:
        require(0 < self.mass <= 1, f"mass must lie in (0, 1], got {self.mass}")

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units).

        Example: probabilities (.5, .3, .2) and mass .6 give the first two experts.
        """
        ordered, order = view.scores.exp().sort(dim=1, descending=True)
        reached_before = ordered.cumsum(1) - ordered
        return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, reached_before < self.mass)


@dataclass(frozen=True)
class SecondRatio:
    """Native experts, but those whose gate probability is below a share of the best one's.

    Source: dynamic expert skipping, arXiv:2402.14800.

    Raises:
        ValueError: If `ratio` lies outside [0, 1].
    """

    ratio: float
    """Least gate probability as a fraction of the best expert's."""

    def __post_init__(self) -> None:
        require_fraction(self, "ratio")

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units).

        Example: probabilities (.5, .3, .2), native top-2 and ratio .7 give the first expert; ratio .5 the first two.
        """
        native = NativeRouter().select(view)
        return native & (view.scores.exp() >= self.ratio * view.scores.exp().amax(1, keepdim=True))


@dataclass(frozen=True)
class EntropyThreshold:
    """Native experts where the gate is undecided, the best one where it is sure.

    Raises:
        ValueError: If `limit` lies outside [0, 1].
    """

    limit: float
    """Entropy of the gate above which all native experts run, as a fraction of the entropy of an even gate."""

    def __post_init__(self) -> None:
        require_fraction(self, "limit")

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units).

        Example: two experts, native top-2, limit .5: probabilities (.5, .5) with entropy 1 give both, (.99, .01) with
        .08 the first.
        """
        native = NativeRouter().select(view)
        if view.site.num_units == 1:
            return native
        entropy = torch.special.entr(view.scores.exp()).sum(1, keepdim=True) / math.log(view.site.num_units)
        return native & ((entropy > self.limit) | best_units(view.scores, 1))


@dataclass(frozen=True)
class SequenceTopK:
    """On average `k` experts a token, where the gate is surest of them in the whole sequence.

    Not causal: what a token gets depends on later tokens, so a model that decodes cannot do this. It is in the table
    as a bound. Sequences are the rows of `view.tokens`.

    Source: arXiv:2511.06494.

    Raises:
        ValueError: If `k` is negative, or on `select` larger than the site.
    """

    k: float
    """Experts of a token at every expert site, mean over its sequence."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "k")

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units).

        Example: a sequence of two tokens with probabilities (.5, .3, .2) and (.9, .1, 0) at k 1 gives the first expert
        of both; at k 1.5 the second expert of the first token too.
        """
        require_count(self.k, view)
        num_sequences, seq_len = view.tokens.shape
        by_sequence = view.scores.reshape(num_sequences, -1)
        return best_units(by_sequence, round(self.k * seq_len)).view_as(view.scores)


def require_count(k: float, view: SiteView) -> None:
    """Raise a ValueError if the site has fewer than `k` experts."""
    require(k <= view.site.num_units, f"k must lie in [0, num_experts={view.site.num_units}], got {k}")

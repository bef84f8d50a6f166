"""Routers that score units by the similarity of the token to a key of each unit, as attention scores its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_backbone import ranks
from moe_backbone.checks import require, require_at_least, require_fraction
from moe_backbone.quality import token_divergence
from moe_backbone.sites import Backbone, NativeRouter, SiteView, best_units
from policies.baselines.prefix import PrefixCache
from policies.baselines.pruning import one_off_routers

RIDGE = 0.01
"""Added to the covariance's diagonal as a fraction of its mean: rare directions must not rule the keys."""
LEAST_WEIGHT = 1e-12
"""Floor of a unit's mean weight: one that no token needs gets a finite score."""


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitKeys:
    """Keys of one site's units; query is the token's features.

    score = features @ keys + constant, the log of the weight that such a token is expected to give the unit.
    """

    keys: Tensor
    """(hidden_size, num_units), float32."""
    constant: Tensor
    """(num_units,), float32."""

    @classmethod
    def fit(cls, features: Tensor, weights: Tensor) -> UnitKeys:
        """The weighted mean of the features of each unit, centred and whitened.

        If features are Gaussian and the log of a unit's weight is linear in them, the score is that logarithm.

        Args:
            features: (num_tokens, hidden_size), float32.
            weights: How much each token needs each unit, at least 0 (num_tokens, num_units), float32.

        Example: features -1 and 1, weights 1 and 3: mean weight 2, weighted mean .5, variance 1, so without ridge
            score = .5 * feature + log(2) - .125.
        """
        points, weights = features.double(), weights.double()
        mean = points.mean(0)
        covariance = (points - mean).T @ (points - mean) / len(points)
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
        totals = weights.sum(0)
        shifts = (weights.T @ (points - mean)) / totals.clamp_min(LEAST_WEIGHT).unsqueeze(1)
        keys = torch.linalg.solve(covariance, shifts.T)
        constant = (totals / len(points)).clamp_min(LEAST_WEIGHT).log() - (mean + 0.5 * shifts).mul(keys.T).sum(1)
        return cls(keys=keys.float(), constant=constant.float())

    @property
    def flops(self) -> int:
        """FLOPs of the scores of one token."""
        return 2 * self.keys.numel()

    def score(self, features: Tensor) -> Tensor:
        """Scores of all units (num_tokens, num_units), float32, of features (num_tokens, hidden_size)."""
        return torch.addmm(self.constant.to(features.device), features, self.keys.to(features.device))


@dataclass(frozen=True, eq=False)
class AttentionTopK:
    """The best units of every token by similarity.

    Raises:
        ValueError: If a count is negative, or on `select` larger than the site.
    """

    keys: Mapping[int, UnitKeys]
    """From `fit_unit_keys`, by index of the site; sites left out stay native."""
    k: int
    """Experts of a token at every expert site with keys."""
    num_heads: int = 0
    """Heads of a token at every head site with keys."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "k", "num_heads")

    @property
    def overhead_flops(self) -> int:
        """FLOPs of the scores of one token over all sites."""
        return sum(keys.flops for keys in self.keys.values())

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        if view.index not in self.keys:
            return NativeRouter().select(view)
        name, count = ("num_heads", self.num_heads) if view.site.kind == "heads" else ("k", self.k)
        most = view.site.num_units
        require(count <= most, f"{name} must lie in [0, units={most}], got {count}")
        return best_units(self.keys[view.index].score(view.features), count)


@dataclass(frozen=True, eq=False)
class AttentionThreshold:
    """The units whose similarity exceeds a threshold.

    Raises:
        ValueError: If `probability` lies outside [0, 1].
    """

    keys: Mapping[int, UnitKeys]
    """From `fit_unit_keys`, by index of the site; sites left out stay native."""
    probability: float
    """Softmax of the similarities over a site's experts that an expert must exceed, a fraction."""
    head_score: float = 0.0
    """Similarity that a head must exceed: log of the expected divergence without it, in nats."""

    def __post_init__(self) -> None:
        require_fraction(self, "probability")

    @property
    def overhead_flops(self) -> int:
        """FLOPs of the scores of one token over all sites."""
        return sum(keys.flops for keys in self.keys.values())

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        if view.index not in self.keys:
            return NativeRouter().select(view)
        scores = self.keys[view.index].score(view.features)
        return scores > self.head_score if view.site.kind == "heads" else scores.softmax(1) > self.probability


@torch.no_grad()
def fit_unit_keys(backbone: Backbone, tokens: Tensor, targets: Tensor, *, heads: bool) -> dict[int, UnitKeys]:
    """Fit keys on text under native routing.

    The weight of an expert is its gate probability for tokens that chose it. The weight of a head is what the token's
    prediction loses when that head is off for all tokens, KL(native || without) in nats.

    Args:
        backbone: What computes.
        tokens: Training text (num_sequences, seq_len), int64.
        targets: Next tokens, same shape.
        heads: Whether head sites get keys too; runs the backbone once for every head.

    Returns:
        Keys by index of the site.
    """
    cache = PrefixCache(backbone, tokens, targets)
    cache.follow(NativeRouter())
    native = cache.logits(NativeRouter(), len(backbone.sites))
    keys = {}
    own = [index for index, site in enumerate(backbone.sites) if heads or site.kind == "experts"]
    for index in ranks.bar(own, desc="keys of units", unit="site"):
        site, view = backbone.sites[index], cache.view(index)
        if site.kind == "experts":
            weights = view.scores.exp() * NativeRouter().select(view)
        else:
            without = [cache.logits(router, index) for router in one_off_routers(site, index)]
            losses = [token_divergence(native, logits, targets).flatten() for logits in without]
            weights = torch.stack(losses, dim=1).clamp_min(0)
        keys[index] = UnitKeys.fit(view.features, weights)
    return keys


@torch.no_grad()
def head_thresholds(
    backbone: Backbone, tokens: Tensor, keys: Mapping[int, UnitKeys], shares: Sequence[float]
) -> list[float]:
    """For each share the score that such a share of all (token, head) pairs exceeds, under native routing.

    Args:
        backbone: What computes.
        tokens: Training text (num_sequences, seq_len), int64.
        keys: From `fit_unit_keys`, with heads.
        shares: Fractions.
    """
    scores = []
    state = backbone.begin(tokens)
    for site in backbone.sites:
        view = backbone.observe(state)
        if site.kind == "heads":
            scores.append(keys[view.index].score(view.features).flatten())
        state = backbone.advance(state, NativeRouter().select(view))
    quantiles = torch.tensor([1 - share for share in shares], dtype=torch.float32, device=tokens.device)
    return torch.cat(scores).quantile(quantiles).tolist()

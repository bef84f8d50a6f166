"""Routers that look at a token's cluster only: clusters of the features at every expert site, fitted on text."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moe_backbone.checks import require
from moe_backbone.sites import Backbone, NativeRouter, SiteView, best_units
from policies.baselines.fixed import heads_native

ClusterKind = Literal["kmeans", "gaussian"]

FIT_TOKENS = 4096
"""Most tokens that clusters are fitted on; masses count all tokens."""
MIXTURE_ITERATIONS = 20
"""Most steps of expectation maximisation: a router needs useful clusters, not a converged density."""
VARIANCE_FLOOR = 1e-4
"""Added to every variance, squared features: a cluster of one token would have none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clusters:
    """Clusters of one site, each a score of the features; a token belongs to the cluster with the highest.

    score = features @ linear + features**2 @ quadratic + constant.
    """

    linear: Tensor
    """(hidden_size, num_clusters), float32."""
    constant: Tensor
    """(num_clusters,), float32."""
    quadratic: Tensor | None = None
    """(hidden_size, num_clusters), float32; None where all clusters share one variance."""

    @classmethod
    def from_means(cls, means: Tensor) -> Clusters:
        """Clusters of the nearest mean.

        Args:
            means: (num_clusters, hidden_size), float32 or float64.

        Example: means 0 and 4 of one feature: score 0 and 4 * feature - 8, equal at 2.
        """
        return cls(linear=means.T.float(), constant=-0.5 * means.square().sum(1).float())

    @classmethod
    def from_gaussians(cls, weights: Tensor, means: Tensor, variances: Tensor) -> Clusters:
        """Clusters of the most probable Gaussian; the score is its log-density up to what all share, in nats.

        Args:
            weights: Fraction of the tokens (num_clusters,), float64.
            means: (num_clusters, hidden_size), float64.
            variances: Diagonal of the covariance, positive, same shape.
        """
        constant = weights.log() - 0.5 * (variances.log() + means.square() / variances).sum(1)
        linear, quadratic = (means / variances).T, (-0.5 / variances).T
        return cls(linear=linear.float(), constant=constant.float(), quadratic=quadratic.float())

    @property
    def flops(self) -> int:
        """FLOPs of the products for one token."""
        return 2 * self.linear.numel() * (1 if self.quadratic is None else 2)

    def assign(self, features: Tensor) -> Tensor:
        """Cluster of each token.

        Args:
            features: (num_tokens, hidden_size), float32.

        Returns:
            int64 (num_tokens,).
        """
        device = features.device
        scores = torch.addmm(self.constant.to(device), features, self.linear.to(device))
        if self.quadratic is not None:
            scores = torch.addmm(scores, features.square(), self.quadratic.to(device))
        return scores.argmax(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustering:
    """Clusters of every expert site, and what the native gate thinks of them; serves routers of any `k`."""

    clusters: Mapping[int, Clusters]
    """By index of the expert site."""
    masses: Mapping[int, Tensor]
    """Native gate probability of each expert, summed over the tokens of a cluster, by index of the expert site:
    float32 (num_clusters, num_units), tokens."""


@dataclass(frozen=True, eq=False)
class ClusterRouter:
    """The `k` experts with the largest mass in the token's cluster, whatever its own gate scores; heads native.

    Raises:
        ValueError: If `k` is negative or larger than a site.
    """

    clustering: Clustering
    """From `fit_clustering`, on the same backbone."""
    k: int
    """Experts a token uses at every expert site."""

    def __post_init__(self) -> None:
        fewest = min(mass.shape[1] for mass in self.clustering.masses.values())
        require(0 <= self.k <= fewest, f"k must lie in [0, num_experts={fewest}], got {self.k}")

    @property
    def overhead_flops(self) -> int:
        """FLOPs of the assignment for one token over all expert sites."""
        return sum(clusters.flops for clusters in self.clustering.clusters.values())

    @cached_property
    def tables(self) -> dict[int, Tensor]:
        """Experts of each cluster by index of the expert site: bool (num_clusters, num_units).

        Example: masses (.5, 2, 1) and (3, 0, 1) with k 2 give experts 1 and 2, and experts 0 and 2.
        """
        return {index: best_units(mass, self.k) for index, mass in self.clustering.masses.items()}

    @heads_native
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        assignment = self.clustering.clusters[view.index].assign(view.features)
        return self.tables[view.index].to(assignment.device)[assignment]


@torch.no_grad()
def fit_clustering(
    backbone: Backbone, tokens: Tensor, *, kind: ClusterKind, num_clusters: int, seed: int
) -> Clustering:
    """Cluster the features of every expert site under native routing, in one pass over the text.

    Args:
        backbone: What computes.
        tokens: Training text (num_sequences, seq_len), int64.
        kind: k-means, or a mixture of Gaussians with diagonal covariance.
        num_clusters: Clusters of a site.
        seed: Seed of the tokens to fit on and of the first means.

    Raises:
        ValueError: If a setting is impossible, or scikit-learn is not installed.
    """
    most = min(tokens.numel(), FIT_TOKENS)
    require(kind in get_args(ClusterKind), f"kind must be one of {', '.join(get_args(ClusterKind))}, got {kind}")
    require(1 <= num_clusters <= most, f"num_clusters must lie in [1, fitted tokens={most}], got {num_clusters}")
    require(seed >= 0, f"seed must be at least 0, got {seed}")
    generator = torch.Generator().manual_seed(seed)
    fitted = torch.randperm(tokens.numel(), generator=generator)[:FIT_TOKENS].to(tokens.device)
    clusters, masses = {}, {}
    state = backbone.begin(tokens)
    for index, site in enumerate(backbone.sites):
        view = backbone.observe(state)
        if site.kind == "experts":
            clusters[index] = _fit_site(view.features[fitted], kind, num_clusters, seed)
            members = one_hot(clusters[index].assign(view.features), num_clusters).float()
            masses[index] = members.T @ view.scores.exp()
        state = backbone.advance(state, NativeRouter().select(view))
    return Clustering(clusters=clusters, masses=masses)


def _fit_site(features: Tensor, kind: ClusterKind, num_clusters: int, seed: int) -> Clusters:
    """Clusters of `features` (num_tokens, hidden_size), on their device."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
    except ModuleNotFoundError:
        message = "clustering must have scikit-learn installed (pip install -e '.[cluster]'), got none"
        raise ValueError(message) from None
    points = features.double().cpu().numpy()
    if kind == "kmeans":
        means = KMeans(num_clusters, n_init=1, random_state=seed).fit(points).cluster_centers_
        return Clusters.from_means(torch.as_tensor(means, device=features.device))
    mixture = GaussianMixture(
        num_clusters,
        covariance_type="diag",
        reg_covar=VARIANCE_FLOOR,
        max_iter=MIXTURE_ITERATIONS,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it stops early on purpose
        mixture.fit(points)
    fits = (mixture.weights_, mixture.means_, mixture.covariances_)
    return Clusters.from_gaussians(*(torch.as_tensor(fit, device=features.device) for fit in fits))

"""The fixed routers of the evaluation table, each over its range of compute."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import Tensor

from moe_backbone.sites import Backbone, NativeRouter, Router
from policies.baselines.clusters import ClusterKind, ClusterRouter, fit_clustering
from policies.baselines.fixed import EntropyThreshold, SecondRatio, SequenceTopK, Threshold, TopK, TopP
from policies.baselines.greedy import GreedyPoint
from policies.baselines.hashing import HashRouter, balanced_table
from policies.baselines.pruning import HeadPruning, head_importance, prune_units
from policies.baselines.randomized import RandomHeads, RandomK, RandomSubset

logger = logging.getLogger(__name__)

FIXED_NAMES = (
    *("top-k", "random-k", "random-subset", "threshold", "top-p", "second-ratio", "entropy", "hash", "token-table"),
    *("kmeans", "gaussian", "sequence-top-k"),
    *("random-heads", "random-heads-each"),
    *("top-k+pruning", "random-k+pruning", "threshold+pruning", "top-p+pruning", "greedy"),
)
"""Families of fixed routers, native aside."""
SUBSET_RATES = (0.1, 0.25, 0.5, 0.75)
HEAD_SHARES = (0.25, 0.5, 0.75)
THRESHOLDS = ((0.1, False), (0.2, False), (0.3, True), (0.4, True), (0.5, False), (0.7, False))
"""Gate probability, and whether every token uses at least one expert."""
MASSES = (0.3, 0.5, 0.6, 0.75, 0.9)
RATIOS = (0.1, 0.25, 0.5, 0.75)
"""Gate probability as a fraction of the best expert's."""
ENTROPIES = (0.3, 0.5, 0.7, 0.85)
"""Fractions of the entropy of an even gate."""
SEQUENCE_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
"""Mean experts of a token as fractions of the native ones."""
NUM_CLUSTERS = 16
KEPT_HEAD_SHARES = (0.75, 0.5, 0.25)
PRUNED_THRESHOLDS = ((0.2, False), (0.3, True), (0.4, True), (0.5, False))
PRUNED_MASSES = (0.3, 0.5, 0.75)


@dataclass(frozen=True)
class FixedPoint:
    """One row of the evaluation table."""

    name: str
    """Family of the router, such as `top-k`."""
    setting: dict[str, Any]
    """What tells it from others of its family: flat, JSON values."""
    router: Router


def fixed_routers(
    backbone: Backbone,
    tokens: Tensor,
    targets: Tensor,
    *,
    seed: int,
    greedy: Sequence[GreedyPoint] = (),
    wanted: Sequence[str] = ("",),
) -> list[FixedPoint]:
    """The whole sweep: native, one-rule and random routers, those with static head pruning, and greedy search.

    Families that choose heads are left out where the backbone has no head sites.

    Args:
        backbone: What the routers are for.
        tokens: Training text that ranks the heads (num_sequences, seq_len), int64.
        targets: Next tokens, same shape.
        seed: Seed of the random routers.
        greedy: Steps of `GreedySearch.run`; native, its first, may be among them.
        wanted: Only families whose name starts with one of these; what others need is not computed.
    """

    def asked_for(*names: str) -> bool:
        return any(name.startswith(tuple(wanted)) for name in names)

    points = [FixedPoint("native", {}, NativeRouter()), *_unpruned(backbone, seed)]
    points += _by_token_id(backbone, tokens, seed)
    points += _by_cluster(backbone, tokens, seed, [kind for kind in get_args(ClusterKind) if asked_for(kind)])
    if any(site.kind == "heads" for site in backbone.sites):
        for name, per_token in (("random-heads", False), ("random-heads-each", True)):
            routers = [RandomHeads(share=share, seed=seed, per_token=per_token) for share in HEAD_SHARES]
            points += [_point(name, router) for router in routers]
        if asked_for(*(name for name in FIXED_NAMES if name.endswith("+pruning"))):
            points += _pruned(backbone, tokens, targets, seed)
    for step, point in enumerate(greedy):
        setting = {"step": step, "training_compute": point.compute, "training_loss": point.loss}
        points.append(FixedPoint("greedy", setting, point.router))
    return [point for point in points if asked_for(point.name)]


def _unpruned(backbone: Backbone, seed: int) -> Iterator[FixedPoint]:
    """Families that need no text; top-k up to all experts, which is soft routing."""
    experts = [site for site in backbone.sites if site.kind == "experts"]
    counts = range(min(min(site.num_units, site.native_units + 1) for site in experts) + 1)
    fewest, native = min(site.num_units for site in experts), min(site.native_units for site in experts)
    yield from (_point("top-k", TopK(k=k)) for k in sorted({*counts, min(2 * native, fewest), fewest}))
    yield from (_point("random-k", RandomK(k=k, seed=seed)) for k in counts)
    yield from (_point("random-subset", RandomSubset(rate=rate, seed=seed)) for rate in SUBSET_RATES)
    yield from (_threshold("threshold", *threshold) for threshold in THRESHOLDS)
    yield from (_point("top-p", TopP(mass=mass)) for mass in MASSES)
    yield from (_point("second-ratio", SecondRatio(ratio=ratio)) for ratio in RATIOS)
    yield from (_point("entropy", EntropyThreshold(limit=limit)) for limit in ENTROPIES)
    for share in SEQUENCE_SHARES:
        router = SequenceTopK(k=share * native)
        yield FixedPoint("sequence-top-k", {"k": router.k, "causal": False}, router)


def _by_token_id(backbone: Backbone, tokens: Tensor, seed: int) -> Iterator[FixedPoint]:
    """Families that look at the token's id only; the table needs expert sites of one size."""
    experts = [site for site in backbone.sites if site.kind == "experts"]
    counts = range(1, min(site.native_units for site in experts) + 1)
    yield from (_point("hash", HashRouter(k=k, seed=seed)) for k in counts)
    if len({site.num_units for site in experts}) == 1:
        for k in counts:
            yield FixedPoint("token-table", {"k": k}, balanced_table(tokens, experts[0].num_units, k))


def _by_cluster(backbone: Backbone, tokens: Tensor, seed: int, kinds: Sequence[ClusterKind]) -> Iterator[FixedPoint]:
    """Families that look at the cluster of the token's features only; left out aloud without scikit-learn."""
    if kinds and importlib.util.find_spec("sklearn") is None:
        logger.warning("routers %s left out, they need: pip install -e '.[cluster]'", " and ".join(kinds))
        return
    native = min(site.native_units for site in backbone.sites if site.kind == "experts")
    for kind in kinds:
        clustering = fit_clustering(backbone, tokens, kind=kind, num_clusters=NUM_CLUSTERS, seed=seed)
        for k in range(1, native + 1):
            yield FixedPoint(kind, {"num_clusters": NUM_CLUSTERS, "k": k, "seed": seed}, ClusterRouter(clustering, k))


def _pruned(backbone: Backbone, tokens: Tensor, targets: Tensor, seed: int) -> Iterator[FixedPoint]:
    """Expert rules over the most important heads only."""
    native = min(site.native_units for site in backbone.sites if site.kind == "experts")
    bases = [_point("top-k+pruning", TopK(k=k)) for k in range(1, native + 1)]
    bases.append(_point("random-k+pruning", RandomK(k=native, seed=seed)))
    bases += [_threshold("threshold+pruning", *threshold) for threshold in PRUNED_THRESHOLDS]
    bases += [_point("top-p+pruning", TopP(mass=mass)) for mass in PRUNED_MASSES]
    importance = head_importance(backbone, tokens, targets)
    num_heads = sum(map(len, importance.values()))
    for share in KEPT_HEAD_SHARES:
        keep = round(share * num_heads)
        kept = prune_units(importance, keep)
        for base in bases:
            yield FixedPoint(base.name, base.setting | {"heads_kept": keep}, HeadPruning(base.router, kept))


def _threshold(name: str, probability: float, at_least_one: bool) -> FixedPoint:
    return _point(name, Threshold(probability=probability, at_least_one=at_least_one))


def _point(name: str, router: Any) -> FixedPoint:
    """The fields of the router, a dataclass, are its setting."""
    return FixedPoint(name, asdict(router), router)

"""Families of fixed routers whose units are scored, pruned or allocated by what training text shows."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping

from torch import Tensor

from policies.baselines.allocation import find_allocations, within_budget
from policies.baselines.attention_score import AttentionThreshold, AttentionTopK, head_thresholds
from policies.baselines.calibration import Calibration
from policies.baselines.clusters import ClusterKind, ClusterRouter, fit_clustering
from policies.baselines.points import FixedPoint
from policies.baselines.pruning import ExpertPruning, UnitPruning, prune_units
from policies.baselines.query_norm import QueryNorm, query_projections
from policies.baselines.site_rules import ExpertRule, PerSiteRules

logger = logging.getLogger(__name__)

NUM_CLUSTERS = 16
PROBABILITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
"""Softmax of the similarities that an expert must exceed, fractions."""
SCORED_HEAD_SHARES = (0.75, 0.5)
"""Heads of a token by similarity, fractions."""
HEAD_SHARES = (0.9, 0.75, 0.5)
"""Heads that exceed a threshold, fractions of all (token, head) pairs."""
HEAD_PROBABILITIES = (0.1, 0.2)
NORM_HEAD_SHARES = (0.875, 0.75, 0.5)
"""Heads of a token by query norm, fractions."""
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Fractions of native compute."""
KEPT_EXPERT_SHARES = (0.75, 0.5)
KEPT_UNIT_SHARES = (0.875, 0.75, 0.5)
"""Kept of the heads and of the experts."""


def clusters(text: Calibration, kind: ClusterKind) -> Iterator[FixedPoint]:
    """Clusters of the token's features; left out aloud without scikit-learn."""
    if importlib.util.find_spec("sklearn") is None:
        logger.warning("router %s left out, it needs: pip install -e '.[cluster]'", kind)
        return
    clustering = fit_clustering(text.backbone, text.tokens, kind=kind, num_clusters=NUM_CLUSTERS, seed=text.seed)
    for k in range(1, text.native_experts + 1):
        setting = {"num_clusters": NUM_CLUSTERS, "k": k, "seed": text.seed}
        yield FixedPoint(kind, setting, ClusterRouter(clustering, k))


def kmeans(text: Calibration) -> Iterator[FixedPoint]:
    """Nearest mean."""
    yield from clusters(text, "kmeans")


def gaussian(text: Calibration) -> Iterator[FixedPoint]:
    """Most probable Gaussian."""
    yield from clusters(text, "gaussian")


def attention_top_k(text: Calibration) -> Iterator[FixedPoint]:
    """Experts by similarity to their keys."""
    for k in range(1, text.native_experts + 1):
        yield FixedPoint("attention-top-k", {"k": k}, AttentionTopK(text.expert_keys, k))


def attention_threshold(text: Calibration) -> Iterator[FixedPoint]:
    """Experts above a similarity."""
    for bar in PROBABILITIES:
        yield FixedPoint("attention-threshold", {"probability": bar}, AttentionThreshold(text.expert_keys, bar))


def attention_top_k_heads(text: Calibration) -> Iterator[FixedPoint]:
    """Experts and heads by similarity."""
    for num_heads in text.head_counts(SCORED_HEAD_SHARES):
        for k in text.halved_experts:
            router = AttentionTopK(text.unit_keys, k, num_heads)
            yield FixedPoint("attention-top-k+heads", {"k": k, "num_heads": num_heads}, router)


def attention_threshold_heads(text: Calibration) -> Iterator[FixedPoint]:
    """Experts and heads above a similarity."""
    bars = head_thresholds(text.backbone, text.tokens, text.unit_keys, HEAD_SHARES)
    for share, head_score in zip(HEAD_SHARES, bars, strict=True):
        for probability in HEAD_PROBABILITIES:
            setting = {"probability": probability, "head_share": share, "head_score": head_score}
            router = AttentionThreshold(text.unit_keys, probability, head_score)
            yield FixedPoint("attention-threshold+heads", setting, router)


def query_norm(text: Calibration) -> Iterator[FixedPoint]:
    """Heads with the longest queries; left out aloud if the backbone does not show its query weights."""
    queries = query_projections(text.backbone)
    if queries is None:
        logger.warning("router query-norm left out, the backbone does not show its query weights")
        return
    for num_heads in text.head_counts(NORM_HEAD_SHARES):
        for k in text.halved_experts:
            yield FixedPoint("query-norm", {"num_heads": num_heads, "k": k}, QueryNorm(queries, num_heads, k))


def allocation(text: Calibration) -> Iterator[FixedPoint]:
    """Experts of each layer."""
    yield from _allocated("allocation", text, None)


def allocation_heads(text: Calibration) -> Iterator[FixedPoint]:
    """Experts and heads of each layer."""
    yield from _allocated("allocation+heads", text, text.head_importance)


def _allocated(name: str, text: Calibration, head_importance: Mapping[int, Tensor] | None) -> Iterator[FixedPoint]:
    front = find_allocations(text.backbone, text.tokens, text.targets, head_importance)
    for budget in BUDGETS:
        if budget >= front[0].compute:
            router = within_budget(front, budget).router
            yield FixedPoint(name, {"budget": budget, "units": _counts(router)}, router)


def _counts(router: PerSiteRules) -> str:
    """Units of every site in running order, such as `8 3 8 2`."""
    rules = router.rules
    return " ".join(str(rule.most if isinstance(rule, ExpertRule) else len(rule.kept)) for rule in rules)


def expert_pruning(text: Calibration) -> Iterator[FixedPoint]:
    """Top-k among the experts that the text uses most, and among those it misses most."""
    for importance, scores in (("mass", text.routing_mass), ("loss", text.expert_importance)):
        for share in KEPT_EXPERT_SHARES:
            keep = round(share * sum(map(len, scores.values())))
            for k in text.halved_experts:
                setting = {"importance": importance, "experts_kept": keep, "k": k}
                yield FixedPoint("expert-pruning", setting, ExpertPruning(prune_units(scores, keep), k))


def expert_pruning_heads(text: Calibration) -> Iterator[FixedPoint]:
    """The same share of the most important heads and experts."""
    for share in KEPT_UNIT_SHARES:
        heads, experts = (
            round(share * sum(map(len, scores.values()))) for scores in (text.head_importance, text.expert_importance)
        )
        for k in text.halved_experts:
            pruned = ExpertPruning(prune_units(text.expert_importance, experts), k)
            router = UnitPruning(pruned, prune_units(text.head_importance, heads))
            setting = {"heads_kept": heads, "experts_kept": experts, "k": k}
            yield FixedPoint("expert-pruning+heads", setting, router)

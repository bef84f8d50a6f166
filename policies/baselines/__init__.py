"""Routers without reinforcement learning: what a learned router is compared with."""

from policies.baselines.allocation import Allocation, allocate, find_allocations, within_budget
from policies.baselines.attention_score import AttentionThreshold, AttentionTopK, UnitKeys, fit_unit_keys
from policies.baselines.clusters import Clustering, ClusterRouter, fit_clustering
from policies.baselines.fixed import EntropyThreshold, SecondRatio, SequenceTopK, Threshold, TopK, TopP
from policies.baselines.greedy import GreedyConfig, GreedyPoint, GreedySearch
from policies.baselines.hashing import HashRouter, TokenTable, balanced_table
from policies.baselines.points import FixedPoint
from policies.baselines.pruning import (
    ExpertPruning,
    UnitPruning,
    expert_importance,
    head_importance,
    prune_share,
    prune_units,
    routing_mass,
)
from policies.baselines.query_norm import QueryNorm, query_projections
from policies.baselines.randomized import RandomHeads, RandomK, RandomSubset
from policies.baselines.site_rules import ExpertRule, HeadRule, PerSiteRules
from policies.baselines.sweep import FIXED_NAMES, fixed_routers

__all__ = [
    "FIXED_NAMES",
    "Allocation",
    "AttentionThreshold",
    "AttentionTopK",
    "ClusterRouter",
    "Clustering",
    "EntropyThreshold",
    "ExpertPruning",
    "ExpertRule",
    "FixedPoint",
    "GreedyConfig",
    "GreedyPoint",
    "GreedySearch",
    "HashRouter",
    "HeadRule",
    "PerSiteRules",
    "QueryNorm",
    "RandomHeads",
    "RandomK",
    "RandomSubset",
    "SecondRatio",
    "SequenceTopK",
    "Threshold",
    "TokenTable",
    "TopK",
    "TopP",
    "UnitKeys",
    "UnitPruning",
    "allocate",
    "balanced_table",
    "expert_importance",
    "find_allocations",
    "fit_clustering",
    "fit_unit_keys",
    "fixed_routers",
    "head_importance",
    "prune_share",
    "prune_units",
    "query_projections",
    "routing_mass",
    "within_budget",
]

"""Routers without reinforcement learning: what a learned router is compared with."""

from policies.baselines.clusters import Clustering, ClusterRouter, fit_clustering
from policies.baselines.fixed import EntropyThreshold, SecondRatio, SequenceTopK, Threshold, TopK, TopP
from policies.baselines.greedy import GreedyConfig, GreedyPoint, GreedySearch
from policies.baselines.hashing import HashRouter, TokenTable, balanced_table
from policies.baselines.pruning import (
    ExpertPruning,
    HeadPruning,
    expert_importance,
    head_importance,
    prune_units,
    routing_mass,
)
from policies.baselines.randomized import RandomHeads, RandomK, RandomSubset
from policies.baselines.site_rules import ExpertRule, HeadRule, PerSiteRules
from policies.baselines.sweep import FIXED_NAMES, FixedPoint, fixed_routers

__all__ = [
    "FIXED_NAMES",
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
    "HeadPruning",
    "HeadRule",
    "PerSiteRules",
    "RandomHeads",
    "RandomK",
    "RandomSubset",
    "SecondRatio",
    "SequenceTopK",
    "Threshold",
    "TokenTable",
    "TopK",
    "TopP",
    "balanced_table",
    "expert_importance",
    "fit_clustering",
    "fixed_routers",
    "head_importance",
    "prune_units",
    "routing_mass",
]

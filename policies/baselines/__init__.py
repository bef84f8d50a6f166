"""Routers without reinforcement learning: what a learned router is compared with."""

from policies.baselines.fixed import Threshold, TopK, TopP
from policies.baselines.greedy import GreedyConfig, GreedyPoint, GreedySearch
from policies.baselines.pruning import HeadPruning, head_importance, prune_heads
from policies.baselines.randomized import RandomHeads, RandomK, RandomSubset
from policies.baselines.site_rules import ExpertRule, HeadRule, PerSiteRules
from policies.baselines.sweep import FIXED_NAMES, FixedPoint, fixed_routers

__all__ = [
    "FIXED_NAMES",
    "ExpertRule",
    "FixedPoint",
    "GreedyConfig",
    "GreedyPoint",
    "GreedySearch",
    "HeadPruning",
    "HeadRule",
    "PerSiteRules",
    "RandomHeads",
    "RandomK",
    "RandomSubset",
    "Threshold",
    "TopK",
    "TopP",
    "fixed_routers",
    "head_importance",
    "prune_heads",
]

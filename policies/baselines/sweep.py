"""The fixed routers of the evaluation table, each over its range of compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from moe_backbone.sites import Backbone, NativeRouter
from policies.baselines import fitted_families as fitted
from policies.baselines import rule_families as rules
from policies.baselines.calibration import Calibration
from policies.baselines.greedy import GreedyPoint
from policies.baselines.points import FixedPoint

Family = Callable[[Calibration], Iterable[FixedPoint]]

EXPERT_FAMILIES: dict[str, Family] = {
    "top-k": rules.top_k,
    "random-k": rules.random_k,
    "random-subset": rules.random_subset,
    "threshold": rules.threshold,
    "top-p": rules.top_p,
    "second-ratio": rules.second_ratio,
    "entropy": rules.entropy,
    "hash": rules.hashed,
    "token-table": rules.token_table,
    "kmeans": fitted.kmeans,
    "gaussian": fitted.gaussian,
    "attention-top-k": fitted.attention_top_k,
    "attention-threshold": fitted.attention_threshold,
    "allocation": fitted.allocation,
    "expert-pruning": fitted.expert_pruning,
    "sequence-top-k": rules.sequence_top_k,
}
HEAD_FAMILIES: dict[str, Family] = {
    "random-heads": rules.random_heads,
    "random-heads-each": rules.random_heads_each,
    "query-norm": fitted.query_norm,
    "attention-top-k+heads": fitted.attention_top_k_heads,
    "attention-threshold+heads": fitted.attention_threshold_heads,
    "top-k+pruning": rules.top_k_pruned,
    "random-k+pruning": rules.random_k_pruned,
    "threshold+pruning": rules.threshold_pruned,
    "top-p+pruning": rules.top_p_pruned,
    "allocation+heads": fitted.allocation_heads,
    "expert-pruning+heads": fitted.expert_pruning_heads,
}
"""Families that choose heads, which a backbone may lack."""
WITHOUT_EXPERTS = ("random-subset", "random-heads", "random-heads-each", "top-k+pruning")
"""Families that mean something where there are only heads."""
FIXED_NAMES = (*EXPERT_FAMILIES, *HEAD_FAMILIES, "greedy")
"""Families of fixed routers, native aside."""


def fixed_routers(
    backbone: Backbone,
    tokens: Tensor,
    targets: Tensor,
    *,
    seed: int,
    greedy: Sequence[GreedyPoint] = (),
    wanted: Sequence[str] = ("",),
) -> list[FixedPoint]:
    """The whole sweep: native, every family at its settings, and greedy search.

    Families that choose heads are left out where the backbone has no head sites, and those of experts likewise.

    Args:
        backbone: What the routers are for.
        tokens: Training text that routers are fitted on (num_sequences, seq_len), int64.
        targets: Next tokens, same shape.
        seed: Seed of the random routers.
        greedy: Steps of `GreedySearch.run`; native, its first, may be among them.
        wanted: Only families whose name starts with one of these; what others need is not computed.
    """
    text = Calibration(backbone, tokens, targets, seed)
    families = EXPERT_FAMILIES | (HEAD_FAMILIES if text.head_sites else {})
    if not text.expert_sites:
        families = {name: families[name] for name in WITHOUT_EXPERTS}
    points = [FixedPoint("native", {}, NativeRouter())]
    for name, family in families.items():
        if name.startswith(tuple(wanted)):
            points += family(text)
    for step, point in enumerate(greedy):
        setting = {"step": step, "training_compute": point.compute, "training_loss": point.loss}
        points.append(FixedPoint("greedy", setting, point.router))
    return [point for point in points if point.name.startswith(tuple(wanted))]

"""Families of fixed routers that follow a rule or draw at random, each over its range of compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from policies.baselines.calibration import Calibration
from policies.baselines.fixed import EntropyThreshold, SecondRatio, SequenceTopK, Threshold, TopK, TopP
from policies.baselines.hashing import HashRouter, balanced_table
from policies.baselines.points import FixedPoint, described
from policies.baselines.pruning import UnitPruning, prune_units
from policies.baselines.randomized import RandomHeads, RandomK, RandomSubset

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
KEPT_HEAD_SHARES = (0.75, 0.5, 0.25)
PRUNED_THRESHOLDS = ((0.2, False), (0.3, True), (0.4, True), (0.5, False))
PRUNED_MASSES = (0.3, 0.5, 0.75)


def top_k(text: Calibration) -> Iterator[FixedPoint]:
    """Up to all experts, which is soft routing."""
    fewest, native = text.fewest_experts, text.native_experts
    counts = sorted({*range(min(fewest, native + 1) + 1), min(2 * native, fewest), fewest})
    yield from (described("top-k", TopK(k=k)) for k in counts)


def random_k(text: Calibration) -> Iterator[FixedPoint]:
    """At k 1 the uniform expert."""
    counts = range(min(text.fewest_experts, text.native_experts + 1) + 1)
    yield from (described("random-k", RandomK(k=k, seed=text.seed)) for k in counts)


def random_subset(text: Calibration) -> Iterator[FixedPoint]:
    """Any unit of any site at one rate."""
    yield from (described("random-subset", RandomSubset(rate=rate, seed=text.seed)) for rate in SUBSET_RATES)


def random_heads(text: Calibration) -> Iterator[FixedPoint]:
    """A share of the heads for each sequence."""
    yield from (described("random-heads", RandomHeads(share=share, seed=text.seed)) for share in HEAD_SHARES)


def random_heads_each(text: Calibration) -> Iterator[FixedPoint]:
    """A share of the heads for each token."""
    for share in HEAD_SHARES:
        yield described("random-heads-each", RandomHeads(share=share, seed=text.seed, per_token=True))


def threshold(text: Calibration) -> Iterator[FixedPoint]:
    """Gate probability above a bar."""
    for probability, at_least_one in THRESHOLDS:
        yield described("threshold", Threshold(probability=probability, at_least_one=at_least_one))


def top_p(text: Calibration) -> Iterator[FixedPoint]:
    """Gate probability up to a mass."""
    yield from (described("top-p", TopP(mass=mass)) for mass in MASSES)


def second_ratio(text: Calibration) -> Iterator[FixedPoint]:
    """Native experts near the best one."""
    yield from (described("second-ratio", SecondRatio(ratio=ratio)) for ratio in RATIOS)


def entropy(text: Calibration) -> Iterator[FixedPoint]:
    """One expert where the gate is sure."""
    yield from (described("entropy", EntropyThreshold(limit=limit)) for limit in ENTROPIES)


def sequence_top_k(text: Calibration) -> Iterator[FixedPoint]:
    """A budget for each sequence; looks ahead, so it is flagged."""
    for share in SEQUENCE_SHARES:
        router = SequenceTopK(k=share * text.native_experts)
        yield FixedPoint("sequence-top-k", {"k": router.k, "causal": False}, router)


def hashed(text: Calibration) -> Iterator[FixedPoint]:
    """Experts by a hash of the token's id."""
    yield from (described("hash", HashRouter(k=k, seed=text.seed)) for k in range(1, text.native_experts + 1))


def token_table(text: Calibration) -> Iterator[FixedPoint]:
    """A table over token ids, which needs expert sites of one size."""
    if len({site.num_units for site in text.expert_sites}) == 1:
        for k in range(1, text.native_experts + 1):
            yield FixedPoint("token-table", {"k": k}, balanced_table(text.tokens, text.fewest_experts, k))


def top_k_pruned(text: Calibration) -> Iterator[FixedPoint]:
    """Top-k over static heads."""
    yield from _pruned(text, (described("top-k+pruning", TopK(k=k)) for k in range(1, text.native_experts + 1)))


def random_k_pruned(text: Calibration) -> Iterator[FixedPoint]:
    """Random experts over static heads."""
    yield from _pruned(text, [described("random-k+pruning", RandomK(k=text.native_experts, seed=text.seed))])


def threshold_pruned(text: Calibration) -> Iterator[FixedPoint]:
    """Thresholds over static heads."""
    routers = (Threshold(probability=bar, at_least_one=least) for bar, least in PRUNED_THRESHOLDS)
    yield from _pruned(text, (described("threshold+pruning", router) for router in routers))


def top_p_pruned(text: Calibration) -> Iterator[FixedPoint]:
    """Top-p over static heads."""
    yield from _pruned(text, (described("top-p+pruning", TopP(mass=mass)) for mass in PRUNED_MASSES))


def _pruned(text: Calibration, bases: Iterable[FixedPoint]) -> Iterator[FixedPoint]:
    """Expert rules over the most important heads only."""
    num_heads = sum(map(len, text.head_importance.values()))
    for base in bases:
        for share in KEPT_HEAD_SHARES:
            keep = round(share * num_heads)
            router = UnitPruning(base.router, prune_units(text.head_importance, keep))
            yield FixedPoint(base.name, base.setting | {"heads_kept": keep}, router)

"""Allocation: sensitivities are measured exactly, and dynamic programming finds what enumeration finds."""

from itertools import product

import pytest
import torch

from moe_backbone import ComputeMeter, NativeRouter, token_log_likelihood
from policies.baselines import ExpertRule, HeadRule, allocate, find_allocations, head_importance, within_budget
from policies.baselines.allocation import Option, measure_options
from policies.baselines.prefix import PrefixCache
from policies.baselines.site_rules import native_rules


def options(*sites):
    """Options of (compute, rise) pairs."""
    rule = HeadRule(kept=())
    return [[Option(rule=rule, compute=compute, rise=rise) for compute, rise in site] for site in sites]


def measure(backbone, tokens, router):
    """Loss and compute by a full run."""
    logits, subsets = backbone.run(tokens, router)
    meter = ComputeMeter(backbone.sites, tokens.shape[1])
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0])
    compute = sum(meter.flops(index, subset, positions).mean().item() for index, subset in enumerate(subsets))
    return -token_log_likelihood(logits, tokens).mean().item(), compute / meter.native_flops


def test_front_of_the_docstring():
    front = allocate(options([(0.5, 0.0), (0.0, 0.3)], [(0.5, 0.0), (0.0, 0.1)]))
    assert [(point.compute, pytest.approx(point.rise)) for point in front] == [(0.0, 0.4), (0.5, 0.1), (1.0, 0.0)]


def test_every_budget_gets_what_enumeration_finds():
    numbers = torch.rand(4, 5, 2).round(decimals=2)
    numbers[:, 0, 0] = 0  # every site can be had for nothing
    sites = numbers.tolist()
    front = allocate(options(*sites))
    for budget in (0.0, 0.5, 1.0, 2.0, 4.0):
        choices = [choice for choice in product(*sites) if sum(compute for compute, _ in choice) <= budget + 1e-9]
        best = min(sum(rise for _, rise in choice) for choice in choices)
        allocation = within_budget(front, budget)
        assert allocation.rise == pytest.approx(best)
        assert allocation.compute <= budget + 1e-9


def test_a_loss_that_falls_buys_back_no_compute():
    """Fewer units that lose nothing are taken at every budget."""
    front = allocate(options([(1.0, 0.0), (0.5, -0.1), (0.0, 0.2)]))
    assert [(point.compute, point.rise) for point in front] == [(0.0, 0.2), (0.5, -0.1)]


def test_options_are_full_runs_around_the_base(tiny_backbone, tiny_tokens):
    importance = head_importance(tiny_backbone, tiny_tokens, tiny_tokens)
    cache = PrefixCache(tiny_backbone, tiny_tokens, tiny_tokens)
    native = native_rules(tiny_backbone.sites)
    base = native.with_rule(1, ExpertRule(most=1, least=1))
    measured = measure_options(cache, base, importance)
    assert [len(site) for site in measured] == [5, 3, 5, 3]
    for index, site in enumerate(measured):
        loss, _ = measure(tiny_backbone, tiny_tokens, base.with_rule(index, native.rules[index]))
        assert (site[0].rule, site[0].rise, site[-1].compute) == (native.rules[index], 0, 0)
        for option in site:
            changed, _ = measure(tiny_backbone, tiny_tokens, base.with_rule(index, option.rule))
            assert option.rise == pytest.approx(changed - loss, abs=1e-6)
    least = importance[0].argmin().item()
    assert measured[0][1].rule == native.rules[0].without(least)


@pytest.mark.parametrize("heads", [False, True], ids=["experts", "experts and heads"])
def test_allocations_cost_what_they_say_and_keep_heads_unless_asked(tiny_backbone, tiny_tokens, heads):
    importance = head_importance(tiny_backbone, tiny_tokens, tiny_tokens) if heads else None
    front = find_allocations(tiny_backbone, tiny_tokens, tiny_tokens, importance)
    for allocation in front[:: max(1, len(front) // 5)]:
        _, compute = measure(tiny_backbone, tiny_tokens, allocation.router)
        assert compute == pytest.approx(allocation.compute, abs=1e-6)
    kept = {len(rule.kept) for point in front for rule in point.rules if isinstance(rule, HeadRule)}
    assert (kept == {4}) is not heads
    assert front[0].compute == pytest.approx(0.0 if heads else min(point.compute for point in front))


def test_rises_are_measured_around_a_cheaper_allocation(tiny_backbone, tiny_tokens):
    """Not around native routing, where the last word would be the first."""
    cache = PrefixCache(tiny_backbone, tiny_tokens, tiny_tokens)
    first = allocate(measure_options(cache, native_rules(tiny_backbone.sites)))
    base = within_budget(first, (first[0].compute + 1) / 2).router
    assert find_allocations(tiny_backbone, tiny_tokens, tiny_tokens) == allocate(measure_options(cache, base))
    loss, _ = measure(tiny_backbone, tiny_tokens, NativeRouter())
    assert cache.follow(native_rules(tiny_backbone.sites)).loss == pytest.approx(loss, abs=1e-6)


def test_budget_below_the_cheapest_is_refused():
    front = allocate(options([(0.5, 0.0), (0.25, 0.1)]))
    with pytest.raises(ValueError, match=r"budget must be at least 0.2500, got 0.1"):
        within_budget(front, 0.1)

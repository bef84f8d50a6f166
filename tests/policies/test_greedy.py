"""Greedy search takes the best moves, measures them exactly, and can be stored and continued."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from moe_backbone import BackboneConfig, ComputeMeter, MoETransformer, NativeRouter, token_log_likelihood
from policies.baselines import ExpertRule, GreedyConfig, GreedyPoint, GreedySearch, HeadRule, PerSiteRules
from policies.baselines.prefix import PrefixCache
from policies.baselines.site_rules import expert_ladder, native_rules

CONFIG = BackboneConfig(
    vocab_size=32, hidden_size=32, num_layers=2, num_heads=4, num_experts=4, top_k=2, intermediate_size=16, seq_len=12
)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return MoETransformer(CONFIG).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def text():
    stream = torch.randint(CONFIG.vocab_size, (6, 13), generator=torch.Generator().manual_seed(1))
    return stream[:, :-1], stream[:, 1:]


@pytest.fixture(scope="module")
def points(backbone, text):
    return GreedySearch(backbone, *text).run(progress=False)


def measure(backbone, text, router):
    """Loss and compute by a full run, sharing nothing with the search."""
    tokens, targets = text
    logits, subsets = backbone.run(tokens, router)
    meter = ComputeMeter(backbone.sites, tokens.shape[1])
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0])
    compute = sum(meter.flops(index, subset, positions).mean().item() for index, subset in enumerate(subsets))
    return -token_log_likelihood(logits, targets).mean().item(), compute / meter.native_flops


def test_search_starts_native_and_ends_below_its_goal(backbone, text, points):
    loss, compute = measure(backbone, text, NativeRouter())
    assert points[0].compute == pytest.approx(1.0)
    assert compute == pytest.approx(1.0)
    assert points[0].loss == pytest.approx(loss, abs=1e-6)
    assert points[-1].compute <= 0.3 < points[-2].compute


def test_compute_falls_at_every_step(points):
    computes = [point.compute for point in points]
    assert all(later < earlier for earlier, later in pairwise(computes))


def test_steps_change_at_most_two_sites_in_different_layers(points):
    for before, after in pairwise(points):
        pairs = zip(before.router.rules, after.router.rules, strict=True)
        layers = [index // 2 for index, (old, new) in enumerate(pairs) if old != new]
        assert 1 <= len(layers) <= 2
        assert len(set(layers)) == len(layers)


def test_cached_prefixes_give_the_loss_and_compute_of_a_full_run(backbone, text, points):
    for point in points:
        assert (point.loss, point.compute) == pytest.approx(measure(backbone, text, point.router), abs=1e-6)


def test_first_move_is_the_best_of_all_by_brute_force(backbone, text):
    config = GreedyConfig(moves=1, stop_compute=0.99, lookahead=100)
    first = GreedySearch(backbone, *text, config).run(progress=False)[1]
    native = native_rules(backbone.sites)
    routers = []
    for index, site in enumerate(backbone.sites):
        if site.kind == "heads":
            routers += [native.with_rule(index, native.rules[index].without(head)) for head in range(4)]
        else:
            routers += [native.with_rule(index, rule) for rule in expert_ladder(site)]
    loss, compute = measure(backbone, text, native)
    prices = {}
    for router in routers:
        new_loss, new_compute = measure(backbone, text, router)
        if compute - new_compute >= config.least_saving:
            prices[router] = (new_loss - loss) / (compute - new_compute)
    price = (first.loss - loss) / (compute - first.compute)
    assert price == pytest.approx(min(prices.values()), abs=1e-4)
    assert first.router in prices


def test_a_second_move_that_saves_nothing_is_not_taken(backbone, text):
    search = GreedySearch(backbone, *text, GreedyConfig())
    native = native_rules(backbone.sites)
    router = native.with_rule(0, HeadRule(kept=(0, 1)))
    loss, compute = measure(backbone, text, router)
    search.run([GreedyPoint(router=router, loss=loss, compute=0.0)], progress=False)
    point = GreedyPoint(router=router, loss=loss, compute=compute)
    good = search._evaluate(point, 3, ExpertRule(most=0))
    bad = search._evaluate(point, 0, native.rules[0])
    taken = search._take(point, [good, bad])
    expected = router.with_rule(3, ExpertRule(most=0))
    assert taken.router == expected
    assert (taken.loss, taken.compute) == pytest.approx(measure(backbone, text, expected), abs=1e-6)


def test_measuring_a_change_equals_a_full_run_and_leaves_the_cache_alone(backbone, text):
    cache = PrefixCache(backbone, *text)
    followed = cache.follow(native_rules(backbone.sites))
    changed = native_rules(backbone.sites).with_rule(3, ExpertRule(most=1, least=1))
    outcome = cache.measure(changed, 3)
    assert (outcome.loss, outcome.compute) == pytest.approx(measure(backbone, text, changed), abs=1e-6)
    assert outcome.compute < followed.compute
    assert cache.measure(native_rules(backbone.sites), 2) == followed


def test_search_survives_json_and_goes_on_where_it_stopped(backbone, text, points):
    config = GreedyConfig(stop_compute=0.7, refresh_all_every=1)
    stored = json.dumps([point.to_json() for point in GreedySearch(backbone, *text, config).run(progress=False)])
    restored = [GreedyPoint.from_json(point) for point in json.loads(stored)]
    config = GreedyConfig(refresh_all_every=1)
    continued = GreedySearch(backbone, *text, config).run(restored, progress=False)
    assert continued[: len(restored)] == restored
    in_one_go = GreedySearch(backbone, *text, config).run(progress=False)
    assert [point.router for point in continued] == [point.router for point in in_one_go]
    assert [GreedyPoint.from_json(point.to_json()) for point in points] == points


def test_search_ends_when_nothing_is_left(backbone, text):
    config = GreedyConfig(stop_compute=0.0)
    last = GreedySearch(backbone, *text, config).run(progress=False)[-1]
    assert last.compute < 0.02
    assert all(not rule.kept for rule in last.router.rules if isinstance(rule, HeadRule))


def test_native_rules_choose_natively(backbone, text):
    native_logits, native_subsets = backbone.run(text[0], NativeRouter())
    logits, subsets = backbone.run(text[0], native_rules(backbone.sites))
    assert torch.equal(logits, native_logits)
    assert all(torch.equal(*pair) for pair in zip(subsets, native_subsets, strict=True))


EXPERT_RULES = {
    "best-two-above-.1": (ExpertRule(most=2, above=0.1), [0, 1]),
    "above-.4": (ExpertRule(most=2, above=0.4), [0]),
    "above-.6": (ExpertRule(most=2, above=0.6), []),
    "above-.6-or-best": (ExpertRule(most=2, above=0.6, least=1), [0]),
    "none": (ExpertRule(most=0), []),
}


@pytest.mark.parametrize(("rule", "expected"), EXPERT_RULES.values(), ids=EXPERT_RULES.keys())
def test_expert_rule_worked_by_hand(rule, expected):
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    subset = rule.select(SimpleNamespace(scores=scores))
    assert subset[0].nonzero().flatten().tolist() == expected


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="rule must have the fields of HeadRule or ExpertRule, got"):
        PerSiteRules.from_json([{"most": 1, "unknown": 2}])


@pytest.mark.parametrize("name", ["lookahead", "moves", "refresh", "refresh_all_every"])
def test_impossible_configs_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        GreedyConfig(**{name: 0})

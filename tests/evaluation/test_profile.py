from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation.profile import nearest, profile_points, profile_routing, profile_split, showcase
from moe_backbone import ComputeMeter, best_units


class CountRouter:
    """The best `count` units everywhere, at a cost of its own."""

    def __init__(self, count, overhead_flops=0.0):
        self.count, self.overhead_flops = count, overhead_flops
        self.prices = set()

    def select(self, view):
        self.prices.update(view.price.tolist())
        return best_units(view.scores, self.count)


@pytest.fixture
def windows(tiny_corpus):
    return tiny_corpus.test.windows(16, 160)[:2]


def test_tokens_add_up_to_the_point_of_the_evaluator(evaluator, tiny_backbone, windows):
    router = CountRouter(1, overhead_flops=500.0)
    point = evaluator.score("count", router, setting={})
    routing = profile_routing(tiny_backbone, *windows, router, name="count", setting={})
    assert routing.compute.mean() == pytest.approx(point.compute)
    assert routing.overhead == pytest.approx(point.router_overhead)
    assert routing.loss.mean() == pytest.approx(point.loss)
    used = [subset.sum(1).mean() for subset in routing.subsets]
    assert used == pytest.approx(point.units_per_token)


def test_compute_of_one_token_by_hand(tiny_backbone, windows):
    routing = profile_routing(tiny_backbone, *windows, CountRouter(1), name="count", setting={})
    native = ComputeMeter(tiny_backbone.sites, 16).native_flops
    head, expert = 4 * 32 * 8 + 4 * 8 * 5, 6 * 32 * 16  # at position 4 a head sees five keys
    np.testing.assert_allclose(routing.site_compute[:, 4], np.array([head, expert, head, expert]) / native)
    np.testing.assert_allclose(routing.compute[4], 2 * (head + expert) / native)


def test_batches_do_not_show(tiny_backbone, windows, monkeypatch):
    whole = profile_routing(tiny_backbone, *windows, CountRouter(2), name="count", setting={})
    monkeypatch.setattr("evaluation.profile.BATCH_SEQUENCES", 3)
    parts = profile_routing(tiny_backbone, *windows, CountRouter(2), name="count", setting={})
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-4)
    np.testing.assert_array_equal(parts.site_compute, whole.site_compute)
    assert [subset.shape for subset in parts.subsets] == [(160, 4)] * 4


def test_native_costs_one_and_its_entropy_is_that_of_the_prediction(tiny_backbone, windows):
    profile = profile_points(tiny_backbone, *windows, [])
    probabilities = tiny_backbone(windows[0]).softmax(-1)
    assert profile.native.compute.mean() == pytest.approx(1.0)
    expected = -(probabilities * probabilities.log()).sum(-1).flatten()
    np.testing.assert_allclose(profile.native.entropy, expected, rtol=1e-4)


def test_passage_is_one_stretch_and_prices_are_passed_on(tiny_backbone, tiny_corpus):
    router = CountRouter(1)
    spec = SimpleNamespace(name="learned", setting={"price": 0.5}, router=router, price=0.5)
    spread, passage = profile_split(tiny_backbone, tiny_corpus.test, [spec], seq_len=16, max_tokens=64)
    assert router.prices == {0.5}
    assert spread.tokens.shape == (4, 16)
    np.testing.assert_array_equal(passage.tokens.ravel()[1:], passage.targets.ravel()[:-1])
    text = bytes(passage.tokens.ravel().tolist())
    assert text in bytes(tiny_corpus.test.tokens.tolist())


def seen(make_point, *settings):
    """Specs and their points from (router, compute, log-likelihood, seed)."""
    specs, points = [], []
    for name, compute, log_likelihood, seed in settings:
        specs.append(SimpleNamespace(name=name, compute=compute, seed=seed))
        points.append(replace(make_point(compute, log_likelihood, router=name), seed=seed))
    return specs, points


def shown(specs):
    return [(spec.name, spec.compute, spec.seed) for spec in specs]


def test_showcase_takes_the_learned_router_three_times_and_its_best_rival_once(make_point):
    ours = [("learned", compute, -1 / compute, seed) for seed in (3, 4) for compute in (0.3, 0.42, 0.55, 0.68, 0.9)]
    rivals = [
        ("good", 0.45, -1.1, None),
        ("good", 0.8, -1.0, None),
        ("bad", 0.5, -3.0, None),
        ("oracle", 0.2, -0.9, None),
        ("dear", 0.9, -0.95, None),
    ]
    specs, points = seen(make_point, *rivals, *ours)
    expected = [("learned", 0.68, 3), ("learned", 0.55, 3), ("learned", 0.42, 3), ("good", 0.45, None)]
    assert shown(showcase(specs, points, bounds={"oracle"})) == expected
    without = showcase(specs[:5], points[:5], bounds={"oracle"})
    assert shown(without) == [("good", 0.8, None), ("good", 0.45, None)]
    named = shown(showcase(specs, points, best="bad"))
    assert named == [*expected[:3], ("bad", 0.5, None)]
    assert showcase([], []) == []


def test_what_cannot_run_on_the_backbone_is_not_shown(make_point):
    specs, points = seen(make_point, ("smaller", 0.5, -0.5, None), ("plain", 0.5, -1.0, None))
    specs[0].score_on = lambda evaluator: None
    assert shown(showcase(specs, points)) == [("plain", 0.5, None)]


def test_nearest_is_never_a_setting_that_another_beats():
    assert nearest([(0.5, -2.0), (0.45, -1.0), (0.5, -1.0)], 0.5, lambda setting: setting) == (0.45, -1.0)


def test_usage_is_that_of_the_evaluator(evaluator, tiny_backbone, windows):
    usage = profile_routing(tiny_backbone, *windows, CountRouter(1), name="one", setting={}).usage
    np.testing.assert_array_equal(usage, evaluator.score("one", CountRouter(1), setting={}).usage)


def test_a_backbone_without_head_sites_is_profiled_too(tiny_backbone, windows):
    class ExpertsOnly:
        """The tiny backbone with all its heads always on: only its expert sites are routed."""

        sites = tuple(site for site in tiny_backbone.sites if site.kind == "experts")

        def run(self, tokens, router, price):
            heads = SimpleNamespace(select=lambda view: torch.ones_like(view.scores, dtype=torch.bool))
            mixed = SimpleNamespace(select=lambda v: (router if v.site.kind == "experts" else heads).select(v))
            logits, subsets = tiny_backbone.run(tokens, mixed, price)
            return logits, subsets[1::2]

    profile = profile_points(ExpertsOnly(), *windows, [SimpleNamespace(name="one", setting={}, router=CountRouter(1))])
    assert profile.native.compute == pytest.approx(1.0)
    assert profile.routings[0].compute == pytest.approx(0.5)

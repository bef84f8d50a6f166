from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation.profile import profile_points, profile_routing, profile_split
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

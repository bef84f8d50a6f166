from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation import Evaluator, Interval, score_all
from moe_backbone import NativeRouter, best_units, fixed_flops, token_log_likelihood


class CountRouter:
    """The best `count` units everywhere; optionally at a cost of its own."""

    def __init__(self, count, overhead_flops=0.0):
        self.count, self.overhead_flops = count, overhead_flops
        self.prices = set()

    def select(self, view):
        self.prices.update(view.price.tolist())
        return best_units(view.scores, self.count)


def test_native_is_the_unit_of_everything(evaluator):
    point = evaluator.score("native", NativeRouter(), setting={})
    assert point.compute == 1.0
    assert point.compute_total == 1.0
    assert point.router_overhead == 0.0
    assert point.accuracy_retained == 1.0
    assert point.delta_log_likelihood == Interval(mean=0.0, low=0.0, high=0.0)


def test_scores_are_those_of_the_backbone(evaluator, tiny_backbone, tiny_corpus):
    tokens, targets, documents = tiny_corpus.test.windows(16, 160)
    expected = token_log_likelihood(tiny_backbone(tokens), targets).double().numpy()
    sums = [expected[documents.numpy() == document].sum() for document in np.unique(documents)]
    np.testing.assert_allclose(evaluator.native.documents.log_likelihood, sums, rtol=1e-5)
    assert evaluator.native.documents.tokens.sum() == evaluator.num_tokens == 160
    assert evaluator.num_documents == len(sums)


def test_compute_by_hand(evaluator, tiny_config):
    point = evaluator.score("count", CountRouter(1), setting={"count": 1})
    heads = 4 * 32 * 8 + 4 * 8 * 8.5  # query and output, then scores and mix over 8.5 keys on average
    expert = 6 * 32 * 16
    native = 4 * heads + 2 * expert
    fixed = fixed_flops(tiny_config) / 2
    assert point.compute == pytest.approx((heads + expert) / native)
    assert point.compute_total == pytest.approx((fixed + heads + expert) / (fixed + native))
    assert point.units_per_token == (1.0,) * 4
    assert point.usage.sum(axis=1) == pytest.approx(1.0)


def test_compute_and_cache_where_keys_are_dropped_by_hand(tiny_backbone, tiny_corpus, tiny_config):
    """One head of four keeps a quarter of the bytes; as all tokens use the same head, it finds 8.5 keys on average."""
    tiny_backbone.head_meaning = "query_key_value"
    evaluator = Evaluator(tiny_backbone, tiny_corpus.test, max_tokens=160, batch_sequences=3)
    assert (evaluator.native.compute, evaluator.native.cache) == (1.0, 1.0)
    point = evaluator.score("count", CountRouter(1), setting={"count": 1})
    heads, expert = 8 * 32 * 8 + 4 * 8 * 8.5, 6 * 32 * 16
    native, fixed = 4 * heads + 2 * expert, fixed_flops(tiny_config, "query_key_value") / 2
    assert point.compute == pytest.approx((heads + expert) / native)
    assert point.compute_total == pytest.approx((fixed + heads + expert) / (fixed + native))
    assert point.cache == point.to_json()["cache"] == 0.25
    first_half = SimpleNamespace(select=lambda view: (torch.arange(len(view.features)) % 16 < 8).unsqueeze(1))
    some = SimpleNamespace(select=lambda view: first_half.select(view).expand(view.scores.shape))
    assert evaluator.score("some", some, setting={}).cache == 0.5


def test_cache_is_not_reported_where_no_key_is_dropped(evaluator):
    assert evaluator.native.cache is None
    assert "cache" not in evaluator.native.to_json()


def test_own_cost_of_a_router_shows(evaluator):
    free = evaluator.score("free", CountRouter(1), setting={})
    dear = evaluator.score("dear", CountRouter(1, overhead_flops=0.05 * evaluator._meter.native_flops), setting={})
    assert dear.router_overhead == pytest.approx(0.05)
    assert dear.compute == pytest.approx(free.compute + 0.05)
    assert free.compute_total < dear.compute_total < free.compute_total + 0.05
    assert dear.log_likelihood == free.log_likelihood


def test_balance_and_distinct_units(evaluator):
    first = SimpleNamespace(select=lambda view: torch.arange(4).expand(view.scores.shape) == 0)
    point = evaluator.score("first", first, setting={})
    assert point.distinct_units == 1.0
    assert point.balance.to_json() == pytest.approx(
        {"load_cv": 3**0.5, "max_vio": 3.0, "dead_units": 0.75, "diversity": 0.25, "busiest_load": 1.0}
    )
    everything = SimpleNamespace(select=lambda view: torch.ones_like(view.scores, dtype=torch.bool))
    assert evaluator.score("all", everything, setting={}).balance.load_cv == 0.0
    assert evaluator.score("all", everything, setting={}).distinct_units == 4.0


def test_routing_nothing_is_legal(evaluator):
    nothing = SimpleNamespace(select=lambda view: torch.zeros_like(view.scores, dtype=torch.bool))
    point = evaluator.score("nothing", nothing, setting={})
    assert (point.compute, point.balance.load_cv, point.distinct_units) == (0.0, 0.0, 0.0)


def test_reported_compute_is_the_rows_that_ran(evaluator, random_subsets, tiny_backbone, monkeypatch):
    evaluator.score("random", random_subsets, setting={})
    honest = tiny_backbone.run

    def lazy(tokens, router, price):
        logits, subsets = honest(tokens, router, price)
        return logits, [subset & (torch.arange(len(subset)) > 0).unsqueeze(1) for subset in subsets]

    monkeypatch.setattr(tiny_backbone, "run", lazy)
    with pytest.raises(AssertionError, match="rows run must equal the rows that the subsets ask for"):
        evaluator.score("random", random_subsets, setting={})


def test_backend_is_restored(evaluator, tiny_backbone):
    broken = SimpleNamespace(select=lambda view: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluator.score("broken", broken, setting={})
    assert tiny_backbone.backend == "auto"


def test_score_all_passes_price_and_seed(evaluator):
    cheap, dear = CountRouter(1), CountRouter(2)
    specs = [
        SimpleNamespace(name="plain", setting={"count": 1}, router=cheap),
        SimpleNamespace(name="learned", setting={"price": 0.5}, router=dear, price=0.5, seed=7),
    ]
    points = [scored.held_out for scored in score_all(specs, evaluator, evaluator)]
    assert [(point.router, point.setting, point.seed) for point in points] == [
        ("plain", {"count": 1}, None),
        ("learned", {"price": 0.5}, 7),
    ]
    assert (cheap.prices, dear.prices) == ({0.0}, {0.5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 15}, "max_tokens must be at least seq_len=16, got 15"),
        ({"batch_sequences": 0}, "batch_sequences must be at least 1, got 0"),
        ({"max_tokens": 16}, "split must hold at least 2 documents for intervals, got 1 in test"),
    ],
)
def test_impossible_sizes(tiny_backbone, tiny_corpus, arguments, message):
    with pytest.raises(ValueError, match=message):
        Evaluator(tiny_backbone, tiny_corpus.test, **arguments)

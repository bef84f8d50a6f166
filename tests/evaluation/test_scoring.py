from __future__ import annotations

from types import SimpleNamespace

import pytest

from evaluation import Evaluator, score_all
from moe_backbone import best_units


@pytest.fixture
def selection(tiny_backbone, tiny_corpus):
    return Evaluator(tiny_backbone, tiny_corpus.train, max_tokens=160)


def test_every_setting_is_scored_on_both_texts(selection, evaluator):
    prices = []

    def select(view):
        prices.append(view.price.unique().item())
        return best_units(view.scores, 1)

    router = SimpleNamespace(select=select)
    specs = [
        SimpleNamespace(name="plain", setting={"count": 1}, router=router),
        SimpleNamespace(name="drawn", setting={"count": 1, "seed": 4}, router=router),
        SimpleNamespace(name="learned", setting={"price": 0.5}, router=router, price=0.5, seed=7),
    ]
    scored = score_all(specs, selection, evaluator)
    assert [(point.router, point.seed) for point in scored] == [("plain", None), ("drawn", 4), ("learned", 7)]
    for point in scored:
        expected = [text.score("again", router, setting={}).log_likelihood for text in (selection, evaluator)]
        assert [point.selection.log_likelihood, point.held_out.log_likelihood] == expected
    assert set(prices) == {0.0, 0.5}


def test_spec_may_bring_its_own_score(selection, evaluator):
    asked = []

    def score_on(text):
        asked.append(text)
        return text.native

    spec = SimpleNamespace(name="small", setting={}, router=None, score_on=score_on)
    (scored,) = score_all([spec], selection, evaluator)
    assert asked == [selection, evaluator]
    assert (scored.selection, scored.held_out) == (selection.native, evaluator.native)

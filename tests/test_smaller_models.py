"""Smaller models are rows at their own compute, on the windows of the main backbone."""

from dataclasses import replace

import numpy as np
import pytest

from evaluation import Evaluator, Scored, compare
from moe_backbone import BackboneConfig, token_log_likelihood
from moe_backbone.pretrain import PretrainConfig, load_or_train
from smaller_models import relative_compute, score_smaller_model, smaller_models

PRETRAIN = PretrainConfig(steps=4, sequences=2, eval_every=2, seed=3)


def test_smaller_models_of_the_docstring():
    assert [model.setting for model in smaller_models(BackboneConfig())] == [
        {"top_k": 2},
        {"intermediate_size": 48},
        {"top_k": 1},
        {"intermediate_size": 24},
        {"num_heads": 6, "hidden_size": 96},
        {"num_heads": 4, "hidden_size": 64},
    ]


def test_what_cannot_shrink_is_left_out(tiny_config):
    smallest = replace(tiny_config, top_k=1, num_heads=1, hidden_size=8, intermediate_size=1)
    assert smaller_models(smallest) == []
    settings = [model.setting for model in smaller_models(replace(tiny_config, top_k=2))]
    assert settings.count({"top_k": 1}) == 1


def test_compute_worked_by_hand(tiny_config):
    """Heads cost 4 * (4 * 32 * 8 + 8.5 * 4 * 8) = 5184, two experts 2 * 6 * 32 * 16 = 6144; one saves half of these."""
    compute, total = relative_compute(replace(tiny_config, top_k=1), tiny_config)
    assert compute == pytest.approx((5184 + 3072) / (5184 + 6144))
    fixed = 4 * 32 * 32 + 2 * 32 * 4  # keys, values and gate of a layer
    head = 2 * 32 * 256
    assert total == pytest.approx((2 * (8256 + fixed) + head) / (2 * (11328 + fixed) + head))
    assert relative_compute(tiny_config, tiny_config) == (1.0, 1.0)


def test_compute_where_keys_are_dropped_worked_by_hand(tiny_config):
    """Keys and values of 2 * 32 * 32 FLOPs each move from the fixed part to the heads."""
    compute, total = relative_compute(replace(tiny_config, top_k=1), tiny_config, "query_key_value")
    assert compute == pytest.approx((5184 + 4096 + 3072) / (5184 + 4096 + 6144))
    assert total == relative_compute(replace(tiny_config, top_k=1), tiny_config)[1]


def test_cache_of_fewer_heads_is_a_share_of_the_main_one(tiny_config, tiny_corpus):
    main = load_or_train(tiny_corpus, tiny_config, PRETRAIN)
    main.head_meaning = "query_key_value"
    evaluator = Evaluator(main, tiny_corpus.test, max_tokens=160)
    shares = {}
    for model in smaller_models(tiny_config):
        point = score_smaller_model(model, evaluator, tiny_corpus, PRETRAIN)
        shares[model.setting.get("num_heads", 4)] = point.cache
        assert (point.compute, point.compute_total) == relative_compute(model.config, tiny_config, "query_key_value")
    assert shares == {4: 1.0, 3: 0.75, 2: 0.5}


@pytest.fixture
def scored(tiny_config, tiny_corpus):
    main = load_or_train(tiny_corpus, tiny_config, PRETRAIN)
    evaluator = Evaluator(main, tiny_corpus.test, max_tokens=160)
    return evaluator, [
        score_smaller_model(model, evaluator, tiny_corpus, PRETRAIN)
        for model in smaller_models(evaluator.backbone.config)
    ]


def test_points_are_the_models_own_loss_on_the_same_windows(scored, tiny_config, tiny_corpus, cache):
    evaluator, points = scored
    models = smaller_models(tiny_config)
    assert [point.setting for point in points] == [model.setting for model in models]
    tokens, targets, _ = tiny_corpus.test.windows(tiny_config.seq_len, 160)
    for point, model in zip(points, models, strict=True):
        backbone = load_or_train(tiny_corpus, model.config, PRETRAIN)
        expected = token_log_likelihood(backbone(tokens), targets).mean().item()
        assert point.log_likelihood == pytest.approx(expected, abs=1e-5)
        assert (point.compute, point.compute_total) == relative_compute(model.config, tiny_config)
        assert (point.router, point.seed, point.router_overhead) == ("smaller-native", 3, 0)
        assert point.delta_log_likelihood.mean == pytest.approx(point.log_likelihood - evaluator.native.log_likelihood)
        assert point.to_json()["setting"] == model.setting
    assert len(list(cache.glob("backbone-*.safetensors"))) == len(models) + 1


def test_points_stand_in_curves_beside_routers(scored):
    evaluator, points = scored
    assert all(np.array_equal(point.documents.tokens, evaluator.native.documents.tokens) for point in points)
    curves = {
        "learned": [[Scored.on_one_text(evaluator.native)]],
        "smaller-native": [[Scored.on_one_text(point) for point in points]],
    }
    rows = compare(curves, [1.0])
    assert {row.rival for row in rows} == {"smaller-native"}
    (row,) = [row for row in rows if row.quantity == "log_likelihood"]
    best = max(point.log_likelihood for point in points)
    assert row.gain.difference.mean == pytest.approx(evaluator.native.log_likelihood - best)

"""A budget becomes a price: what is measured, what lies between, and what is out of reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation import Evaluator
from moe_backbone import MoETransformer
from moe_backbone.corpus import Corpus
from policies.calibration import Calibration, calibrate, mean_compute
from policies.linear_router import LinearRouter, RouterSpec


@pytest.fixture
def router(tiny_backbone: MoETransformer) -> LinearRouter:
    """A dearer price turns every logit down."""
    made = LinearRouter(RouterSpec(hidden_size=32, sites=tiny_backbone.sites, compensation=True))
    with torch.no_grad():
        made.weight.normal_(std=0.3)
        made.price_weight[:, -1] = -4.0
    return made.requires_grad_(False)


def test_price_of_a_budget_in_hand_worked_numbers() -> None:
    calibration = Calibration((0.1, 0.4, 1.6), (0.8, 0.4, 0.2))
    assert calibration.price(0.6) == pytest.approx(0.2)
    assert calibration.price(0.4) == pytest.approx(0.4)
    assert calibration.price(1.0) == pytest.approx(0.1)


def test_noise_in_the_measured_computes_leaves_one_price_for_a_budget() -> None:
    """A price that buys more than a cheaper one is taken to buy as much as that."""
    assert Calibration((0.1, 0.2, 0.4), (0.6, 0.7, 0.3)).price(0.6) == pytest.approx(0.2)


def test_budget_below_the_highest_price_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cost_limit must be at least 0.400.* got 0.2"):
        Calibration((0.1, 0.4), (0.8, 0.4)).price(0.2)


def test_compute_is_what_the_evaluator_counts(
    router: LinearRouter, tiny_backbone: MoETransformer, tiny_corpus: Corpus
) -> None:
    priced = router.at_price(0.1)
    counted = Evaluator(tiny_backbone, tiny_corpus.test, max_tokens=512).score("learned", priced, setting={}).compute
    tokens = tiny_corpus.test.windows(16, 512)[0]
    assert mean_compute(priced, tiny_backbone, tokens) == pytest.approx(counted)


def test_router_meets_a_budget_on_the_text_that_it_was_calibrated_on(
    router: LinearRouter, tiny_backbone: MoETransformer, tiny_tokens: torch.Tensor
) -> None:
    router.calibration = calibrate(router, tiny_backbone, tiny_tokens, map(float, np.geomspace(0.01, 1.0, 60)))
    middle = float(np.mean(router.calibration.computes))
    assert mean_compute(router.at_cost_limit(middle), tiny_backbone, tiny_tokens) == pytest.approx(middle, rel=0.03)


def test_router_that_was_not_calibrated_says_so(router: LinearRouter) -> None:
    with pytest.raises(ValueError, match="router must be calibrated to follow a cost_limit, got one without"):
        router.at_cost_limit(0.5)

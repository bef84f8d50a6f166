"""Ordered units without repeats: probabilities, samples and gradient, held against all ordered subsets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from policies.plackett_luce import PlackettLuce, ranked_log_prob, sample_ranked

NUM_UNITS, COUNT = 5, 3
NUM_SAMPLES = 40_000
SIGMAS = 4.5
"""Of a binomial count: all 60 lie within it with a chance above 0.9995."""
LOGITS = torch.tensor([0.7, -1.2, 0.0, 1.5, -0.3])
ORDERS = torch.tensor(list(itertools.permutations(range(NUM_UNITS), COUNT)))


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Of every ordered subset."""
    return ranked_log_prob(logits.expand(len(ORDERS), NUM_UNITS), ORDERS)


def test_worked_example() -> None:
    """Chances (.5, .3, .2): first 0, then 1 of what is left."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert ranked_log_prob(logits, torch.tensor([[0, 1]])).item() == pytest.approx(math.log(0.3), abs=1e-6)
    assert ranked_log_prob(logits, torch.tensor([[2, 1]])).item() == pytest.approx(math.log(0.2 * 0.3 / 0.8), abs=1e-6)


def test_probabilities_of_all_ordered_subsets_sum_to_one() -> None:
    """Also where every unit is named."""
    assert _log_probs(LOGITS).exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    everyone = torch.tensor(list(itertools.permutations(range(NUM_UNITS))))
    total = ranked_log_prob(LOGITS.expand(len(everyone), NUM_UNITS), everyone).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-6)


def test_sampled_orders_come_as_often_as_their_probabilities_say() -> None:
    """Each of the 60 orders lies within a binomial bound."""
    drawn = sample_ranked(LOGITS.expand(NUM_SAMPLES, NUM_UNITS), COUNT)
    powers = torch.tensor([NUM_UNITS**2, NUM_UNITS, 1])
    counts = torch.bincount((drawn * powers).sum(1), minlength=NUM_UNITS**3)[(ORDERS * powers).sum(1)]
    assert counts.sum() == NUM_SAMPLES
    chances = _log_probs(LOGITS).exp()
    bound = SIGMAS * (NUM_SAMPLES * chances * (1 - chances)).sqrt()
    assert ((counts - NUM_SAMPLES * chances).abs() <= bound).all()


def test_score_function_gradient_is_unbiased() -> None:
    """E[value * grad log-probability] over all orders is the gradient of the expected value."""
    values = torch.randn(len(ORDERS))
    logits = LOGITS.clone().requires_grad_()
    (exact,) = torch.autograd.grad((_log_probs(logits).exp() * values).sum(), logits)
    log_probs = _log_probs(logits)
    (estimated,) = torch.autograd.grad((log_probs.exp().detach() * values * log_probs).sum(), logits)
    torch.testing.assert_close(estimated, exact)
    assert exact.abs().max() > 0.01
    (of_nothing,) = torch.autograd.grad(_log_probs(logits).exp().sum(), logits)
    torch.testing.assert_close(of_nothing, torch.zeros(NUM_UNITS), rtol=0, atol=1e-6)


def test_gradient_is_finite_where_every_unit_is_named() -> None:
    """The last unit is certain: nothing is left beside it."""
    logits = LOGITS[None].clone().requires_grad_()
    ranked_log_prob(logits, torch.tensor([[3, 0, 2, 4, 1]])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_minus_log_probability_of_samples_is_the_entropy_on_average() -> None:
    """What SB3 takes where a distribution has no entropy of its own."""
    distribution = PlackettLuce(COUNT).proba_distribution(LOGITS.expand(NUM_SAMPLES, NUM_UNITS))
    assert distribution.entropy() is None
    log_probs = _log_probs(LOGITS)
    entropy = -(log_probs.exp() * log_probs).sum()
    estimate = -distribution.log_prob(distribution.sample())
    assert estimate.mean().item() == pytest.approx(entropy.item(), abs=5 * estimate.std().item() / NUM_SAMPLES**0.5)


def test_mode_is_the_likeliest_order() -> None:
    """The greatest logits, greatest first."""
    mode = PlackettLuce(COUNT).proba_distribution(LOGITS[None]).mode()
    assert mode.tolist() == ORDERS[_log_probs(LOGITS).argmax()][None].tolist() == [[3, 0, 2]]

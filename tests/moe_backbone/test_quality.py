"""The formulas of quality, by hand."""

from __future__ import annotations

import math

import torch

from moe_backbone import token_correct, token_divergence, token_log_likelihood
from moe_backbone.quality import UNSCORED, credited, mean_scored

LOGITS = torch.tensor([[[0.9, 0.1], [0.25, 0.75]]]).log() + 3
"""Predictions (.9, .1) and (.25, .75), shifted as logits may be."""


def test_log_likelihood_is_that_of_the_target() -> None:
    """Nats, and whatever is added to all logits drops out."""
    values = token_log_likelihood(LOGITS, torch.tensor([[0, 0]]))
    torch.testing.assert_close(values, torch.tensor([[math.log(0.9), math.log(0.25)]]))


def test_correct_is_one_where_the_likeliest_token_is_the_target() -> None:
    """0 or 1 for each token."""
    assert token_correct(LOGITS, torch.tensor([[0, 0]])).tolist() == [[1.0, 0.0]]


def test_divergence_is_measured_from_the_reference() -> None:
    """KL((.9, .1) || (.25, .75)), zero for equal predictions, and not symmetric."""
    reference, logits = LOGITS[:, :1], LOGITS[:, 1:]
    expected = 0.9 * math.log(0.9 / 0.25) + 0.1 * math.log(0.1 / 0.75)
    torch.testing.assert_close(token_divergence(reference, logits), torch.tensor([[expected]]))
    torch.testing.assert_close(token_divergence(reference, reference - 5), torch.zeros(1, 1))
    assert not torch.isclose(token_divergence(logits, reference), torch.tensor([[expected]]))


def test_what_is_not_scored_counts_for_nothing() -> None:
    """Each formula gives 0 there, and means are over the rest."""
    targets = torch.tensor([[UNSCORED, 1]])
    assert token_log_likelihood(LOGITS, targets)[0, 0] == 0
    assert token_correct(LOGITS, targets).tolist() == [[0.0, 1.0]]
    assert token_divergence(LOGITS.flip(1), LOGITS, targets)[0].gt(0).tolist() == [False, True]
    assert mean_scored(torch.tensor([[0.0, 3.0]]), targets) == 3


def test_credit_goes_to_the_next_scored_token() -> None:
    """The worked example, and nothing behind the last one."""
    values, targets = torch.tensor([[0.0, 2, 0, 4, 0]]), torch.tensor([[UNSCORED, 7, UNSCORED, 7, UNSCORED]])
    assert credited(values, targets, "sequence").tolist() == [[3.0] * 5]
    assert credited(values, targets, "token").tolist() == [[2.0, 2, 4, 4, 0]]
    nothing = torch.full((1, 5), UNSCORED)
    assert credited(torch.zeros(1, 5), nothing, "token").tolist() == [[0.0] * 5]


def test_where_all_is_scored_nothing_changes() -> None:
    """To the bit: an ordinary corpus must not notice that tasks exist."""
    values, targets = torch.randn(3, 37), torch.randint(9, (3, 37))
    assert torch.equal(credited(values, targets, "token"), values)
    assert torch.equal(credited(values, targets, "sequence")[:, 0], values.mean(1))
    assert torch.equal(mean_scored(values, targets), values.mean())

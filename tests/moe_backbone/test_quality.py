"""The formulas of quality, by hand."""

from __future__ import annotations

import math

import torch

from moe_backbone import token_correct, token_divergence, token_log_likelihood

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

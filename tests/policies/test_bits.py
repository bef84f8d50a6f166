"""Independent bits: three numbers from one sigmoid, with gradients written by hand."""

from __future__ import annotations

import pytest
import torch

from policies.bits import bits_entropy, bits_log_prob, bits_terms

PULLS = {
    "log-probability": (1.0, 0.0, 0.0),
    "entropy": (0.0, 1.0, 0.0),
    "count": (0.0, 0.0, 1.0),
    "all": (0.7, -0.3, 2.0),
}


@pytest.mark.parametrize("pull", PULLS.values(), ids=PULLS)
def test_terms_and_gradients_are_those_of_the_formulas(pull: tuple[float, float, float]) -> None:
    """Also at logits so far out that a probability is 0 or 1; a term that nothing depends on has no say."""
    logits = torch.tensor([[0.3, -2.0, 40.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    bits = torch.tensor([[True, True, False], [False, True, True]])
    expected = bits_log_prob(logits, bits), bits_entropy(logits), logits.sigmoid().sum(-1)
    terms = bits_terms(logits, bits)
    for term, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(term, value)
    used = [(weight, mine, value) for weight, mine, value in zip(pull, terms, expected, strict=True) if weight]
    weights = torch.tensor([1.0, -2.0])
    (mine,) = torch.autograd.grad(sum((weight * term * weights).sum() for weight, term, _ in used), logits)
    (autograd,) = torch.autograd.grad(sum((weight * value * weights).sum() for weight, _, value in used), logits)
    torch.testing.assert_close(mine, autograd)
    assert mine.isfinite().all()
    assert mine.abs().max() > 0.1

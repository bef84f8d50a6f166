"""Mixing weights of the chosen experts, and the shared expert."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_backbone import BackboneConfig
from moe_backbone.experts import ExpertLayer, mixing_weights

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.2]])


@pytest.mark.parametrize(
    ("rule", "expected"), [("renormalize", [0.625, 0.375, 0.0]), ("keep", [0.5, 0.3, 0.0])], ids=["renormalize", "keep"]
)
def test_mixing_weights_of_two_experts(rule: str, expected: list[float]) -> None:
    """The docstring's example, with both rules."""
    weights = mixing_weights(PROBABILITIES.log(), torch.tensor([[True, True, False]]), rule)
    torch.testing.assert_close(weights, torch.tensor([expected]))


@pytest.mark.parametrize("rule", ["renormalize", "keep"])
def test_mixing_weights_of_no_expert_are_zero_and_have_finite_gradients(rule: str) -> None:
    """Zero by zero must not become NaN, forwards or backwards."""
    scores = PROBABILITIES.log().requires_grad_()
    weights = mixing_weights(scores, torch.zeros(1, 3, dtype=torch.bool), rule)
    weights.sum().backward()
    assert weights.eq(0).all()
    assert scores.grad is not None
    assert scores.grad.eq(0).all()


def test_renormalized_weights_sum_to_one_whatever_the_gate_thinks() -> None:
    """A chosen expert counts fully even where its probability underflows."""
    scores = torch.tensor([[0.0, -120.0, -120.0]]).log_softmax(1)
    weights = mixing_weights(scores, torch.tensor([[False, True, True]]), "renormalize")
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.5, 0.5]]))


def test_shared_expert_is_added_for_every_token() -> None:
    """Chosen or not, routed experts come on top of the shared SwiGLU expert."""
    config = BackboneConfig(hidden_size=32, num_heads=4, shared_intermediate_size=8)
    layer = ExpertLayer(config)
    features = torch.randn(2, 3, config.hidden_size)
    scores = layer.scores(features.flatten(0, 1))
    subset = torch.rand(scores.shape) < 0.5
    subset[0] = False
    update = layer(features, scores, subset)
    assert layer.shared is not None
    gate, up = layer.shared[0](features).split(8, dim=-1)
    shared = layer.shared[1](F.silu(gate) * up)
    layer.shared = None
    torch.testing.assert_close(update, layer(features, scores, subset) + shared)
    torch.testing.assert_close(update[0, 0], shared[0, 0])

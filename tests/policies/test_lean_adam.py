"""The flat step of Adam is torch's own, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.lean_adam import LeanAdam

MAX_NORM = 0.5


def _model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def _loss(model: torch.nn.Module, step: int) -> Tensor:
    inputs = torch.randn(11, 5, generator=torch.Generator().manual_seed(step))
    return model(inputs).square().sum()


def _own_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        _loss(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()


def _lean_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    lean = LeanAdam(optimizer, list(model.parameters()), MAX_NORM)
    for step in steps:
        lean.zero_grad()
        _loss(model, step).backward()
        lean.step()


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"eps": 1e-5}, {"weight_decay": 0.1}, {"amsgrad": True}], ids=["plain", "eps", "decay", "amsgrad"]
)
def test_steps_equal_those_of_torch(options: dict[str, Any]) -> None:
    """With options that the flat step does not know, torch's own is taken."""
    own = _model()
    lean = copy.deepcopy(own)
    _own_steps(own, torch.optim.Adam(own.parameters(), lr=0.05, **options), range(6))
    optimizer = torch.optim.Adam(lean.parameters(), lr=0.05, **options)
    _lean_steps(lean, optimizer, range(3))
    _lean_steps(lean, optimizer, range(3, 6))
    assert _same(own, lean)


def test_state_may_be_saved_and_torch_goes_on_with_it() -> None:
    """Weights and state after flat steps are those of torch, so either may take the next."""
    own = _model()
    lean = copy.deepcopy(own)
    _own_steps(own, torch.optim.Adam(own.parameters(), lr=0.05), range(6))
    optimizer = torch.optim.Adam(lean.parameters(), lr=0.05)
    _lean_steps(lean, optimizer, range(3))
    loaded = torch.optim.Adam(lean.parameters(), lr=0.05)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _own_steps(lean, loaded, range(3, 6))
    assert _same(own, lean)


def test_a_weight_without_gradient_stays() -> None:
    """As with torch, where a part of the model took no part in the loss."""
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    _lean_steps(model, optimizer, range(2))
    lean, before = LeanAdam(optimizer, list(model.parameters()), MAX_NORM), model[2].weight.clone()
    lean.zero_grad()
    model[0](torch.ones(1, 5)).sum().backward()
    lean.step()
    assert torch.equal(model[2].weight, before)


def test_weights_with_different_numbers_of_steps_are_left_to_torch() -> None:
    """A part that was frozen for a while has its own bias correction."""
    own = _model()
    lean = copy.deepcopy(own)
    for model, steps in ((own, _own_steps), (lean, _lean_steps)):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        model[0].requires_grad_(False)
        steps(model, optimizer, range(4))
        model[0].requires_grad_(True)
        steps(model, optimizer, range(4, 8))
    assert _same(own, lean)

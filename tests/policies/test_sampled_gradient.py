"""The sampled gradient, from rollout to loss, is the gradient of the expected return; every bug on that way is seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import FixedSource, RoutingMDP
from envs.planted import PLANTED_CONFIG, PLANTED_RULES, VOCAB
from moe_backbone import MoETransformer
from moe_backbone.attention import Attention
from policies import routing_ppo
from policies.bits import bits_log_prob
from policies.router_policy import RouterPolicy
from policies.routing_ppo import leave_one_out

UNITS = PLANTED_CONFIG.num_heads, PLANTED_CONFIG.num_experts
SEQ_LEN, NUM_SITES = PLANTED_CONFIG.seq_len, len(UNITS)
MANY_COPIES = 3000
"""Rollouts of one sequence: enough for the sampled gradient to lie within a few per cent of the exact one."""


def _joint_backbone() -> MoETransformer:
    """Random weights with strong heads: what the experts are worth, and what they see, depends on the heads."""
    backbone = MoETransformer(PLANTED_CONFIG).requires_grad_(False).eval()
    attention = backbone.attentions[0]
    assert isinstance(attention, Attention)
    attention.output.mul_(3.0)
    return backbone


def _subsets(units: int, lanes: int) -> list[Tensor]:
    """All subsets of a site, the same for all lanes: bool (lanes, max_units) each."""
    rows = [bits + (False,) * (max(UNITS) - units) for bits in itertools.product((False, True), repeat=units)]
    return [torch.tensor(row).expand(lanes, -1) for row in rows]


def _exact_gradient(model: Any, mdp: RoutingMDP) -> Tensor:
    """Of the mean return over the tokens of the one sequence, by trying all 64 joint subsets of the one layer."""
    assert isinstance(model.policy, RouterPolicy)
    batch = mdp.draw(np.random.default_rng(0))
    expected = torch.zeros(())
    for heads, experts in itertools.product(*(_subsets(units, SEQ_LEN) for units in UNITS)):
        observation, log_prob, total = mdp.begin(batch), torch.zeros(SEQ_LEN), torch.zeros(SEQ_LEN)
        for index, action in enumerate((heads, experts)):
            log_prob = log_prob + bits_log_prob(model.policy.step_logits(observation, index), action)
            step = mdp.step(action)
            observation, total = step.observation, total + step.reward
        expected = expected + (log_prob.exp() * total).mean()
    gradients = torch.autograd.grad(expected, list(model.router.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def check_sampled_gradient_is_exact(make_model: Callable[..., Any]) -> None:
    """From rollout to loss: direction and length of the gradient of the expected return, over the number of sites."""
    tokens = torch.arange(SEQ_LEN).unsqueeze(0) % VOCAB
    backbone, source = _joint_backbone(), FixedSource(tokens, (tokens + 3) % VOCAB)
    rules = replace(PLANTED_RULES, rollouts_per_sequence=MANY_COPIES, price_low=0.2, price_high=0.2)
    settings: dict[str, Any] = {"backbone": backbone, "source": source, "num_sequences": 1, "price_range": (0.05, 0.5)}
    model = make_model(rules, normalize_advantage=False, price_balance=0.0, **settings)
    for weight in model.router.parameters():
        weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(model._loss(model.collect())[0], list(model.router.parameters()))
    sampled = -NUM_SITES * torch.cat([gradient.flatten() for gradient in gradients])
    exact = _exact_gradient(model, RoutingMDP(backbone, source, replace(rules, rollouts_per_sequence=1)))
    assert torch.cosine_similarity(sampled, exact, dim=0) > 0.99
    assert abs(sampled.norm() / exact.norm() - 1) < 0.05


def test_sampled_gradient_is_the_exact_gradient(make_model: Callable[..., Any]) -> None:
    """Against enumeration, where the choice of heads changes what the choice of experts is worth."""
    check_sampled_gradient_is_exact(make_model)


def _only_own_reward(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    """Credit without what comes after: the heads are never told what their choice was worth at the end."""
    return torch.cat([leave_one_out(row.unsqueeze(0), copies, seq_len) for row in rewards])


def _return_so_far(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    return leave_one_out(rewards.flip(0), copies, seq_len).flip(0)


GRADIENT_BUGS: dict[str, tuple[Any, str, Any]] = {
    "argmax": (torch, "rand_like", lambda logits: torch.full_like(logits, 0.5)),
    "opposite bits": (routing_ppo, "bits_log_prob", lambda logits, bits: bits_log_prob(logits, ~bits)),
    "sign": (routing_ppo, "leave_one_out", lambda *args: -leave_one_out(*args)),
    "reward only": (routing_ppo, "leave_one_out", _only_own_reward),
    "return so far": (routing_ppo, "leave_one_out", _return_so_far),
    "other lane": (routing_ppo, "leave_one_out", lambda *args: leave_one_out(*args).roll(1, 1)),
    "no cost": (RoutingMDP, "unit_price", property(lambda mdp: torch.zeros_like(mdp.state.price))),
    "half": (routing_ppo, "leave_one_out", lambda *args: leave_one_out(*args) / 2),
}


@pytest.mark.parametrize("bug", GRADIENT_BUGS)
def test_a_wrong_gradient_is_seen(make_model: Callable[..., Any], bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted one at a time, between the sampling and the loss."""
    monkeypatch.setattr(*GRADIENT_BUGS[bug])
    with pytest.raises(AssertionError):
        check_sampled_gradient_is_exact(make_model)

"""A price on uneven loads: as an expectation in PPO's loss and return, and in the gates'; it evens the loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from envs import EnvConfig, RoutingMDP
from envs.planted import PLANTED_CONFIG, PLANTED_RULES, PlantedSource
from moe_backbone import MoETransformer
from moe_backbone.loads import LoadPrices
from policies.callbacks import load_metrics
from policies.gating import GateTrainer, GatingConfig
from policies.linear_router import LinearRouter, RouterSpec
from policies.routing_ppo import expected_cost, leave_one_out

PRICED = replace(PLANTED_RULES, balance_price=0.3)
UPDATES = 25


def test_expected_cost_by_hand() -> None:
    """One price for all units of a lane, or one for each."""
    chance = torch.tensor([[0.5, 1.0]])
    assert expected_cost(torch.tensor([2.0]), chance).tolist() == [3.0]
    assert expected_cost(torch.tensor([[2.0, -1.0]]), chance).tolist() == [0.0]


def test_own_balance_is_a_differentiable_term_of_the_loss(make_model: Callable[..., Any]) -> None:
    """Without advantages the gradient is that of the expected price of the units, the loads as drawn."""
    model = make_model(PRICED, normalize_advantage=False)
    episode = model.collect()
    assert episode.unit_price.shape == episode.actions.shape
    episode = episode._replace(advantages=torch.zeros_like(episode.advantages))
    (gradient,) = torch.autograd.grad(model._loss(episode)[0], model.router.weight)
    chance = model.site_logits(episode).sigmoid()
    expected = (episode.weight.unsqueeze(2) * episode.unit_price * chance).sum(2).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.router.weight)[0])
    free = make_model(normalize_advantage=False)
    other = episode._replace(unit_price=free.collect().unit_price)
    (without,) = torch.autograd.grad(free._loss(other)[0], free.router.weight)
    assert (gradient - without).abs().max() > 1e-3


def test_later_balance_is_expected_in_the_return(make_model: Callable[..., Any]) -> None:
    """Same draws: the heads' advantage differs by what the experts are expected to cost, that of the experts by 0."""
    priced, free = make_model(PRICED).collect(), make_model().collect()
    assert torch.equal(priced.actions, free.actions)
    chance = make_model(PRICED).site_logits(priced).sigmoid().detach()[1]
    surcharge = (priced.unit_price - free.unit_price.unsqueeze(2))[1]
    later = torch.stack((-(surcharge * chance).sum(1), torch.zeros(surcharge.shape[0])))
    copies, seq_len = PRICED.rollouts_per_sequence, PLANTED_CONFIG.seq_len
    expected = free.advantages + leave_one_out(later, copies, seq_len)
    torch.testing.assert_close(priced.advantages, expected, rtol=1e-4, atol=1e-5)


def _load_cv(mdp: RoutingMDP, router: LinearRouter) -> float:
    """Of the decisions without chance."""
    batch = mdp.draw(np.random.default_rng(1))
    _, subsets = mdp.backbone.run(batch.tokens, router, batch.price.repeat_interleave(mdp.source.seq_len))
    return load_metrics(tuple(mdp.backbone.sites), subsets)["routing/load_cv"].item()


def test_ppo_evens_the_loads(make_model: Callable[..., Any]) -> None:
    """The same random backbone, text and seed, with a dear balance and with none."""
    spread = {}
    for price in (0.0, 2.0):
        torch.manual_seed(0)
        backbone = MoETransformer(PLANTED_CONFIG).requires_grad_(False).eval()
        model = make_model(replace(PLANTED_RULES, balance_price=price), backbone=backbone, learning_rate=0.03)
        for _ in range(UPDATES):
            model.one_update()
        spread[price] = _load_cv(model.env.mdp, model.router)
    assert spread[2.0] < 0.7 * spread[0.0]


@pytest.mark.parametrize("relaxation", ["straight_through", "hard_concrete"])
def test_gates_even_the_loads(relaxation: Any) -> None:
    """The same by back-propagation; without a price nothing changes to the bit."""
    spread, weights = {}, {}
    for price in (None, 0.0, 2.0):
        torch.manual_seed(0)
        backbone = MoETransformer(PLANTED_CONFIG).requires_grad_(False).eval()
        mdp = RoutingMDP(backbone, PlantedSource(), EnvConfig(price_low=0.1, price_high=0.1), num_sequences=4)
        generator = np.random.default_rng(0)
        spec = RouterSpec(hidden_size=32, sites=backbone.sites, price_low=0.1, price_high=0.1)
        settings = GatingConfig(steps=60, learning_rate=0.03, relaxation=relaxation)
        given = {} if price is None else {"load_prices": LoadPrices(balance=price)}
        trainer = GateTrainer(LinearRouter(spec), backbone, lambda: mdp.draw(generator), settings, **given)  # noqa: B023
        assert trainer.run(progress=False)
        spread[price], weights[price] = _load_cv(mdp, trainer.router), trainer.router.weight.detach()
    assert torch.equal(weights[None], weights[0.0])
    assert spread[2.0] < 0.7 * spread[0.0]

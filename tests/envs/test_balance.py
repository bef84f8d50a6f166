"""What an uneven load of the experts costs, by hand, and where it enters the reward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import EnvConfig, RoutingMDP, TokenSource
from envs.reward import step_reward
from moe_backbone import MoETransformer
from moe_backbone.compute import load_excess

PRICE, NUM_SEQUENCES = 0.3, 2


def _mdp(backbone: MoETransformer, source: TokenSource, **rules: float) -> RoutingMDP:
    mdp = RoutingMDP(backbone, source, EnvConfig(**rules), num_sequences=NUM_SEQUENCES)  # type: ignore[arg-type]
    mdp.reset(np.random.default_rng(0))
    return mdp


def _actions(mdp: RoutingMDP) -> Tensor:
    """One for each site, bool (num_sites, num_lanes, max_units); low units are likelier."""
    chance = torch.linspace(0.9, 0.2, mdp.layout.max_units)
    return torch.rand(len(mdp.backbone.sites), mdp.num_lanes, mdp.layout.max_units) < chance


def test_excess_by_hand() -> None:
    """Loads 3 and 1 of four tokens: .5 and -.5, and a mean of .25, the square of deviation 1 over mean 2."""
    use = torch.tensor([[True, False], [True, False], [True, False], [False, True]])
    excess = load_excess(use, 1)
    assert excess.tolist() == [0.5, -0.5]
    assert (use.float() @ excess).mean() == 0.25
    assert load_excess(use, 2).tolist() == [0.25, -0.25]


def test_an_even_load_and_no_load_cost_nothing() -> None:
    """Even or empty; and what is differentiated is the use, never the load."""
    assert load_excess(torch.eye(4), 1).tolist() == [0.0] * 4
    assert load_excess(torch.zeros(3, 4, dtype=torch.bool), 2).tolist() == [0.0] * 4
    assert not load_excess(torch.rand(3, 4).requires_grad_(), 1).requires_grad


def test_step_reward_by_hand() -> None:
    """The balance comes off, with and without a quality."""
    price, compute, balance = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 0.125]), torch.tensor([1.0, -0.5])
    assert step_reward(price, compute, None, balance).tolist() == [-1.125, 0.25]
    assert step_reward(price, compute, torch.tensor([1.0, -1.0]), balance).tolist() == [-0.125, -0.75]


def test_mean_is_the_squared_variation_of_the_loads(backbone: MoETransformer, source: TokenSource) -> None:
    """Price times mean units over native ones times CV**2, at expert sites only; observation and cost stay."""
    priced, free = _mdp(backbone, source, balance_price=PRICE), _mdp(backbone, source)
    for site, action in zip(backbone.sites, _actions(priced), strict=True):
        step, plain = priced.step(action), free.step(action)
        assert plain.balance is None
        assert step.balance is not None
        load = action[:, : site.num_units].double().sum(0)
        spread = (load.std(correction=0) / load.mean()) ** 2 * load.sum() / priced.num_lanes / site.native_units
        expected = PRICE * spread.item() if site.kind == "experts" else 0.0
        assert step.balance.mean().item() == pytest.approx(expected, abs=1e-6)
        assert expected > 0.01 or site.kind == "heads"
        assert torch.equal(step.observation, plain.observation)
        assert torch.equal(step.cost, plain.cost)
        torch.testing.assert_close(step.reward, plain.reward - step.balance)


def test_a_lane_pays_for_the_units_it_uses(backbone: MoETransformer, source: TokenSource) -> None:
    """Lanes with the same subset pay the same, one without any nothing; a rare expert makes its user's bill smaller."""
    mdp = _mdp(backbone, source, balance_price=PRICE)
    mdp.step(_actions(mdp)[0])
    action = torch.zeros(mdp.num_lanes, 4, dtype=torch.bool)
    action[1:, 0] = True
    action[1, 1] = True
    balance = mdp.step(action).balance
    assert balance is not None
    assert balance[0] == 0
    assert (balance[2:] == balance[2]).all()
    share = (mdp.num_lanes - 1) / mdp.num_lanes
    assert balance[2].item() == pytest.approx(PRICE * (4 * share - 1) / 2)
    assert balance[1].item() == pytest.approx(PRICE * (4 * share - 1 + 4 * (1 - share) - 1) / 2)


def test_unit_prices_are_what_the_chosen_units_cost(backbone: MoETransformer, source: TokenSource) -> None:
    """Summed over the chosen units they are what the step takes off the reward; units that do not exist are free."""
    mdp = _mdp(backbone, source, balance_price=PRICE)
    assert mdp.prices_follow_draws
    assert not _mdp(backbone, source).prices_follow_draws
    for site, action in zip(backbone.sites, _actions(mdp), strict=True):
        prices = mdp.unit_prices(action)
        assert prices.shape == action.shape
        assert (prices[:, site.num_units :] == 0).all()
        step = mdp.step(action)
        torch.testing.assert_close(step.reward - step.quality, -(prices * action).sum(1), rtol=1e-5, atol=1e-6)

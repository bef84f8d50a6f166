"""The multiplier moves prices until episodes cost what the budget allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from stable_baselines3.common.logger import configure

from policies.cost_limit import SPREAD, CostLimit


def learn(model: Any, callback: CostLimit, updates: int) -> None:
    steps = updates * model.env.num_envs * model.env.num_sites
    model.learn(steps, callback=callback)


def test_one_step_of_dual_ascent_in_hand_worked_numbers(make_model: Callable[..., Any]) -> None:
    """All units of the planted problem cost 1: twice the budget of 0.5, so the price rises by e ** (2 * 0.5)."""
    model = make_model()
    model.set_logger(configure(None, []))
    callback = CostLimit(0.5, lagrangian_multiplier_init=0.1, lambda_lr=2.0)
    callback.init_callback(model)
    callback._on_training_start()
    assert model.env.mdp.price_range == (0.1 / SPREAD, 0.1 * SPREAD)
    callback._cost = lambda: 1.0
    callback._on_rollout_end()
    assert model.lagrangian_multiplier == pytest.approx(0.1 * 2.718281828)
    assert model.env.mdp.price_range[1] == pytest.approx(0.1 * 2.718281828 * SPREAD)


def test_training_meets_the_budget(make_model: Callable[..., Any]) -> None:
    model = make_model(price_range=(0.001, 10.0))
    callback = CostLimit(0.5, lagrangian_multiplier_init=0.01, lambda_lr=0.5)
    learn(model, callback, 150)
    costs = []
    for _ in range(10):
        model.collect()
        costs.append(callback._cost())
    assert sum(costs) / len(costs) == pytest.approx(0.5, abs=0.1)


def test_multiplier_goes_on_where_it_was(make_model: Callable[..., Any]) -> None:
    """A resumed model brings its multiplier along."""
    model = make_model()
    model.lagrangian_multiplier = 0.7
    callback = CostLimit(0.5, lagrangian_multiplier_init=0.1)
    callback.init_callback(model)
    callback._on_training_start()
    assert model.env.mdp.price_range[0] == pytest.approx(0.7 / SPREAD)


def test_budget_below_the_routers_own_cost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cost_limit must lie above the router's own 0\.018, got 0\.01"):
        CostLimit(0.01, lagrangian_multiplier_init=0.1, overhead=0.018)

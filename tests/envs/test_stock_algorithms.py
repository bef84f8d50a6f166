"""Stable-Baselines3's own algorithms train on the doors as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy

from envs import EnvConfig, RoutingEnv, RoutingVecEnv

SEED = 3
NUM_SITES, LANES = 4, 16


def _weights(model: BaseAlgorithm) -> list[torch.Tensor]:
    return [weight.clone() for weight in model.policy.state_dict().values()]


ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], Literal["subset", "count"], dict[str, Any]]] = {
    "ppo": (PPO, "subset", {"n_steps": NUM_SITES, "batch_size": NUM_SITES, "n_epochs": 1}),
    "a2c": (A2C, "subset", {"n_steps": NUM_SITES}),
    "dqn": (DQN, "count", {"learning_starts": LANES, "batch_size": LANES, "train_freq": 1, "buffer_size": 256}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("door", ["sb3", "single"])
def test_stock_algorithms_train_unmodified(
    make_env: Callable[..., RoutingEnv], make_sb3: Callable[..., RoutingVecEnv], name: str, door: str
) -> None:
    """SB3's own algorithms with their own networks learn from both doors: finite weights that moved."""
    algorithm, action, settings = ALGORITHMS[name]
    config = EnvConfig(action=action)
    env = make_sb3(config) if door == "sb3" else make_env(config)
    model = algorithm("MlpPolicy", env, seed=SEED, policy_kwargs={"net_arch": [8]}, **settings)
    before = _weights(model)
    model.learn(4 * NUM_SITES * LANES if door == "sb3" else 12 * NUM_SITES)
    after = _weights(model)
    assert all(weight.isfinite().all() for weight in after)
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert {episode["l"] for episode in model.ep_info_buffer or []} == {NUM_SITES}


def test_sb3_evaluates_a_policy_on_the_vector_door(make_sb3: Callable[..., RoutingVecEnv]) -> None:
    """`evaluate_policy` sees every lane's episode end after all sites."""
    env = make_sb3()
    model = PPO("MlpPolicy", env, n_steps=NUM_SITES, batch_size=LANES, policy_kwargs={"net_arch": [8]})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Evaluation environment is not wrapped with a ``Monitor`` wrapper")
        returns, lengths = evaluate_policy(model, env, n_eval_episodes=LANES, return_episode_rewards=True)
    assert lengths == [NUM_SITES] * LANES
    assert np.isfinite(returns).all()

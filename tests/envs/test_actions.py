"""What an action means, what it costs and what it earns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction

from envs import EnvConfig, RoutingEnv, RoutingVectorEnv

SEED = 3
NUM_SITES, MAX_UNITS, LANES = 4, 4, 16
CODECS: tuple[Literal["subset", "count"], ...] = ("subset", "count")


def _drawn_actions(space: gym.Space[Any], steps: int) -> list[Any]:
    space.seed(SEED)
    return [space.sample() for _ in range(steps)]


def test_units_beyond_the_sites_own_are_ignored(make_env: Callable[..., RoutingEnv]) -> None:
    """Bits 2 and 3 mean nothing at a site of two heads: same observation, reward and cost."""
    outcomes = []
    for spare in (0, 1):
        env = make_env()
        env.reset(seed=SEED)
        observation, reward, _, _, info = env.step(np.array([1, 0, spare, spare], dtype=np.int8))
        outcomes.append((observation.tolist(), reward, info["cost"]))
    assert outcomes[0] == outcomes[1]


def test_counts_beyond_the_sites_own_mean_all_of_them(make_env: Callable[..., RoutingEnv]) -> None:
    """Four of two heads are two heads."""
    costs = []
    for count in range(MAX_UNITS + 1):
        env = make_env(EnvConfig(action="count"))
        env.reset(seed=SEED)
        costs.append(env.step(count)[4]["cost"])
    np.testing.assert_allclose(np.array(costs) / costs[1], [0, 1, 2, 2, 2], rtol=1e-6)


def test_ranked_units_run_in_any_order_and_small_sites_run_whole(make_env: Callable[..., RoutingEnv]) -> None:
    """Units 3 and 1 of four experts; both of two heads whatever the action says; one unit names one head."""
    for order in ([3, 1], [1, 3]):
        env = make_env(EnvConfig(action="ranked"))
        env.reset(seed=SEED)
        env.step(order)
        env.step(order)
        assert [subset.tolist() for subset in env.mdp.subsets] == [[[True, True]], [[False, True, False, True]]]
    env = make_env(EnvConfig(action="ranked", ranked_units=1))
    env.reset(seed=SEED)
    for unit, chosen in ((1, [False, True]), (2, [False, False, True, False])):
        env.step([unit])
        assert env.mdp.subsets[-1].tolist() == [chosen]


def test_ranked_units_that_repeat_are_refused(
    make_env: Callable[..., RoutingEnv], make_vector: Callable[..., RoutingVectorEnv], make_sb3: Callable[..., Any]
) -> None:
    """At every door, whatever the site; so are units that there are not."""
    single, vector, sb3 = (make(EnvConfig(action="ranked")) for make in (make_env, make_vector, make_sb3))
    for env in (single, vector):
        env.reset(seed=SEED)
    sb3.reset()
    actions = np.tile([0, 1], (LANES, 1))
    actions[5] = 2
    for step in (lambda: single.step([2, 2]), lambda: vector.step(actions), lambda: sb3.step(actions)):
        with pytest.raises(InvalidAction, match=r"action must name different units in each lane, got \[2 2\]"):
            step()
    with pytest.raises(InvalidAction, match=r"action must hold whole numbers in \[0, 3\]"):
        single.step([0, 4])
    with pytest.raises(InvalidAction, match=r"action must have shape \(1, 2\), got \(1, 3\)"):
        single.step([0, 1, 2])


def test_more_ranked_units_than_there_are_is_refused(make_env: Callable[..., RoutingEnv]) -> None:
    """The largest site has four."""
    assert make_env(EnvConfig(action="ranked", ranked_units=4)).action_space.shape == (4,)
    with pytest.raises(ValueError, match="ranked_units must be at most max_units=4, got 5"):
        make_env(EnvConfig(action="ranked", ranked_units=5))


@pytest.mark.parametrize("action", CODECS)
def test_empty_subset_costs_nothing_and_passes_the_token_on(
    make_env: Callable[..., RoutingEnv], action: Literal["subset", "count"]
) -> None:
    """Nothing runs anywhere: no cost, no reward but the quality lost, and the residual stream is the embedding."""
    env = make_env(EnvConfig(action=action))
    env.reset(seed=SEED)
    embedded = env.mdp.state.hidden.clone()
    nothing: Any = np.zeros(MAX_UNITS, dtype=np.int8) if action == "subset" else 0
    steps = [env.step(nothing) for _ in range(NUM_SITES)]
    assert [step[4]["cost"] for step in steps] == [0.0] * NUM_SITES
    assert [step[1] for step in steps[:-1]] == [0.0] * (NUM_SITES - 1)
    assert steps[-1][1] == steps[-1][4]["quality"] < 0
    assert torch.equal(env.mdp.state.hidden, embedded)


@pytest.mark.parametrize("action", CODECS)
def test_reward_is_the_weighted_vector_reward(
    make_env: Callable[..., RoutingEnv],
    make_vector: Callable[..., RoutingVectorEnv],
    action: Literal["subset", "count"],
) -> None:
    """`vector_reward @ reward_weights`, with quality and minus cost in it, at every step of both doors."""
    env, vector = make_env(EnvConfig(action=action)), make_vector(EnvConfig(action=action))
    env.reset(seed=SEED)
    vector.reset(seed=SEED)
    for single_action, actions in zip(
        _drawn_actions(env.action_space, NUM_SITES), _drawn_actions(vector.action_space, NUM_SITES), strict=True
    ):
        _, reward, _, _, info = env.step(single_action)
        assert reward == pytest.approx(info["vector_reward"] @ info["reward_weights"], abs=1e-6)
        assert info["vector_reward"].tolist() == [info["quality"], -info["cost"]]
        assert info["reward_weights"].tolist() == [1.0, info["price"]]
        _, rewards, terminated, _, infos = vector.step(actions)
        infos = infos["final_info"] if terminated.all() else infos
        expected = (infos["vector_reward"] * infos["reward_weights"]).sum(1)
        np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-6)
        assert infos["cost"].shape == (LANES,)

"""Stock DQN with a linear value network finds how many units to run, and its router does what it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3 import DQN

from envs import RoutingVecEnv
from envs.planted import PLANTED_CONFIG, PLANTED_RULES, PlantedSource, planted_backbone
from policies.count_values import CountQPolicy, value_spec

RULES = replace(PLANTED_RULES, action="count", rollouts_per_sequence=1)
LANES, NUM_SITES, HELD_OUT_SEED = 16 * PLANTED_CONFIG.seq_len, 2, 99


def _env(seed: int) -> RoutingVecEnv:
    return RoutingVecEnv(LANES, planted_backbone(), PlantedSource(), RULES, seed=seed)


def _model(env: RoutingVecEnv) -> DQN:
    spec = value_spec(PLANTED_CONFIG.hidden_size, env.mdp.backbone.sites)
    return DQN(
        CountQPolicy,
        env,
        learning_rate=0.03,
        buffer_size=20 * NUM_SITES * LANES,
        learning_starts=LANES * NUM_SITES,
        batch_size=256,
        gamma=1.0,
        train_freq=NUM_SITES,
        gradient_steps=8,
        target_update_interval=NUM_SITES * LANES,
        policy_kwargs={"count_spec": spec.to_json()},
        seed=0,
        device="cpu",
    )


def _greedy_return(model: DQN) -> float:
    env = _env(HELD_OUT_SEED)
    observation, total = env.reset(), 0.0
    for _ in range(NUM_SITES):
        observation, reward, *_ = env.step(model.predict(observation, deterministic=True)[0])
        total += float(reward.mean())
    return total


def _best_fixed_return() -> float:
    """Of all pairs of a count of heads and a count of experts, the same for every token."""
    best = -torch.inf
    for heads in range(3):
        for experts in range(5):
            env = _env(HELD_OUT_SEED)
            env.reset_tensor()
            steps = [env.step_tensor(torch.full((LANES,), count)) for count in (heads, experts)]
            best = max(best, sum(float(step.reward.mean()) for step in steps))
    return best


def test_dqn_finds_the_best_counts(tmp_path: Path) -> None:
    """From native ones, on held-out tokens; and a saved model acts as before. Here the best are none for all."""
    model = _model(_env(seed=0))
    best = _best_fixed_return()
    assert _greedy_return(model) < 0 < best
    model.learn(40 * NUM_SITES * LANES)
    learned = _greedy_return(model)
    assert learned > 0.95 * best
    model.save(tmp_path / "dqn.zip")
    assert _greedy_return(DQN.load(tmp_path / "dqn.zip", device="cpu")) == learned


def test_router_runs_what_the_greedy_policy_runs() -> None:
    """Folded to the environment's price, site by site."""
    env = _env(seed=0)
    model = _model(env)
    policy = model.policy
    assert isinstance(policy, CountQPolicy)
    for weight in policy.router.parameters():
        torch.nn.init.normal_(weight)
    router = policy.router.at_price(RULES.price_low)
    observation = env.reset()
    for _ in range(NUM_SITES):
        chosen = router.select(env.mdp.backbone.observe(env.mdp.state))
        counts = model.predict(observation, deterministic=True)[0]
        ran = env.mdp.decode(torch.from_numpy(counts))
        observation, *_ = env.step(counts)
        assert torch.equal(chosen, ran)
        assert 0 < ran.float().mean() < 1


def test_counts_beyond_the_sites_own_are_worth_all_of_them() -> None:
    """Three and four of two heads run two; at the experts' site all four counts are their own."""
    env = _env(seed=0)
    policy = _model(env).policy
    assert isinstance(policy, CountQPolicy)
    torch.nn.init.normal_(policy.router.weight)
    values = policy.q_net(env.reset_tensor())
    assert torch.equal(values[:, 2:3].expand(-1, 2), values[:, 3:])
    values = policy.q_net(env.step_tensor(torch.zeros(LANES, dtype=torch.int64)).observation)
    assert (values.diff(dim=1) != 0).all()
    assert policy.q_net(env.reset_tensor()).grad_fn is not None


def test_native_counts_are_worth_most_before_learning() -> None:
    """Two heads, then one expert; others lose in proportion to how far they are from it, in both networks."""
    env = _env(seed=0)
    model = _model(env)
    observation = torch.from_numpy(env.reset())
    with torch.no_grad():
        values = model.q_net(observation)[0]
        assert values.tolist() == pytest.approx([-0.04, -0.02, 0, 0, 0])
        assert torch.equal(model.q_net_target(observation)[0], values)
        observation = torch.from_numpy(env.step(np.full(LANES, 2))[0])
        assert model.q_net(observation)[0].tolist() == pytest.approx([-0.02, 0, -0.02, -0.04, -0.06])

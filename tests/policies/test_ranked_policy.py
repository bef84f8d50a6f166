"""On a problem whose best routing is known, stock and own algorithms learn which two experts to run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from envs import RoutingVecEnv
from envs.planted import PLANTED_CONFIG, PLANTED_RULES, PlantedSource, planted_backbone
from policies.linear_router import RouterSpec
from policies.ranked_policy import RankedRouterPolicy
from policies.routing_ppo import RoutingPPO

RULES = replace(PLANTED_RULES, action="ranked", rollouts_per_sequence=1)
NUM_SEQUENCES, NUM_SITES, HELD_OUT_SEED = 16, 2, 99
LANES = NUM_SEQUENCES * PLANTED_CONFIG.seq_len
PPO_SETTINGS: dict[str, Any] = {"learning_rate": 0.03, "batch_size": LANES, "n_epochs": 3}
ALGORITHMS: dict[str, tuple[type[OnPolicyAlgorithm], dict[str, Any], int]] = {
    "own ppo": (RoutingPPO, {"advantage": "gae", **PPO_SETTINGS}, 40),
    "stock ppo": (PPO, PPO_SETTINGS, 40),
    "a2c": (A2C, {"learning_rate": 0.03, "normalize_advantage": True}, 80),
}


def _env(seed: int, ranked_units: int = 2) -> RoutingVecEnv:
    rules = replace(RULES, ranked_units=ranked_units)
    return RoutingVecEnv(LANES, planted_backbone(), PlantedSource(), rules, seed=seed)


def _kwargs(env: RoutingVecEnv) -> dict[str, Any]:
    price = RULES.price_low
    spec = RouterSpec(hidden_size=32, sites=env.mdp.backbone.sites, price_low=price, price_high=price)
    return {"router_spec": spec.to_json()}


def _held_out_share(model: OnPolicyAlgorithm, deterministic: bool) -> float:
    """Share of held-out tokens whose right expert is among the two chosen."""
    env = _env(HELD_OUT_SEED)
    observation = env.reset()
    env.step(model.predict(observation, deterministic=deterministic)[0])
    right = env.mdp.batch.tokens.flatten() % 4
    subset = env.mdp.decode(torch.from_numpy(model.predict(env.mdp.begin(env.mdp.batch).numpy())[0]))
    assert subset.all()  # two heads
    observation = env.mdp.step(torch.zeros(LANES, 2, dtype=torch.int64)).observation.numpy()
    chosen = torch.from_numpy(model.predict(observation, deterministic=deterministic)[0])
    assert (chosen[:, 0] != chosen[:, 1]).all()
    return float((chosen == right.unsqueeze(1)).any(1).float().mean())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_learn_which_units_are_right(name: str) -> None:
    """Half of the pairs hold the right expert by chance, nearly all after learning."""
    algorithm, settings, updates = ALGORITHMS[name]
    env = _env(seed=0)
    settings = {"n_steps": NUM_SITES, "gamma": 1.0, "seed": 0, "device": "cpu"} | settings
    model = algorithm(RankedRouterPolicy, env, policy_kwargs=_kwargs(env), **settings)
    before = _held_out_share(model, deterministic=False)
    assert before < 0.65
    model.learn(updates * LANES * NUM_SITES)
    assert _held_out_share(model, deterministic=True) > 0.95


def test_a_site_that_runs_all_its_units_learns_nothing() -> None:
    """Two units of two heads: level logits and no gradient, so that no noise comes from there."""
    env = _env(seed=0)
    model = A2C(RankedRouterPolicy, env, n_steps=NUM_SITES, policy_kwargs=_kwargs(env), device="cpu")
    policy = model.policy
    assert isinstance(policy, RankedRouterPolicy)
    observation = env.reset_tensor()
    actions, _, log_prob = policy(observation)
    log_prob.sum().backward()
    assert policy.router.weight.grad is not None
    assert not policy.router.weight.grad.any()
    step = env.step_tensor(actions)
    assert env.mdp.subsets[0].all()
    actions, _, log_prob = policy(step.observation)
    log_prob.sum().backward()
    assert policy.router.weight.grad[1].any()


def test_ratio_of_unchanged_policy_is_one() -> None:
    """Log-probabilities of a rollout and of the update agree, through a buffer of floats."""
    env = _env(seed=0)
    model = A2C(RankedRouterPolicy, env, n_steps=NUM_SITES, policy_kwargs=_kwargs(env), device="cpu")
    observation = env.reset_tensor()
    with torch.no_grad():
        actions, _, log_prob = model.policy(observation)
        again = model.policy.evaluate_actions(observation, actions.float())[1]
    torch.testing.assert_close(again, log_prob, rtol=0, atol=0)


def test_other_codecs_are_refused() -> None:
    """The message names the codec."""
    env = RoutingVecEnv(LANES, planted_backbone(), PlantedSource(), replace(RULES, action="subset"))
    with pytest.raises(ValueError, match=r"action space must be MultiDiscrete \(action='ranked'\), got MultiBinary\(4"):
        A2C(RankedRouterPolicy, env, policy_kwargs=_kwargs(env))

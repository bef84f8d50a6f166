"""On a problem whose best routing is known, PPO finds it, and what it learned survives saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from torch import Tensor

from envs import RoutingMDP, RoutingVecEnv
from envs.planted import PLANTED_CONFIG, PLANTED_RULES, PlantedSource, episode_return, oracle_return, planted_backbone
from moe_backbone import MoETransformer, best_units
from moe_backbone.checkpoints import read_checkpoint, write_checkpoint
from policies.linear_router import RouterSpec
from policies.routing_ppo import RoutingPPO

SEEDS = (0, 1)
UPDATES = 50
HELD_OUT_SEED = 99
NUM_SEQUENCES = 4
LANES = NUM_SEQUENCES * PLANTED_RULES.rollouts_per_sequence * PLANTED_CONFIG.seq_len
NUM_SITES = 2
SHARE = 0.95
"""Of the oracle's return that a learned router must reach, and fixed ones must stay far below."""
NO_HEADS = torch.zeros(2, dtype=torch.bool)
Act = Callable[[RoutingVecEnv, np.ndarray], np.ndarray]


@pytest.fixture
def planted() -> MoETransformer:
    """Four experts, each right for one class of tokens; the gate always asks a wrong one."""
    return planted_backbone()


def _env(backbone: MoETransformer, seed: int) -> RoutingVecEnv:
    return RoutingVecEnv(LANES, backbone, PlantedSource(), PLANTED_RULES, seed=seed)


def _model(
    backbone: MoETransformer, seed: int, advantage: Literal["leave_one_out", "gae"] = "leave_one_out", **settings: Any
) -> RoutingPPO:
    price = PLANTED_RULES.price_low
    spec = RouterSpec(hidden_size=32, sites=backbone.sites, price_low=price, price_high=price)
    policy_kwargs = {"router_spec": spec.to_json(), "critic": advantage == "gae"}
    settings = {"learning_rate": 0.03, "batch_size": LANES, "gamma": 1.0, "n_epochs": 3} | settings
    env = _env(backbone, seed)
    return RoutingPPO("RouterPolicy", env, advantage=advantage, seed=seed, policy_kwargs=policy_kwargs, **settings)


def _learn(model: RoutingPPO, updates: int = UPDATES) -> RoutingPPO:
    return model.learn(updates * LANES * NUM_SITES)


def _held_out_return(backbone: MoETransformer, act: Act) -> float:
    """Mean return of one episode of every lane, walked through the numpy face."""
    env = _env(backbone, HELD_OUT_SEED)
    observation, total = env.reset(), np.zeros(LANES)
    for _ in range(NUM_SITES):
        observation, reward, *_ = env.step(act(env, observation))
        total += reward
    return float(total.mean())


def _learned(model: PPO) -> Act:
    return lambda env, observation: model.predict(observation, deterministic=True)[0]


def _native(env: RoutingVecEnv, observation: np.ndarray) -> np.ndarray:
    view = env.mdp.backbone.observe(env.mdp.state)
    action = np.zeros((LANES, 4), dtype=np.int8)
    action[:, : view.site.num_units] = best_units(view.scores, view.site.native_units).numpy()
    return action


def _random(env: RoutingVecEnv, observation: np.ndarray) -> np.ndarray:
    env.action_space.seed(len(env.mdp.subsets))
    return np.stack([env.action_space.sample() for _ in range(LANES)])


@pytest.fixture
def oracle(planted: MoETransformer) -> float:
    """Mean return of the best subsets on the held-out episode, by trying all of them."""
    env = _env(planted, HELD_OUT_SEED)
    env.reset()
    return oracle_return(env.mdp, env.mdp.batch).mean().item()


def _router_weights(model: PPO) -> list[Tensor]:
    return [weight.clone() for weight in model.policy.router.state_dict().values()]  # type: ignore[union-attr]


def test_oracle_is_the_right_expert_and_no_heads(planted: MoETransformer) -> None:
    """Trying all subsets finds what was planted: expert `t % 4` for token `t`; it is better than any one subset."""
    mdp = RoutingMDP(planted, PlantedSource(), PLANTED_RULES)
    batch = mdp.draw(np.random.default_rng(HELD_OUT_SEED))
    best = oracle_return(mdp, batch)
    right = torch.nn.functional.one_hot(batch.tokens.flatten() % 4, 4).bool()
    torch.testing.assert_close(episode_return(mdp, batch, [NO_HEADS, right]), best)
    everyone = episode_return(mdp, batch, [NO_HEADS, torch.ones(4, dtype=torch.bool)])
    assert (everyone < best).all()


def test_native_and_random_routing_stay_far_below_the_oracle(planted: MoETransformer, oracle: float) -> None:
    """There is something to learn: neither reaches a quarter of the best return."""
    assert oracle > 4
    assert _held_out_return(planted, _native) < oracle / 4
    assert _held_out_return(planted, _random) < oracle / 4


@pytest.mark.parametrize("advantage", ["leave_one_out", "gae"])
@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_finds_the_planted_routing(
    planted: MoETransformer, oracle: float, seed: int, advantage: Literal["leave_one_out", "gae"]
) -> None:
    """From below zero to at least 95 % of the oracle's return on held-out text, with and without a critic."""
    model = _model(planted, seed, advantage)
    assert _held_out_return(planted, _learned(model)) < 0
    assert _held_out_return(planted, _learned(_learn(model))) >= SHARE * oracle


def test_same_seed_learns_the_same_weights_and_another_seed_others(planted: MoETransformer) -> None:
    """To the bit, whatever was drawn before."""
    one = _router_weights(_learn(_model(planted, SEEDS[0]), updates=3))
    torch.rand(7)
    again = _router_weights(_learn(_model(planted, SEEDS[0]), updates=3))
    other = _router_weights(_learn(_model(planted, SEEDS[1]), updates=3))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a.any())


@pytest.mark.parametrize("loader", [RoutingPPO, PPO], ids=["ours", "stock"])
@pytest.mark.parametrize("advantage", ["leave_one_out", "gae"])
def test_saved_router_acts_as_before(
    planted: MoETransformer, tmp_path: Path, advantage: Literal["leave_one_out", "gae"], loader: type[PPO]
) -> None:
    """The zip opens without an environment, in Stable-Baselines3's own PPO too: same weights, same actions."""
    model = _learn(_model(planted, SEEDS[0], advantage), updates=3)
    model.save(tmp_path / "router.zip")
    loaded = loader.load(tmp_path / "router.zip", device="cpu")
    pairs = zip(_router_weights(model), _router_weights(loaded), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    env = _env(planted, HELD_OUT_SEED)
    observation = env.reset()
    for _ in range(NUM_SITES):
        action = _learned(model)(env, observation)
        np.testing.assert_array_equal(action, _learned(loaded)(env, observation))
        observation, *_ = env.step(action)
    assert _held_out_return(planted, _learned(loaded)) == _held_out_return(planted, _learned(model))


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # of SB3's buffer, which is not used
@pytest.mark.parametrize("advantage", ["leave_one_out", "gae"])
def test_loaded_model_goes_on_learning_as_if_never_saved(
    planted: MoETransformer, tmp_path: Path, advantage: Literal["leave_one_out", "gae"]
) -> None:
    """With its generators kept, weights after two more updates are those of the run without a break, to the bit."""
    whole = _model(planted, SEEDS[0], advantage)
    whole.learn(4 * LANES * NUM_SITES)
    broken = _model(planted, SEEDS[0], advantage)
    broken.learn(2 * LANES * NUM_SITES)
    write_checkpoint(tmp_path / "checkpoint.pt", broken.state())
    torch.rand(7)
    resumed = _model(planted, SEEDS[1], advantage)
    assert read_checkpoint(tmp_path / "checkpoint.pt", "checkpoint", resumed.restore)
    resumed.learn(2 * LANES * NUM_SITES, reset_num_timesteps=False)
    pairs = zip(_router_weights(whole), _router_weights(resumed), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage": "critic"}, "advantage must be 'leave_one_out' or 'gae', got 'critic'"),
        ({"gamma": 0.9}, "gamma must be 1 for leave_one_out, got 0.9"),
    ],
    ids=["advantage", "gamma"],
)
def test_settings_that_do_not_fit_the_advantage_are_refused(
    planted: MoETransformer, settings: dict[str, Any], message: str
) -> None:
    """The message names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        _model(planted, 0, **settings)


def test_leave_one_out_needs_copies_and_a_router(planted: MoETransformer) -> None:
    """One rollout a sequence has nobody to compare with, and only `RouterPolicy` has logits of whole episodes."""
    spec = RouterSpec(hidden_size=32, sites=planted.sites)
    alone = RoutingVecEnv(8, planted, PlantedSource())
    with pytest.raises(ValueError, match="rollouts_per_sequence must be at least 2 for leave_one_out, got 1"):
        RoutingPPO("RouterPolicy", alone, batch_size=16, policy_kwargs={"router_spec": spec.to_json()})
    with pytest.raises(ValueError, match="policy must be RouterPolicy for leave_one_out, got ActorCriticPolicy"):
        RoutingPPO("MlpPolicy", _env(planted, 0), batch_size=LANES)

"""PPO whose rollouts stay tensors: Stable-Baselines3's own bits, and what a host would have to wait for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize
from torch import Tensor

from benchmarks.trivial_env import LaneStep, TrivialVecEnv
from envs import RoutingVecEnv
from envs.planted import PLANTED_RULES, PlantedSource, planted_backbone
from policies.linear_router import RouterSpec
from policies.router_policy import RouterPolicy
from policies.tensor_ppo import TensorPPO
from policies.tensor_rollouts import LazyInfos, TensorRollout

LANES, SIZE, STEPS, ITERATIONS = 24, 12, 8, 5
SMALL: dict[str, Any] = {"n_steps": STEPS, "batch_size": 48, "n_epochs": 2, "device": "cpu"}
ACTIONS = {
    "bits": spaces.MultiBinary(8),
    "one of five": spaces.Discrete(5),
    "two choices": spaces.MultiDiscrete([3, 4]),
    "box": spaces.Box(-0.5, 0.5, (3,)),
}
ENDINGS: dict[str, dict[str, Any]] = {
    "over together": {},
    "over one by one": {"length": 5, "stagger": 3},
    "cut together": {"truncate": True, "length": 6},
    "cut one by one": {"truncate": True, "length": 5, "stagger": 3},
}
Run = tuple[Tensor, list[dict[str, Any]]]


class RowByRow(ActorCriticPolicy):
    """A critic that rounds alike for one lane and for many, as a product of many rows need not."""

    def predict_values(self, obs: Tensor) -> Tensor:
        """(num_lanes, 1)."""
        return torch.cat([super(RowByRow, self).predict_values(row) for row in obs.split(1)])


class Recorder(KVWriter):
    """Keeps what is logged, but for the time it took."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        """One row an iteration."""
        self.rows.append({name: value for name, value in key_values.items() if not name.startswith("time/")})

    def close(self) -> None:
        """Nothing to release."""


def _weights(model: PPO) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.policy.parameters()])


def _learn(model: PPO, iterations: int = ITERATIONS, callback: BaseCallback | None = None) -> Run:
    recorder = Recorder()
    model.set_logger(Logger(None, [recorder]))
    assert model.env is not None
    model.learn(iterations * model.n_steps * model.env.num_envs, callback)
    model.logger.dump()
    return _weights(model), recorder.rows


def _trivial(algorithm: type[PPO], policy: Any = "MlpPolicy", seed: int = 0, **settings: Any) -> PPO:
    env = {name: settings.pop(name) for name in list(settings) if name in ("length", "stagger", "truncate")}
    space = ACTIONS[settings.pop("actions", "bits")]
    return algorithm(policy, TrivialVecEnv(LANES, SIZE, space, **env), seed=seed, **SMALL | settings)


def _routing_env(seed: int = 0) -> RoutingVecEnv:
    return RoutingVecEnv(64, planted_backbone(), PlantedSource(), PLANTED_RULES, seed=seed)


def _routing(algorithm: type[PPO], policy: Any = "MlpPolicy", seed: int = 0, **settings: Any) -> PPO:
    env = _routing_env()
    if policy is RouterPolicy:
        spec = RouterSpec(hidden_size=32, sites=env.mdp.backbone.sites, price_low=0.5, price_high=0.5)
        settings["policy_kwargs"] = {"router_spec": spec.to_json()}
    return algorithm(policy, env, seed=seed, **SMALL | {"n_steps": env.num_sites, "batch_size": 64} | settings)


def check_same_run(make: Callable[[type[PPO]], PPO]) -> None:
    """Weights and everything logged are those of stock PPO, to the bit."""
    (stock, stock_log), (ours, our_log) = (_learn(make(algorithm)) for algorithm in (PPO, TensorPPO))
    assert torch.equal(ours, stock)
    assert len(our_log) == len(stock_log) == ITERATIONS + 1
    for ours_logged, stock_logged in zip(our_log, stock_log, strict=True):
        np.testing.assert_equal(ours_logged, stock_logged)
    names = {"loss", "value_loss", "clip_fraction", "explained_variance", "approx_kl", "entropy_loss"}
    assert {f"train/{name}" for name in names} <= stock_log[-1].keys()
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean"} <= stock_log[-2].keys()


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_weights_and_logs_are_stock_ppos_to_the_bit(actions: str, ending: str) -> None:
    """Every action space, with lanes that end together or not, over or cut off."""
    policy = RowByRow if ENDINGS[ending].get("truncate") else "MlpPolicy"
    check_same_run(lambda algorithm: _trivial(algorithm, policy, actions=actions, **ENDINGS[ending]))


@pytest.mark.parametrize(
    "settings",
    [{"clip_range_vf": 0.1}, {"ent_coef": 0.01}, {"target_kl": 1e-4}, {"normalize_advantage": False}, {"n_steps": 3}],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_settings_mean_what_they_mean_in_stock_ppo(settings: dict[str, Any]) -> None:
    """Each changes the run, in the same way."""
    make = lambda algorithm: _trivial(algorithm, length=5, stagger=3, **settings)  # noqa: E731
    check_same_run(make)
    assert not torch.equal(_learn(make(TensorPPO))[0], _learn(_trivial(TensorPPO, length=5, stagger=3))[0])


@pytest.mark.parametrize("policy", ["MlpPolicy", RouterPolicy], ids=["mlp", "router"])
def test_routing_learns_as_in_stock_ppo_to_the_bit(policy: Any) -> None:
    """The environment of this project, through its two faces."""
    check_same_run(lambda algorithm: _routing(algorithm, policy))


def test_another_seed_is_seen() -> None:
    """The comparison can fail: other weights for another seed, and for another order of minibatches."""
    with pytest.raises(AssertionError):
        check_same_run(lambda algorithm: _trivial(algorithm, seed=int(algorithm is PPO)))


def test_another_order_of_minibatches_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: transitions counted step after step, where SB3 counts lane after lane."""
    fresh = TensorPPO._fresh_rollout

    def other_order(self: TensorPPO, shape: tuple[int, int]) -> TensorRollout:
        rollout = fresh(self, shape)
        rollout.place = torch.arange(len(rollout.place))
        return rollout

    monkeypatch.setattr(TensorPPO, "_fresh_rollout", other_order)
    with pytest.raises(AssertionError):
        check_same_run(lambda algorithm: _trivial(algorithm))


def test_a_cut_off_episode_is_worth_what_it_would_still_have_earned() -> None:
    """One call for all lanes rounds otherwise than one a lane, by no more than that; without any, results differ."""
    endings = ENDINGS["cut one by one"]
    stock, ours = (_learn(_trivial(algorithm, **endings))[0] for algorithm in (PPO, TensorPPO))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
    over = _learn(_trivial(TensorPPO, **endings | {"truncate": False}))[0]
    assert (over - stock).abs().max() > 1e-3


def test_advantages_by_hand() -> None:
    """Two steps of two lanes: the first lane is cut off after one step, the second goes on."""
    rollout = TensorRollout((2, 2), spaces.Box(-1, 1, (1,)), spaces.MultiBinary(1), torch.device("cpu"))
    rollout.values.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    rollout.add_outcome(0, torch.tensor([10.0, 20.0]), torch.tensor([True, False]))
    rollout.add_outcome(1, torch.tensor([30.0, 40.0]), False)
    rollout.bootstrap[0, 0] = 5.0
    rollout.close(torch.tensor([6.0, 7.0]), gamma=0.5, gae_lambda=0.5)
    last = [30 + 0.5 * 6 - 3, 40 + 0.5 * 7 - 4]
    first = [10 + 5 - 1, 20 + 0.5 * 4 - 2 + 0.25 * last[1]]
    assert rollout.advantages.tolist() == [first, last]
    assert rollout.returns.tolist() == [[first[0] + 1, first[1] + 2], [last[0] + 3, last[1] + 4]]
    assert rollout.finished_episodes(5) == [(10.0, 1)]
    assert rollout.running.tolist() == [[30.0, 60.0], [1.0, 2.0]]


class Watch(BaseCallback):
    """Keeps the info dictionaries that a callback sees, and stops if asked to."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after = stop_after
        self.seen: list[list[dict[str, Any]]] = []

    def _on_step(self) -> bool:
        self.seen.append(list(self.locals["infos"]))
        return self.n_calls != self.stop_after


@pytest.mark.parametrize("ending", ENDINGS)
def test_callbacks_see_the_same_infos(ending: str) -> None:
    """The dictionaries of every lane at every step, though none is built unless looked at."""
    watches = Watch(), Watch()
    for algorithm, watch in zip((PPO, TensorPPO), watches, strict=True):
        _learn(_trivial(algorithm, **ENDINGS[ending]), 2, watch)
    stock, ours = (watch.seen for watch in watches)
    assert any(any(infos) for infos in stock)
    np.testing.assert_equal(ours, stock)


def test_infos_are_a_sequence_that_builds_on_demand() -> None:
    """Length, negative index, slice and end; nothing is built for lanes that nobody asks for."""
    episodes = torch.tensor([[1.5, 2.0], [3.0, 4.0], [1.0, 0.0]])
    infos = LazyInfos(LaneStep(torch.zeros(2, 1), torch.zeros(2), True, False), episodes)
    assert len(infos) == 2
    assert infos[0]["episode"] == {"r": 1.5, "l": 3, "t": 0.0}
    assert infos[-1] == {}
    assert infos[:2] == [infos[0], {}]
    with pytest.raises(IndexError):
        infos[2]


def test_a_callback_can_stop_the_rollout() -> None:
    """After its third step no more are taken and nothing is learned."""
    model = _trivial(TensorPPO)
    before = _weights(model)
    _learn(model, 2, Watch(stop_after=3))
    assert model.num_timesteps == 3 * LANES
    assert torch.equal(_weights(model), before)


@pytest.mark.parametrize("wrapper", [VecMonitor, VecNormalize], ids=["monitor", "normalize"])
def test_a_wrapped_environment_takes_stock_ppos_way(wrapper: Callable[[VecEnv], VecEnv]) -> None:
    """A wrapper that passes attributes on does not lose its own work."""

    def run(algorithm: type[PPO]) -> Tensor:
        return _learn(algorithm("MlpPolicy", wrapper(TrivialVecEnv(LANES, SIZE)), seed=0, **SMALL))[0]

    assert torch.equal(run(TensorPPO), run(PPO))
    if wrapper is VecNormalize:
        assert not torch.equal(run(TensorPPO), _learn(_trivial(TensorPPO))[0])


def test_state_dependent_exploration_takes_stock_ppos_way() -> None:
    """Its noise is drawn in SB3's loop."""
    settings = {"actions": "box", "use_sde": True}
    stock, ours = (_learn(_trivial(algorithm, **settings))[0] for algorithm in (PPO, TensorPPO))
    assert torch.equal(ours, stock)


def test_nobody_is_told_to_leave_the_gpu() -> None:
    """SB3 recommends the CPU for `MlpPolicy`; that is good advice only for rollouts that pass through numpy."""
    for env, told in ((TrivialVecEnv(LANES, SIZE), False), (VecMonitor(TrivialVecEnv(LANES, SIZE)), True)):
        model = TensorPPO("MlpPolicy", env, **SMALL)
        model.device = torch.device("cuda")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model._maybe_recommend_cpu()
        assert bool(caught) == told


@pytest.mark.parametrize("loader", [TensorPPO, PPO], ids=["ours", "stock"])
def test_saved_model_opens_and_learns_on(loader: type[PPO], tmp_path: Path) -> None:
    """In ours and in stock PPO: same weights, same optimiser, and the same next iterations."""
    model = _trivial(TensorPPO)
    _learn(model)
    model.save(tmp_path / "model.zip")
    loaded = [kind.load(tmp_path / "model.zip", env=TrivialVecEnv(LANES, SIZE), device="cpu") for kind in (PPO, loader)]
    assert torch.equal(_weights(loaded[1]), _weights(model))
    results = []
    for one in loaded:
        one.set_random_seed(3)
        one.learn(2 * STEPS * LANES, reset_num_timesteps=False)
        results.append(_weights(one))
    assert torch.equal(*results)
    assert not torch.equal(results[0], _weights(model))


def test_second_call_of_learn_goes_on_amid_episodes() -> None:
    """Two calls are one long one, as in stock PPO, also where an episode lasts longer than a rollout."""
    results = []
    for algorithm in (PPO, TensorPPO):
        model = _trivial(algorithm, length=5, stagger=7)
        for first in (True, False):
            model.learn(2 * STEPS * LANES, reset_num_timesteps=first)
        results.append(_weights(model))
    assert torch.equal(*results)

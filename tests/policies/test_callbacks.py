"""What TensorBoard shows of the routed episodes."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace

import pytest
import torch
from stable_baselines3.common.logger import Logger

from envs import RoutingVecEnv
from envs.planted import PLANTED_RULES, PlantedSource, planted_backbone
from policies.callbacks import PeriodicSave, RoutingMetrics, asked_to_stop, episode_metrics, load_metrics
from policies.tensor_ppo import TensorPPO

LANES = 64


def test_load_by_hand() -> None:
    """Two tokens: both heads for one of them; the first expert for both, the second for one, the others for none."""
    sites = planted_backbone().sites
    heads = torch.tensor([[True, True], [False, False]])
    experts = torch.tensor([[True, True, False, False], [True, False, False, False]])
    metrics = {name: value.item() for name, value in load_metrics(sites, [heads, experts]).items()}
    assert metrics["units_per_token/layer0.heads"] == 1.0
    assert metrics["units_per_token/layer0.experts"] == 1.5
    assert metrics["routing/dead_units"] == 2
    load = torch.tensor([1.0, 0.5, 0.0, 0.0])
    assert metrics["routing/load_cv"] == pytest.approx((load.std(correction=0) / load.mean()).item())


def test_metrics_are_those_of_the_episode() -> None:
    """Native choices cost one and gain nothing, nothing at all costs nothing."""
    env = RoutingVecEnv(LANES, planted_backbone(), PlantedSource(), PLANTED_RULES)
    for everything in (False, True):
        env.reset_tensor()
        total = torch.zeros(LANES)
        for _ in range(env.num_sites):
            total += env.step_tensor(torch.full((LANES, 4), everything)).reward
        metrics = episode_metrics(env.mdp)
        assert metrics["reward/cost"] + metrics["reward/quality"] == pytest.approx(total.mean().item(), abs=1e-5)
        assert (metrics["routing/compute"] > 1) == everything
        assert metrics["routing/price"] == pytest.approx(0.5)
        assert metrics["routing/dead_units"] == (0 if everything else 6)


def test_metrics_show_what_the_balance_cost() -> None:
    """Three parts make up the mean return where a balance is priced."""
    env = RoutingVecEnv(LANES, planted_backbone(), PlantedSource(), replace(PLANTED_RULES, balance_price=0.3))
    env.reset_tensor()
    total = sum(env.step_tensor(torch.eye(4)[torch.zeros(LANES, dtype=torch.long)]).reward for _ in range(2))
    metrics = episode_metrics(env.mdp)
    assert metrics["reward/balance"] == pytest.approx(-0.3 * 3)  # one of four experts does everything: CV squared is 3
    parts = [metrics[f"reward/{name}"] for name in ("cost", "quality", "balance")]
    assert sum(parts) == pytest.approx(total.mean().item(), abs=1e-5)


@pytest.mark.parametrize(("n_steps", "logged"), [(2, True), (3, False)], ids=["at the end", "amid an episode"])
def test_metrics_wait_for_the_end_of_an_episode(n_steps: int, logged: bool) -> None:
    """With a critic too: a rollout that stops amid an episode has no episode to show."""
    env = RoutingVecEnv(LANES, planted_backbone(), PlantedSource(), PLANTED_RULES)
    model = TensorPPO("MlpPolicy", env, n_steps=n_steps, batch_size=LANES, device="cpu")
    model.set_logger(Logger(None, []))
    model.learn(n_steps * LANES, RoutingMetrics({}, every=1), log_interval=100)
    assert ("routing/compute" in model.logger.name_to_value) == logged


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    """A run may live in any thread, as trials of Ray Tune do; Python lets only the main one take signals."""
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with asked_to_stop(PeriodicSave(lambda: None, 1)):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]

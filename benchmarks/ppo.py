"""A whole iteration of tensor PPO against stock Stable-Baselines3, on an environment that costs next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor

from benchmarks.measure import Measured, Row, agree, compare, interleave, milliseconds
from benchmarks.trivial_env import TrivialVecEnv
from policies.tensor_ppo import TensorPPO

LANES, OBSERVATION_SIZE, STEPS = 1024, 64, 8
SETTINGS: dict[str, Any] = {"n_steps": STEPS, "batch_size": 2048, "n_epochs": 4, "seed": 0, "device": "cpu"}
COMPARED_ITERATIONS = 5
ROUNDING = 1e-5
"""Absolute, of weights; another seed moves them by several hundredths."""


def rows() -> Iterator[Row]:
    """Episodes that are over when a rollout is, and episodes that are all cut off then."""
    yield _row("ppo/episodes-end", 1.2, truncate=False)
    yield _row("ppo/episodes-cut-off", 2.2, truncate=True)


class RowByRow(ActorCriticPolicy):
    """A critic that rounds alike for one lane and for many, as a product of many rows need not."""

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """(num_lanes, 1)."""
        assert isinstance(obs, Tensor)
        return torch.cat([super(RowByRow, self).predict_values(row) for row in obs.split(1)])


def _row(name: str, bar: float, *, truncate: bool) -> Row:
    stock, ours = (_trained(kind, truncate) for kind in (PPO, TensorPPO))

    def measure() -> Measured:
        iterations = [partial(model.learn, LANES * STEPS, reset_num_timesteps=False) for model in (stock, ours)]
        stock_time, own = interleave(iterations)
        times = {"stock_ms": milliseconds(stock_time), "ours_ms": milliseconds(own)}
        sizes = {"num_envs": LANES, "observation_size": OBSERVATION_SIZE, "action": "MultiBinary(8)"}
        return stock_time / own, {**times, "sizes": {**sizes, **SETTINGS}, "truncate": truncate}

    return compare(name, bar=bar, equal=_equal(stock, ours, truncate), measure=measure)


def _trained(kind: type[PPO], truncate: bool, policy: Any = "MlpPolicy") -> PPO:
    """After a few iterations; stock PPO sees the environment's numpy face, ours its tensor face."""
    env = TrivialVecEnv(LANES, OBSERVATION_SIZE, length=STEPS, truncate=truncate)
    model = kind(policy, env, **SETTINGS)  # seeds the global generators, so it must learn before the next is made
    return model.learn(COMPARED_ITERATIONS * LANES * STEPS)


def _equal(stock: PPO, ours: PPO, truncate: bool) -> bool:
    """Whether both have the same weights, to the bit.

    The value of an episode that was cut off comes from one call a lane in stock PPO and from one call for all in ours,
    which rounds otherwise. There the bits are compared under a critic that does not.
    """
    if not truncate:
        return torch.equal(_weights(stock), _weights(ours))
    exact = (_weights(_trained(kind, truncate, RowByRow)) for kind in (PPO, TensorPPO))
    return torch.equal(*exact) and agree(_weights(stock), _weights(ours), ROUNDING)


def _weights(model: PPO) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.policy.parameters()])

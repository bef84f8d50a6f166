"""The vector environment against Gymnasium's loop over single ones, and its cost a lane at 64 times the lanes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from benchmarks.measure import Measured, Row, compare, interleave, milliseconds
from envs import FixedSource, RoutingEnv, RoutingVectorEnv
from moe_backbone import BackboneConfig, MoETransformer

CONFIG = BackboneConfig(
    hidden_size=64, num_layers=2, num_heads=4, num_experts=8, top_k=2, intermediate_size=32, seq_len=64
)
LANES, MANY_LANES, SYNC_LANES = 1024, 65_536, 8
SITES = 2 * CONFIG.num_layers
TOLERANCE = 1e-4
"""Absolute, float32: observations and rewards are of the order of 1."""


def rows() -> Iterator[Row]:
    """Throughput a lane at 1,024 lanes, then at 65,536."""
    torch.manual_seed(0)
    backbone = MoETransformer(CONFIG).requires_grad_(False).eval()
    text = torch.randint(CONFIG.vocab_size, (MANY_LANES // CONFIG.seq_len, CONFIG.seq_len + 1))
    source = FixedSource(text[:, :-1], text[:, 1:])
    yield _against_sync(backbone, source)
    yield _flatness(backbone, source)


def draw(lanes: int, steps: int = SITES) -> np.ndarray:
    """Random subsets, int8 (steps, lanes, max_units)."""
    return np.random.default_rng(0).integers(0, 2, (steps, lanes, CONFIG.max_units), dtype=np.int8)


def play(env: VectorEnv, actions: np.ndarray) -> None:
    """One step an action; environments restart by themselves."""
    for action in actions:
        env.step(action)


def _against_sync(backbone: MoETransformer, source: FixedSource) -> Row:
    """Gymnasium walks whole sequences token by token, so that its share of native runs counts as ours does."""

    def measure() -> Measured:
        vector = RoutingVectorEnv(LANES, backbone, source)
        makers = [partial(RoutingEnv, backbone, source)] * SYNC_LANES
        sync = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        for env in (vector, sync):
            env.reset(seed=0)
        walk = draw(SYNC_LANES, SITES * CONFIG.seq_len)
        own, other = interleave((partial(play, vector, draw(LANES)), partial(play, sync, walk)))
        own_rate, other_rate = LANES * SITES / own, walk.shape[0] * SYNC_LANES / other
        rates = {"ours_steps_per_second": round(own_rate), "sync_steps_per_second": round(other_rate)}
        times = {"ours_ms": milliseconds(own), "sync_ms": milliseconds(other)}
        return own_rate / other_rate, {**rates, **times, "lanes": LANES, "sync_lanes": SYNC_LANES}

    return compare("environment/vector", bar=20.0, equal=_same_walk(backbone, source), measure=measure)


def _same_walk(backbone: MoETransformer, source: FixedSource) -> bool:
    """Whether one sequence, same seed and actions, gives the same rewards and observations in both orders."""
    actions = draw(CONFIG.seq_len)
    by_site = _first_episode(RoutingVectorEnv(CONFIG.seq_len, backbone, source), actions)
    single, lanes = RoutingEnv(backbone, source), []
    for position in range(CONFIG.seq_len):
        observations = [single.reset(seed=0 if position == 0 else None)[0]]
        rewards = []
        for action in actions[:, position]:
            observation, reward, *_ = single.step(action)
            observations.append(observation)
            rewards.append(reward)
        lanes.append(np.concatenate((np.concatenate(observations), rewards)))
    return np.allclose(np.stack(lanes), by_site, rtol=0, atol=TOLERANCE)


def _first_episode(env: RoutingVectorEnv, actions: np.ndarray) -> np.ndarray:
    """All observations, then all rewards (num_lanes, ...), after a reset with seed 0."""
    observations, rewards = [env.reset(seed=0)[0]], []
    for action in actions:
        observation, reward, terminated, _, info = env.step(action)
        observations.append(info["final_obs"] if terminated.all() else observation)
        rewards.append(reward)
    return np.concatenate((*observations, np.stack(rewards, axis=1)), axis=1)


def _flatness(backbone: MoETransformer, source: FixedSource) -> Row:
    """The first lanes of many see the text, prices and actions of few."""
    few, many = (RoutingVectorEnv(lanes, backbone, source) for lanes in (LANES, MANY_LANES))
    actions = draw(MANY_LANES)
    own_actions = actions[:, :LANES].copy()
    few_lanes, many_lanes = _first_episode(few, own_actions), _first_episode(many, actions)
    equal = np.allclose(few_lanes, many_lanes[:LANES], rtol=0, atol=TOLERANCE)

    def measure() -> Measured:
        few_time, many_time = interleave((partial(play, few, own_actions), partial(play, many, actions)))
        few_cost, many_cost = few_time / LANES, many_time / MANY_LANES
        times = {"few_ms": milliseconds(few_time), "many_ms": milliseconds(many_time)}
        sizes = {"few_lanes": LANES, "many_lanes": MANY_LANES, "sites": SITES}
        return few_cost / many_cost, {**times, "flatness": many_cost / few_cost, "sizes": sizes}

    return compare("environment/flat", bar=1 / 1.2, equal=equal, measure=measure)

"""Many episodes in one process: does memory stay flat, and do results?

python -m benchmarks.soak              # 10,000 episodes of PPO, of the Gymnasium environment and of evaluation

Resident memory is read after a garbage collection at equal intervals, the first tenth left out; a line is fitted, and
its slope is held against its own noise. Results are the returns of a policy that does not learn, first half against
second half.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.logger import Logger

from commands import ending
from envs import EnvConfig, RoutingEnv, RoutingVecEnv
from envs.planted import PLANTED_RULES, PlantedSource, planted_backbone
from moe_backbone import token_log_likelihood
from moe_backbone.files import write_text_atomic
from moe_backbone.ranks import bar
from policies.baselines.randomized import RandomSubset
from policies.linear_router import RouterSpec
from policies.routing_ppo import RoutingPPO

READINGS, LANES = 100, 64
WARM = 0.1
"""Share of the readings that are left out, while caches fill."""


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """How long."""

    episodes: int = 10_000
    """Of each subject."""
    output: Path = Path("runs/soak.json")
    """Where the figures are kept."""


def resident() -> float:
    """Resident memory of this process, MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(step: Callable[[], float], episodes: int, name: str) -> dict[str, Any]:
    """Call `step`, an episode each, and watch."""
    returns, memory, every = [], [], max(1, episodes // READINGS)
    for episode in bar(range(episodes), desc=name, unit="episode"):
        returns.append(step())
        if episode % every == every - 1:
            memory.append(resident())
    kept = memory[int(WARM * len(memory)) :]
    (slope, _), covariance = np.polyfit(np.arange(len(kept)) * every / 1e3, kept, 1, cov=True)
    error = 1.96 * float(covariance[0, 0]) ** 0.5
    first, second = np.array_split(returns, 2)
    noise = float(np.hypot(first.std() / len(first) ** 0.5, second.std() / len(second) ** 0.5))
    return {
        "episodes": episodes,
        "MiB at the start": kept[0],
        "MiB at the end": kept[-1],
        "MiB per 1,000 episodes": [slope - error, slope + error],
        "mean result": float(np.mean(returns)),
        "second half minus first": float(second.mean() - first.mean()),
        "its noise": 1.96 * noise,
    }


def ppo() -> Callable[[], float]:
    """An update of PPO whose learning rate is 0: the mean return of its episode."""
    backbone = planted_backbone()
    env = RoutingVecEnv(LANES, backbone, PlantedSource(), replace(PLANTED_RULES, rollouts_per_sequence=2))
    spec = RouterSpec(hidden_size=backbone.hidden_size, sites=backbone.sites)
    keywords = {"router_spec": spec.to_json(), "critic": False}
    model = RoutingPPO("RouterPolicy", env, learning_rate=0.0, batch_size=LANES, seed=0, policy_kwargs=keywords)
    model.set_logger(Logger(None, []))

    def step() -> float:
        model.learn(LANES * env.num_sites, reset_num_timesteps=False)
        assert model.ep_info_buffer is not None
        return float(model.ep_info_buffer[-1]["r"])

    return step


def gymnasium_episode() -> Callable[[], float]:
    """One token through `RoutingEnv` under random subsets: its return."""
    env = RoutingEnv(planted_backbone(), PlantedSource(), EnvConfig())
    env.action_space.seed(0)
    env.reset(seed=0)

    def step() -> float:
        env.reset()
        total, ended = 0.0, False
        while not ended:
            _, reward, ended, _, _ = env.step(env.action_space.sample())
            total += float(reward)
        return total

    return step


def evaluation() -> Callable[[], float]:
    """Score a random router: its loss, nats."""
    backbone, draws = planted_backbone(), np.random.default_rng(0)
    tokens, targets = PlantedSource().draw(16, draws)
    seeds = iter(range(10**9))

    @torch.no_grad()
    def step() -> float:
        logits, _ = backbone.run(tokens, RandomSubset(rate=0.5, seed=next(seeds)))
        return -float(token_log_likelihood(logits, targets).mean())

    return step


SUBJECTS = {"PPO": ppo, "Gymnasium": gymnasium_episode, "forward passes": evaluation}


def run(config: SoakConfig) -> None:
    """Soak every subject, print the table and keep its figures."""
    found = {name: soak(make(), config.episodes, name) for name, make in SUBJECTS.items()}
    shown = Table("subject", *next(iter(found.values())))
    for name, figures in found.items():
        cells = (value if isinstance(value, list) else [value] for value in figures.values())
        shown.add_row(name, *(", ".join(f"{number:.4g}" for number in cell) for cell in cells))
    Console(width=150).print(shown)
    write_text_atomic(config.output, json.dumps(found, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    config = tyro.cli(SoakConfig, description=__doc__, args=arguments)
    with ending():
        run(config)


if __name__ == "__main__":
    main()

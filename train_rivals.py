"""Rivals of the learned router that are trained: gates by back-propagation, Ada-K, A2C, REINFORCE and DQN.

They are trained on training text once and kept in the run folder under `rivals/`, where the next call finds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule

from envs import CorpusSource, EnvConfig, RoutingVecEnv
from moe_backbone import Backbone, Router, ranks
from moe_backbone.corpus import Corpus
from moe_backbone.files import write_text_atomic
from policies.ada_k import AdaK, AdaKConfig
from policies.count_router import CountRouter, load_count_router, save_count_router
from policies.count_values import CountQPolicy, value_spec
from policies.gating import GatingConfig
from policies.linear_router import LinearRouter, RouterSpec
from policies.portable import load_router, save_router
from policies.router_policy import RouterPolicy

if TYPE_CHECKING:  # it imports the evaluation, which imports this
    from training_config import TrainConfig

NOTE = "rival.json"
"""What a rival was trained with; written last."""


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings:
    """A2C (arXiv:1602.01783), or REINFORCE as what is left of it without a critic."""

    critic: bool = True
    """Whether a critic is trained. Without one, and as gamma and gae_lambda are 1, A2C is REINFORCE (Williams, 1992)
    to the bit: log-probabilities weighed by the return to go."""
    normalize_advantage: bool = True
    """Whether advantages get mean 0 and deviation 1 in each batch; without a critic the batch mean is the baseline."""
    num_sequences: int = 16
    """Sequences of an update."""
    updates: int = 100
    """Gradient steps."""
    learning_rate: float = 1e-3
    """Of RMSprop at the start; falls linearly to 3 % of it."""


@dataclass(frozen=True, kw_only=True)
class DQNSettings:
    """DQN (Mnih et al., 2015) on the count codec."""

    num_sequences: int = 8
    """Sequences that run at once."""
    episodes: int = 150
    """Times that all of them run."""
    gradient_steps: int = 16
    """After each episode."""
    batch_size: int = 1024
    """Transitions of a gradient step."""
    buffer_episodes: int = 32
    """Episodes of all sequences that the replay buffer holds."""
    target_episodes: int = 2
    """Episodes between two copies to the target network."""
    learning_rate: float = 1e-3
    """Of Adam at the start; falls linearly to 3 % of it."""
    exploration: tuple[float, float] = (0.5, 0.1)
    """Chance of random counts at a site at the start, and from the first third on; SB3 draws once for all lanes."""


@dataclass(frozen=True, kw_only=True)
class RivalSettings:
    """What each rival may spend."""

    gating: GatingConfig = GatingConfig(steps=800)
    """As many steps as the learned router takes before and between its updates."""
    gating_l0: GatingConfig = GatingConfig(steps=300, relaxation="hard_concrete", sharpness=(1.0, 1.0))
    """Every expert of every token runs and learns in these steps, which makes them twice as long."""
    cost_weights: tuple[float, ...] = (0.006, 0.012, 0.025, 0.05, 0.1)
    """Ada-K has no price as an input: one policy for each point."""
    ada_k: AdaKConfig = AdaKConfig()
    ada_k_sequences: int = 8
    """Sequences of one of its rollouts."""
    a2c: OnPolicySettings = OnPolicySettings()
    reinforce: OnPolicySettings = OnPolicySettings(critic=False)
    dqn: DQNSettings = DQNSettings()


@dataclass(frozen=True, kw_only=True)
class RivalPoint:
    """One rival at one setting, ready to be scored."""

    name: str
    setting: dict[str, Any]
    seed: int
    router: Router


def router_spec(config: TrainConfig, backbone: Backbone) -> RouterSpec:
    """Of the learned router of a run."""
    return RouterSpec(
        hidden_size=backbone.hidden_size,
        sites=tuple(backbone.sites),
        price_low=config.env.price_low,
        price_high=config.env.price_high,
        compensation=config.compensation,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rival of one run: what it learns from, and where it is kept.

    Attributes:
        name: Of the rival.
        kept: `rivals/<name>-seed<N>` in the run folder.
    """

    name: str
    config: TrainConfig
    backbone: Backbone
    corpus: Corpus
    seed: int
    folder: Path
    progress: bool
    settings: RivalSettings

    @property
    def kept(self) -> Path:
        """Where the trained rival is."""
        return self.folder / "rivals" / f"{self.name}-seed{self.seed}"

    def environment(self, num_sequences: int, **rules: Any) -> RoutingVecEnv:
        """The run's environment on training text, with some rules of the rival's own."""
        seq_len = self.backbone.config.seq_len
        rules = {"rollouts_per_sequence": 1, **rules}
        source = CorpusSource(self.corpus.train, seq_len)
        config = replace(self.config.env, **rules)
        return RoutingVecEnv(num_sequences * seq_len, self.backbone, source, config, seed=self.seed)

    def train_once(self, settings: dict[str, Any], total: int, train: Callable[[Callable[[], object]], None]) -> None:
        """Train unless that has been done with the same settings, rules and text.

        Args:
            settings: Of the rival; JSON values.
            total: Times that `train` calls the function that it is given, to move a bar.
            train: Leaves its files in `kept`.
        """
        asked = {"settings": settings, "env": asdict(self.config.env), "corpus": self.corpus.sha256}
        asked, note = json.loads(json.dumps(asked)), self.kept / NOTE
        if note.exists() and _with_defaults(json.loads(note.read_text(encoding="utf-8"))) == asked:
            return
        with ranks.bar(total=total, desc=self.name, unit="step", disable=not self.progress) as bar:
            train(bar.update)
        write_text_atomic(note, json.dumps(asked, indent=1) + "\n")

    def point(self, router: Router, setting: dict[str, Any]) -> RivalPoint:
        """One row of the table."""
        return RivalPoint(name=self.name, setting=setting, seed=self.seed, router=router)

    def at_prices(self, router: LinearRouter | CountRouter) -> list[RivalPoint]:
        """The points of a router that reads the price."""
        rules = self.config.env
        prices = np.geomspace(rules.price_low, rules.price_high, self.config.evaluation.num_prices).tolist()
        router = router.to(next(self.backbone.parameters()).device)
        return [self.point(router.at_price(price), {"price": round(price, 6)}) for price in prices]


def _with_defaults(note: dict[str, Any]) -> dict[str, Any]:
    """What a rival was trained with; rules that came later than it have their defaults."""
    return note | {"env": asdict(EnvConfig()) | note["env"]}


def train_rival(
    name: str,
    config: TrainConfig,
    backbone: Backbone,
    corpus: Corpus,
    seed: int,
    folder: Path,
    progress: bool = True,
    settings: RivalSettings | None = None,
) -> list[RivalPoint]:
    """Train a rival, or find it trained.

    Args:
        name: One of `RIVALS`.
        config: Of the run; its environment's rules and prices are used, and the number of prices to score.
        backbone: Frozen.
        corpus: Only its training part is read.
        seed: Of weights, rollouts and text.
        folder: Of the run.
        progress: Whether a bar is shown.
        settings: What the rival may spend; one trained with others is trained again.

    Returns:
        Points of its trade-off.

    Raises:
        ValueError: If what is kept cannot be read, or was made for another backbone.
    """
    settings = settings or RivalSettings()
    job = Job(
        name=name,
        config=config,
        backbone=backbone,
        corpus=corpus,
        seed=seed,
        folder=folder,
        progress=progress,
        settings=settings,
    )
    return _LEARNERS[name](job)


def _ada_k(job: Job) -> list[RivalPoint]:
    """One policy a cost weight, all from one warm start."""
    preset, weights = job.settings.ada_k, job.settings.cost_weights
    places = {weight: job.kept / f"cost-weight-{weight:g}" for weight in weights}

    def train(progress: Callable[[], object]) -> None:
        env = job.environment(job.settings.ada_k_sequences, action="count", quality="log_likelihood", credit="token")
        start = AdaK(env, preset, job.seed)
        start.warm_up(progress)
        for weight, place in places.items():
            learner = AdaK(env, replace(preset, cost_weight=weight), job.seed, deepcopy(start.router))
            learner.learn(progress)
            save_count_router(learner.router, place, job.backbone)

    settings = {"preset": asdict(preset), "cost_weights": weights, "num_sequences": job.settings.ada_k_sequences}
    job.train_once(settings, preset.warm_updates + len(places) * preset.updates, train)
    device = next(job.backbone.parameters()).device
    routers = {weight: load_count_router(place, job.backbone).to(device) for weight, place in places.items()}
    return [job.point(router, {"cost_weight": weight}) for weight, router in routers.items()]


def _on_policy(job: Job, settings: OnPolicySettings) -> list[RivalPoint]:
    """SB3's A2C around a `LinearRouter`."""

    def train(progress: Callable[[], object]) -> None:
        env = job.environment(settings.num_sequences, action="subset")
        spec = replace(router_spec(job.config, job.backbone), compensation=False)
        model = A2C(
            RouterPolicy,
            env,
            learning_rate=_falling(settings.learning_rate),
            n_steps=env.num_sites,
            gamma=1.0,
            vf_coef=0.5 if settings.critic else 0.0,
            normalize_advantage=settings.normalize_advantage,
            policy_kwargs={"router_spec": spec.to_json(), "critic": settings.critic},
            seed=job.seed,
            device=env.mdp.device,
        )
        _learn(model, settings.updates * env.num_sites, progress)
        save_router(model.policy.router, job.kept, job.backbone)  # type: ignore[arg-type]

    job.train_once(asdict(settings), settings.updates * len(job.backbone.sites), train)
    return job.at_prices(load_router(job.kept, job.backbone))


def _dqn(job: Job) -> list[RivalPoint]:
    """SB3's DQN with a linear value network for each site."""
    settings = job.settings.dqn

    def train(progress: Callable[[], object]) -> None:
        env = job.environment(settings.num_sequences, action="count")
        episode = env.num_envs * env.num_sites
        model = DQN(
            CountQPolicy,
            env,
            learning_rate=_falling(settings.learning_rate),
            buffer_size=settings.buffer_episodes * episode,
            learning_starts=episode,
            batch_size=settings.batch_size,
            gamma=1.0,
            train_freq=env.num_sites,
            gradient_steps=settings.gradient_steps,
            target_update_interval=settings.target_episodes * episode,
            exploration_fraction=1 / 3,
            exploration_initial_eps=settings.exploration[0],
            exploration_final_eps=settings.exploration[1],
            policy_kwargs={"count_spec": value_spec(job.backbone.hidden_size, job.backbone.sites).to_json()},
            seed=job.seed,
            device=env.mdp.device,
        )
        _learn(model, settings.episodes * env.num_sites, progress)
        save_count_router(model.policy.router, job.kept, job.backbone)  # type: ignore[arg-type]

    job.train_once(asdict(settings), settings.episodes * len(job.backbone.sites), train)
    return job.at_prices(load_count_router(job.kept, job.backbone))


def _falling(learning_rate: float) -> LinearSchedule:
    """As the learned router's falls."""
    return LinearSchedule(learning_rate, 0.03 * learning_rate, 1.0)


def _learn(model: BaseAlgorithm, steps: int, progress: Callable[[], object]) -> None:
    """Take `steps` in every lane."""

    def tick(*_: Any) -> bool:
        progress()
        return True

    model.learn(steps * model.n_envs, callback=tick)


def _gating(job: Job, settings: GatingConfig) -> list[RivalPoint]:
    """Back-propagation alone, with the inputs and the compensation of the learned router."""
    from training_run import build_gates

    spec = router_spec(job.config, job.backbone)

    def train(progress: Callable[[], object]) -> None:
        router, parts = LinearRouter(spec).to(next(job.backbone.parameters()).device), (job.corpus, job.backbone)
        trainer = build_gates(replace(job.config, seed=job.seed), settings, router, parts)
        for _ in range(settings.steps):
            trainer.train(1)
            progress()
        save_router(router, job.kept, job.backbone)

    job.train_once(asdict(settings) | {"router": spec.to_json()}, settings.steps, train)
    return job.at_prices(load_router(job.kept, job.backbone))


_LEARNERS: dict[str, Callable[[Job], list[RivalPoint]]] = {
    "gating": lambda job: _gating(job, job.settings.gating),
    "l0-gating": lambda job: _gating(job, job.settings.gating_l0),
    "ada-k": _ada_k,
    "a2c": lambda job: _on_policy(job, job.settings.a2c),
    "reinforce": lambda job: _on_policy(job, job.settings.reinforce),
    "dqn": _dqn,
}
RIVALS: dict[str, Callable[..., list[RivalPoint]]] = {name: partial(train_rival, name) for name in _LEARNERS}
"""Name to `train_rival` of that name: (config, backbone, corpus, seed, folder, progress, settings) to points."""

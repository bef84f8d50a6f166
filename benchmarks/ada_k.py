"""Ada-K's ablations on the default backbone: warm start, and where the cost is paid; a table at equal compute.

python -m benchmarks.ada_k              # about six minutes on two CPU cores

The paper (arXiv:2410.10456) reports, on Qwen1.5-MoE, P-Warm above always-k above no warm start, and the cost in the
loss at least as good as in the reward. Each cell here is a loss in nats a token, interpolated along the curve of
`cost_weights`, mean over seeds with the lowest and the highest. Every variant has as many rollouts of PPO; those of the
warm start come on top.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from envs import CorpusSource, EnvConfig, RoutingVecEnv
from evaluation import Evaluator, Point, Scored, loss_at
from moe_backbone import BackboneConfig, MoETransformer, ranks
from moe_backbone.corpus import Corpus, load_corpus
from moe_backbone.pretrain import PretrainConfig, load_or_train
from policies.ada_k import AdaK, AdaKConfig
from train_rivals import RivalSettings

VARIANTS: dict[str, dict[str, Any]] = {
    "P-Warm, cost in the loss": {},
    "always-k, cost in the loss": {"warm_start": "native_k"},
    "no warm start, cost in the loss": {"warm_start": "none"},
    "P-Warm, cost in the reward": {"cost": "reward"},
}
RULES = EnvConfig(action="count", quality="log_likelihood")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What is trained, and on what it is scored."""

    seeds: tuple[int, ...] = (0, 1)
    """Of counts drawn, minibatches and text."""
    cost_weights: tuple[float, ...] = (0.012, 0.03, 0.08)
    """One policy each."""
    computes: tuple[float, ...] = (0.7, 0.6, 0.5)
    """Fractions of native compute at which variants are compared, the allocators' own cost included."""
    updates: int = 120
    """Rollouts of PPO for each policy."""
    warm_updates: int = 24
    """Rollouts of a warm start, for all policies of a variant and seed together."""
    max_tokens: int = 16_384
    """Test tokens that each policy is scored on."""


def curve(
    env: RoutingVecEnv, evaluator: Evaluator, preset: AdaKConfig, seed: int, weights: Sequence[float], bar: Any
) -> list[Point]:
    """Points of one variant and seed."""
    start = AdaK(env, preset, seed)
    start.warm_up()
    points = []
    for weight in weights:
        learner = AdaK(env, replace(preset, cost_weight=weight), seed, deepcopy(start.router))
        learner.learn(bar.update)
        points.append(evaluator.score("ada-k", learner.router, setting={"cost_weight": weight}, seed=seed))
    return points


def ablate(config: AblationConfig, corpus: Corpus, backbone: MoETransformer) -> Table:
    """Train every variant with every seed, and lay out their losses at equal compute."""
    settings = RivalSettings()
    evaluator = Evaluator(backbone, corpus.test, max_tokens=config.max_tokens)
    shown = Table("variant", *(f"loss at {compute:g}" for compute in config.computes))
    shown.add_row("native, at 1", *[f"{evaluator.native.loss:.4f}"] * len(config.computes))
    lanes, seq_len = settings.ada_k_sequences * backbone.config.seq_len, backbone.config.seq_len
    policies = len(VARIANTS) * len(config.seeds) * len(config.cost_weights)
    with ranks.bar(total=policies * config.updates, desc="ada-k", unit="rollout") as bar:
        for name, changes in VARIANTS.items():
            preset = replace(settings.ada_k, updates=config.updates, warm_updates=config.warm_updates, **changes)
            curves = []
            for seed in config.seeds:
                env = RoutingVecEnv(lanes, backbone, CorpusSource(corpus.train, seq_len), RULES, seed=seed)
                curves.append(curve(env, evaluator, preset, seed, config.cost_weights, bar))
            shown.add_row(name, *(_cell(curves, compute) for compute in config.computes))
    return shown


def _cell(curves: Sequence[Sequence[Point]], compute: float) -> str:
    """Mean over seeds, and the range."""
    losses = [
        loss
        for points in curves
        if (loss := loss_at([Scored.on_one_text(point) for point in points], compute)) is not None
    ]
    if len(losses) < len(curves):
        return "not reached"
    return f"{sum(losses) / len(losses):.4f} [{min(losses):.4f}, {max(losses):.4f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(AblationConfig, description=__doc__, args=arguments)
    corpus = load_corpus()
    backbone = load_or_train(corpus, BackboneConfig(), PretrainConfig())
    Console().print(ablate(config, corpus, backbone))


if __name__ == "__main__":
    main()

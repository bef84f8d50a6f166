"""Weak scaling of data-parallel training: as much work for every rank, on one rank and on several.

python -m benchmarks.scaling              # 1 and 2 ranks, pretraining and PPO, two minutes
python -m benchmarks.scaling --ranks 4    # no more ranks than cores, or they wait for each other's core

One job of all ranks takes turns: the first rank works alone, all ranks work without a word to each other, all ranks
work together. `alone / together` is the efficiency; `alone / beside` is what sharing the machine costs of it, and
`beside / together` what the exchange does. After the last round the weights of all ranks must be equal to the bit, or
nothing is printed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import on_ranks
from commands import ending
from moe_backbone import MoETransformer, ranks
from moe_backbone.checks import require
from moe_backbone.corpus import load_corpus
from moe_backbone.files import write_text_atomic
from moe_backbone.pretrain import Pretraining
from training_config import TrainConfig
from training_run import build_model

WAYS = ("alone", "beside", "together")
Jobs = dict[str, dict[str, Callable[[], object]]]
"""Of every subject, what each way of working runs."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Measure weak scaling."""

    ranks: int = 2
    """Processes, each with a thread."""
    rounds: int = 12
    """Turns of every way of working."""
    train: TrainConfig = TrainConfig(device="cpu")
    """Sizes of the work of one rank."""
    output: Path = Path("runs/scaling.json")
    """Where the figures are kept."""
    worker: Path | None = None
    """Used by the command itself: where the first rank leaves its figures."""


@contextmanager
def by_itself() -> Iterator[None]:
    """In the block this rank is the only one."""
    size, number = ranks.world_size, ranks.rank
    ranks.world_size, ranks.rank = lambda: 1, lambda: 0
    try:
        yield
    finally:
        ranks.world_size, ranks.rank = size, number


def jobs(config: TrainConfig, folder: Path) -> tuple[Jobs, list[Tensor]]:
    """A step of pretraining and an iteration of PPO, each way; and the weights that all ranks must share."""
    corpus = load_corpus(config.corpus, seq_len=config.backbone.seq_len)
    found: Jobs = {}

    def add(subject: str, together: Callable[[], object], apart: Callable[[], object]) -> None:
        def alone() -> None:
            with by_itself():
                apart()

        found[subject] = {"alone": alone, "beside": alone, "together": together}

    own = config.pretrain
    all_ranks = replace(own, sequences=own.sequences * ranks.world_size())
    together, apart = (
        Pretraining(corpus, config.backbone, settings, "cpu", folder / "none") for settings in (all_ranks, own)
    )
    add("step of pretraining", together._train_step, apart._train_step)
    torch.manual_seed(config.seed)
    backbone = MoETransformer(config.backbone).requires_grad_(False).eval()
    # a router that stays as it starts: one that learns to skip would make later rounds cheaper
    still = replace(config, ppo=replace(config.ppo, learning_rate=1e-9))
    models = [build_model(still, backbone, corpus) for _ in range(2)]
    add("iteration of PPO", *(_iteration(model, len(backbone.sites)) for model in models))
    return found, [*together.backbone.parameters(), *models[0].policy.parameters()]


def _iteration(model: Any, num_sites: int) -> Callable[[], object]:
    """One rollout and its updates, on however many ranks there are when it is called."""
    decisions = model.get_env().num_envs * num_sites
    return lambda: model.learn(decisions * ranks.world_size(), reset_num_timesteps=False)


def work(config: ScalingConfig) -> None:
    """What one rank does."""
    assert config.worker is not None
    ranks.join("cpu")
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        found, shared = jobs(config.train, Path(folder))
    for turn in range(config.rounds + 1):
        for subject, ways in found.items():
            for way in WAYS if turn % 2 else reversed(WAYS):
                taken = timed(ways[way] if way != "alone" or ranks.is_first() else None)
                if turn > 0:
                    seconds.setdefault(subject, {}).setdefault(way, []).append(taken)
    weights = ranks.gather(digest(shared))
    require(len(set(weights)) == 1, f"weights of all ranks must be equal to the bit, got {len(set(weights))} versions")
    if ranks.is_first():
        write_text_atomic(config.worker, json.dumps(seconds))


def timed(function: Callable[[], object] | None) -> float:
    """Seconds until the slowest rank is done; all begin at once. None for a rank that waits."""
    ranks.gather(None)
    started = time.perf_counter()
    if function is not None:
        function()
    return max(ranks.gather(time.perf_counter() - started))


def digest(weights: Iterable[Tensor]) -> str:
    """Of the bits."""
    return hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in weights)).hexdigest()


def run(config: ScalingConfig) -> None:
    """Start the job, read what it found, show it."""
    require(config.ranks > 1, f"ranks must be at least 2, got {config.ranks}")
    seconds = on_ranks("benchmarks.scaling", sys.argv[1:], config.ranks)
    Console(width=120).print(table(config.ranks, seconds))
    write_text_atomic(config.output, json.dumps({"ranks": config.ranks, "seconds": seconds}, indent=1) + "\n")


def table(size: int, seconds: dict[str, dict[str, list[float]]]) -> Table:
    """Medians over rounds of the times, and of the ratios within a round."""
    columns = ("ms alone", "beside", "together", "efficiency, quartiles", "of sharing", "of exchange")
    shown = Table("work of a rank", *columns, title=f"weak scaling, {size} ranks", title_justify="left")
    for subject, ways in seconds.items():
        alone, beside, together = (np.array(ways[way]) for way in WAYS)
        low, middle, high = np.quantile(alone / together, (0.25, 0.5, 0.75))
        parts = (f"{np.median(ratio):.2f}" for ratio in (alone / beside, beside / together))
        times = (f"{1e3 * np.median(part):.0f}" for part in (alone, beside, together))
        shown.add_row(subject, *times, f"{middle:.2f} [{low:.2f}, {high:.2f}]", *parts)
    return shown


def main() -> None:
    """Command line."""
    config = tyro.cli(ScalingConfig, description=__doc__)
    with ending():
        work(config) if config.worker is not None else run(config)


if __name__ == "__main__":
    main()

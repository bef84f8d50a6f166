"""Tasks beyond the next byte: backbones, simpler answers, and routers' trade-offs on three of them; one table.

python -m benchmarks.tasks DATA --corpus TEXT        # two and a half hours on one CPU core; a stopped run goes on

DATA holds the folders banking77, ner_wikigold and ner_sec_filings. Each task's backbone, router and report stay in
`output`, where the next call finds what is finished.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

import train_rl
import train_task
from commands import ending
from envs import EnvConfig
from evaluate_rl import EvaluationConfig
from evaluation import load_evaluation, report_console
from moe_backbone.checks import require
from moe_backbone.files import write_text_atomic
from moe_backbone.pretrain import PretrainConfig
from moe_backbone.saved import DESCRIPTION, read_about
from moe_backbone.tasks.tuning import TuningConfig
from policies.gating import GatingConfig
from training_config import PPOConfig, TrainConfig

logger = logging.getLogger("benchmarks.tasks")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a backbone is trained on a task."""

    place: str
    """Where the task lies in the data folder."""
    tuning: TuningConfig
    pretrain_steps: int = 1500


PLANS = {
    "banking77": Plan(place="banking77", tuning=TuningConfig(steps=4500, learning_rate=2e-3)),
    "wikigold": Plan(
        place="ner_wikigold/wikigold.conll.txt",
        tuning=TuningConfig(steps=1200, learning_rate=1.5e-3, text_weight=0.1, hidden_words=0.1),
        pretrain_steps=4000,
    ),
    "sec-filings": Plan(
        place="ner_sec_filings",
        tuning=TuningConfig(steps=400, eval_every=400, learning_rate=1e-3, text_weight=0.3, hidden_words=0.15),
    ),
}
ROUTER = TrainConfig(
    total_timesteps=320_000,
    eval_times=0,
    env=EnvConfig(rollouts_per_sequence=4, price_low=0.002, price_high=1.0),
    warm_start=GatingConfig(steps=400, num_sequences=3),
    ppo=PPOConfig(num_sequences=2),
    evaluation=EvaluationConfig(max_tokens=32_768, selection_tokens=16_384, num_prices=6, routers=("top-k",)),
)
"""Short: most is learned in the warm start. Each byte is paid for the answer that follows it, `credit="token"`."""


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Which tasks, from where, and where to."""

    data: tyro.conf.Positional[Path]
    """Folder of the tasks' folders."""
    corpus: tuple[Path, ...]
    """Text that the backbone is pretrained on."""
    output: Path = Path("runs/tasks")
    """Folder for backbones, routers and the table."""
    tasks: tuple[str, ...] = tuple(PLANS)
    """Names of the tasks to run."""
    tuning_steps: int | None = None
    """Steps of training on each task instead of its own number; None for that."""

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(PLANS)
        require(not unknown, f"tasks must be some of {', '.join(PLANS)}, got {', '.join(sorted(unknown))}")


def finish(name: str, config: TasksConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a task's backbone and its router scored: `about` and `evaluation.json`; made first if they are not there."""
    plan = PLANS[name]
    backbone, run = config.output / name / "backbone", config.output / name / "router"
    task, tuning = config.data / plan.place, plan.tuning
    if config.tuning_steps is not None:
        tuning = replace(tuning, steps=config.tuning_steps)
    if not (backbone / DESCRIPTION).exists():
        pretrain = PretrainConfig(sequences=8, steps=plan.pretrain_steps)
        train_task.run(
            train_task.TaskConfig(task=task, output=backbone, corpus=config.corpus, pretrain=pretrain, tuning=tuning)
        )
    if not (run / "evaluation.json").exists():
        resume = run if (run / "config.json").exists() else None
        train_rl.run(replace(ROUTER, backbone_dir=backbone, task=task, run_dir=run, resume=resume))
    return read_about(backbone), load_evaluation(run / "evaluation.json")


def rows(name: str, about: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of the table: test scores of simple answers and of native routing, then the router at each setting."""
    for score in about["test"]:
        yield name, score["name"], "1" if "native" in score["name"] else "", *_cells(score)
    native = evaluation["native"]
    count = evaluation["corpus"]["tokens"]
    yield name, f"native routing on {count} of them", "1", *_cells(native)
    for point in evaluation["points"]:
        if point["router"] == "learned":
            price = f"learned router, price {point['setting']['price']:.3g}"
            yield name, price, f"{point['compute']:.3f}", *_cells(point)
    reached = evaluation["summary"]["learned"]["compute_at_99_accuracy"]
    yield name, "99 % of native accuracy kept from", "-" if reached is None else f"{reached:.3f}", "", ""


def _cells(score: Mapping[str, Any]) -> tuple[str, str]:
    f1 = score.get("f1")
    return f"{100 * score['accuracy']:.2f}", "" if f1 is None else f"{100 * f1:.2f}"


def run(config: TasksConfig) -> None:
    """Finish every task, print the table and keep its figures."""
    table = Table("task", "answers of", "compute", "accuracy, %", "F1, %", title="Test parts", title_justify="left")
    found: dict[str, Any] = {}
    for name in config.tasks:
        about, evaluation = finish(name, config)
        found[name] = [list(row) for row in rows(name, about, evaluation)]
        for row in found[name]:
            table.add_row(*row)
        table.add_section()
    write_text_atomic(config.output / "tasks.json", json.dumps(found, indent=1) + "\n")
    report_console().print(table, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ending():
        run(tyro.cli(TasksConfig, description=__doc__, args=arguments))


if __name__ == "__main__":
    main()

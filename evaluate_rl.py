"""Score saved routers and baselines on held-out text: table, plot, JSON.

python evaluate_rl.py runs/my-run
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from evaluation import (
    Comparison,
    Evaluator,
    Point,
    build_evaluation,
    compare,
    comparison_table,
    evaluate_all,
    report_console,
    save_figure,
    summarize,
    tradeoff_figure,
    tradeoff_table,
    write_evaluation,
)
from moe_backbone import MoETransformer
from moe_backbone.checks import require_at_least
from moe_backbone.corpus import Corpus
from moe_backbone.files import write_text_atomic
from moe_backbone.pretrain import cache_folder
from policies.baselines import FIXED_NAMES, FixedPoint, fixed_routers
from policies.baselines.greedy import GreedyPoint, GreedySearch
from policies.linear_router import LinearRouter, PricedRouter

COMPUTES = (0.7, 0.6, 0.5, 0.4)
"""Fractions of native compute at which routers are compared."""
GREEDY_VERSION = 1
"""Raised when the search finds other routers on the same text."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is scored.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    max_tokens: int = 24_576
    """Held-out tokens that every router is scored on."""
    num_prices: int = 14
    """Prices at which the learned router is scored, log-spaced over its training range."""
    greedy_tokens: int = 8_192
    """Training tokens that the greedy search and the ranking of heads look at."""
    routers: tuple[str, ...] = ()
    """Only fixed routers whose name starts with one of these; none for all."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_tokens", "num_prices", "greedy_tokens")
        for prefix in self.routers:
            if not any(name.startswith(prefix) for name in FIXED_NAMES):
                raise ValueError(f"routers must name some of {' '.join(FIXED_NAMES)}, got {prefix}")


@dataclass(frozen=True, kw_only=True)
class LearnedPoint:
    """The learned router at one price."""

    learned: LinearRouter
    price: float
    seed: int
    name: str = "learned"

    @property
    def router(self) -> PricedRouter:
        """What decides: the price is folded in, as a user would run it."""
        return self.learned.at_price(self.price)

    @property
    def setting(self) -> dict[str, Any]:
        """What sets this point apart from others of the same router."""
        return {"price": round(self.price, 6)}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that was scored, ready to show."""

    evaluator: Evaluator
    points: list[Point]
    comparisons: list[Comparison]

    @property
    def curves(self) -> dict[str, list[Point]]:
        """Points by router, the learned one first; native is no curve."""
        names = dict.fromkeys(point.router for point in reversed(self.points) if point.router != "native")
        return {name: [point for point in self.points if point.router == name] for name in names}


def evaluate(
    evaluator: Evaluator,
    backbone: MoETransformer,
    corpus: Corpus,
    learned: LinearRouter | None,
    config: EvaluationConfig,
    *,
    seed: int,
) -> Evaluation:
    """Score fixed routers and the learned one on the test documents.

    Args:
        evaluator: From `held_out_evaluator`.
        backbone: Frozen.
        corpus: Its training part serves the greedy search and the ranking of heads.
        learned: None to score fixed routers only.
        config: What is scored.
        seed: Of random routers, and reported for the learned one.
    """
    device = next(backbone.parameters()).device
    windows = corpus.train.windows(backbone.config.seq_len, config.greedy_tokens)
    tokens, targets = (part.to(device) for part in windows[:2])
    wanted = config.routers or ("",)
    greedy = greedy_points(backbone, corpus, tokens, targets) if "greedy".startswith(wanted) else []
    specs: list[FixedPoint | LearnedPoint] = [
        point
        for point in fixed_routers(backbone, tokens, targets, seed=seed, greedy=greedy, wanted=wanted)
        if point.name != "native"
    ]
    if learned is not None:
        prices = np.geomspace(learned.spec.price_low, learned.spec.price_high, config.num_prices)
        specs += [LearnedPoint(learned=learned, price=float(price), seed=seed) for price in prices]
    points = [evaluator.native, *evaluate_all(evaluator, specs)]
    evaluation = Evaluation(evaluator=evaluator, points=points, comparisons=[])
    rivals = evaluation.curves
    ours = rivals.pop("learned", [])
    return Evaluation(evaluator=evaluator, points=points, comparisons=compare(ours, rivals, COMPUTES))


def held_out_evaluator(backbone: MoETransformer, corpus: Corpus, config: EvaluationConfig) -> Evaluator:
    """The test documents, scored natively; made before anything long, so that what cannot work says so at once."""
    device = next(backbone.parameters()).device
    return Evaluator(backbone, corpus.test, max_tokens=config.max_tokens, device=device)


def greedy_points(backbone: MoETransformer, corpus: Corpus, tokens: Tensor, targets: Tensor) -> list[GreedyPoint]:
    """The greedy search's routers on training windows; searched once for a backbone, then kept in the cache."""
    key = f"greedy-{backbone.sha256()[:12]}-{corpus.sha256[:12]}-{tokens.numel()}-v{GREEDY_VERSION}.json"
    path = cache_folder() / key
    if path.exists():
        return [GreedyPoint.from_json(point) for point in json.loads(path.read_text(encoding="utf-8"))]
    points = GreedySearch(backbone, tokens, targets).run()
    write_text_atomic(path, json.dumps([point.to_json() for point in points]))
    return points


def write_report(evaluation: Evaluation, backbone: MoETransformer, corpus: Corpus, folder: Path) -> Figure:
    """Write `evaluation.json`, `tradeoff.png` and `tables.txt`, print the tables, and return the figure."""
    curves, native = evaluation.curves, evaluation.evaluator.native
    chance = [point.accuracy for name in ("random-subset", "random-k") for point in curves.get(name, [])]
    summary = summarize(curves, native_accuracy=native.accuracy, random_accuracy=min(chance, default=0.0))
    content = build_evaluation(
        evaluation.evaluator,
        evaluation.points,
        summary,
        corpus=corpus.name,
        backbone="moe-transformer",
        sha256=backbone.sha256(),
        parameters=backbone.num_parameters,
    )
    write_evaluation(folder / "evaluation.json", content)
    figure = tradeoff_figure(curves, native)
    save_figure(figure, folder / "tradeoff.png")
    text = StringIO()
    for console in (report_console(), report_console(text)):
        console.print(tradeoff_table(curves, native, computes=COMPUTES))
        if evaluation.comparisons:
            console.print(comparison_table(evaluation.comparisons))
    write_text_atomic(folder / "tables.txt", text.getvalue())
    return figure


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score the router of a training run beside the fixed routers."""

    run_dir: tyro.conf.Positional[Path]
    """Folder that `train_rl.py` left."""
    output: Path | None = None
    """Where table, plot and JSON go; the run folder itself if not given."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where there is one."""
    evaluation: EvaluationConfig = EvaluationConfig()


def run(config: EvaluateConfig) -> None:
    """Load the run's backbone and router, score, report."""
    from policies.portable import load_router
    from run_folder import read_config
    from train_rl import TrainConfig, load_parts, pick_device

    trained = read_config(config.run_dir, TrainConfig)
    corpus, backbone = load_parts(trained, pick_device(config.device))
    learned = load_router(config.run_dir, backbone).to(next(backbone.parameters()).device)
    evaluator = held_out_evaluator(backbone, corpus, config.evaluation)
    evaluation = evaluate(evaluator, backbone, corpus, learned, config.evaluation, seed=trained.seed)
    write_report(evaluation, backbone, corpus, config.output or config.run_dir)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(EvaluateConfig, description=__doc__, args=arguments)
    try:
        with logging_redirect_tqdm():  # a line of the log must not cut a progress bar
            run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Score saved routers and baselines: settings are chosen on selection text and reported on held-out text.

python evaluate_rl.py runs/my-run

python evaluate_rl.py runs/my-run --routers all --seeds 5
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from commands import ending
from evaluation import (
    COMPUTES,
    Evaluation,
    Evaluator,
    PointSpec,
    build_evaluation,
    check_native,
    check_seeds,
    group_curves,
    print_and_keep,
    report_parts,
    save_figure,
    score_all,
    tradeoff_figure,
    write_evaluation,
)
from evaluation.headroom import HeadroomPoint, oracle_headroom
from evaluation.html_report import run_provenance, write_html_report
from evaluation.profile import profile_split
from evaluation.showcase import showcase
from families import FAMILIES, native_control, possible, wanted_families
from moe_backbone import Backbone, NativeRouter, ranks
from moe_backbone.checks import require_at_least
from moe_backbone.corpus import Corpus
from moe_backbone.files import locked, write_text_atomic
from moe_backbone.pretrain import cache_folder
from policies.baselines import FIXED_NAMES, FixedPoint, fixed_routers
from policies.baselines.greedy import GreedyPoint, GreedySearch
from policies.linear_router import LinearRouter, PricedRouter

if TYPE_CHECKING:
    from training_config import TrainConfig

logger = logging.getLogger("evaluate_rl")

GREEDY_VERSION = 1
"""Raised when the search finds other routers on the same text."""
ALL, ORACLE = "all", "oracle"


def known_routers() -> tuple[str, ...]:
    """What `routers` can name."""
    return (*FIXED_NAMES, *(family.name for family in FAMILIES), ORACLE)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is scored.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    max_tokens: int = 24_576
    """Held-out tokens, of the test documents, that every router is reported on."""
    selection_tokens: int = 12_288
    """Tokens of the validation documents that choose settings and the best other router."""
    num_prices: int = 14
    """Prices at which the learned router is scored, log-spaced over its training range."""
    greedy_tokens: int = 8_192
    """Training tokens that the greedy search and the ranking of heads look at."""
    routers: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--routers",))] = ()
    """Routers beside the learned one, by name or by how names begin; `all` for every one; none for those that need no
    training. `smaller-native` trains six smaller backbones on first use and must be named."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_tokens", "selection_tokens", "num_prices", "greedy_tokens")
        for prefix in self.routers:
            if prefix != ALL and not any(name.startswith(prefix) for name in known_routers()):
                raise ValueError(f"routers must name some of {' '.join(known_routers())}, or be {ALL}, got {prefix}")

    def wants(self, name: str, *, trained: bool = False, rival: bool = True) -> bool:
        """Whether the router of this name is scored; what is no router at all, only if it is named."""
        if not self.routers or (ALL in self.routers and rival):
            return not trained or ALL in self.routers
        exact = set(self.routers) & set(known_routers())
        return name in exact or name.startswith(tuple(set(self.routers) - exact - {ALL}))


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
class Context:
    """What routers are made from and scored on."""

    backbone: Backbone
    corpus: Corpus
    config: EvaluationConfig
    folder: Path
    """Of the run, with its `config.json`."""
    seeds: tuple[int, ...]
    """Of routers that are trained or drawn."""
    output: Path | None = None
    """Where the report goes; the run folder if None."""
    selection: Evaluator
    held_out: Evaluator

    @cached_property
    def training_windows(self) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens of training text (num_windows, seq_len), int64, for whatever looks at text."""
        device = next(self.backbone.parameters()).device
        windows = self.corpus.train.windows(self.backbone.config.seq_len, self.config.greedy_tokens)
        return windows[0].to(device), windows[1].to(device)


def evaluation_context(
    backbone: Backbone,
    corpus: Corpus,
    config: EvaluationConfig,
    *,
    folder: Path,
    seeds: Sequence[int],
    output: Path | None = None,
) -> Context:
    """Both texts, scored natively; made before anything long, so that what cannot work says so at once."""
    device = next(backbone.parameters()).device
    selection = Evaluator(backbone, corpus.validation, max_tokens=config.selection_tokens, device=device)
    held_out = Evaluator(backbone, corpus.test, max_tokens=config.max_tokens, device=device)
    return Context(
        backbone=backbone,
        corpus=corpus,
        config=config,
        folder=folder,
        seeds=tuple(seeds),
        output=output,
        selection=selection,
        held_out=held_out,
    )


def write_trace(path: Path, router: PricedRouter, context: Context) -> None:
    """Record a router's decisions on all tokens that this evaluation scores."""
    from policies.trace import record

    device = next(context.backbone.parameters()).device
    tokens = torch.cat((context.selection.tokens, context.held_out.tokens)).to(device)
    record(context.backbone, router, tokens).save(path)
    logger.info("trace: decisions on %d tokens are in %s", tokens.numel(), path)


def evaluate(context: Context, learned: Mapping[int, LinearRouter], others: Sequence[PointSpec] = ()) -> Evaluation:
    """Score the learned router and all others that are wanted.

    Args:
        context: From `evaluation_context`.
        learned: The learned router by training seed; empty to score others only.
        others: Further routers to score.
    """
    specs: list[PointSpec] = []
    bounds = set()
    with ranks.first_alone():  # what it searches and trains, the others find
        specs += [*fixed_points(context), *others]
        for family in wanted_families(context):
            made = family.make(context)
            specs += made
            bounds |= {spec.name for spec in made if not family.rival}
    for seed, router in learned.items():
        prices = np.geomspace(router.spec.price_low, router.spec.price_high, context.config.num_prices)
        specs += [LearnedPoint(learned=router, price=float(price), seed=seed) for price in prices]
    scored = score_all(specs, context.selection, context.held_out)
    bounds |= {point.router for point in scored if not point.causal}
    native = context.held_out.native
    checks = check_native(native, context.held_out.score("native", NativeRouter(), setting={}))
    checks += check_seeds(group_curves(scored).get("learned", []), COMPUTES)
    measured = context.config.wants(ORACLE, trained=True) and possible(ORACLE, context) and ranks.is_first()
    return Evaluation(
        selection=context.selection,
        held_out=context.held_out,
        specs=specs,
        scored=scored,
        bounds=frozenset(bounds),
        checks=checks,
        control=native_control(context),
        headroom=_headroom(context) if measured else [],
    )


def _headroom(context: Context) -> list[HeadroomPoint]:
    device = next(context.backbone.parameters()).device
    return oracle_headroom(context.backbone, context.corpus.test, device=device)


def fixed_points(context: Context) -> Iterator[FixedPoint]:
    """Fixed routers that are wanted; those with a seed in their setting for each seed, others once."""
    backbone, (tokens, targets) = context.backbone, context.training_windows
    wanted = [name for name in FIXED_NAMES if context.config.wants(name)]
    greedy = greedy_points(backbone, context.corpus, tokens, targets) if "greedy" in wanted else []
    for seed in context.seeds:
        points = fixed_routers(backbone, tokens, targets, seed=seed, greedy=greedy, wanted=wanted) if wanted else []
        made = [point for point in points if point.name in wanted]  # a name may start with another, `top-k+pruning`
        yield from (point for point in made if seed == context.seeds[0] or "seed" in point.setting)
        wanted = [name for name in wanted if any(point.name == name and "seed" in point.setting for point in made)]
        greedy = []


def greedy_points(backbone: Backbone, corpus: Corpus, tokens: Tensor, targets: Tensor) -> list[GreedyPoint]:
    """The greedy search's routers on training windows; searched once for a backbone, then kept in the cache."""
    meaning = "" if backbone.head_meaning == "query" else f"-{backbone.head_meaning}"
    text = f"{corpus.sha256[:12]}-{len(tokens)}x{tokens.shape[1]}"
    key = f"greedy{meaning}-{backbone.sha256()[:12]}-{len(backbone.sites)}-{text}-v{GREEDY_VERSION}.json"
    path = cache_folder() / key
    if path.exists():
        return [GreedyPoint.from_json(point) for point in json.loads(path.read_text(encoding="utf-8"))]
    points = GreedySearch(backbone, tokens, targets).run()
    write_text_atomic(path, json.dumps([point.to_json() for point in points]))
    return points


def write_report(evaluation: Evaluation, context: Context) -> Figure:
    """Write `evaluation.json`, `tradeoff.png`, `tables.txt` and `report.html`, print the tables, return the figure."""
    backbone, corpus, folder = context.backbone, context.corpus, context.output or context.folder
    content = build_evaluation(
        evaluation,
        corpus=corpus.name,
        backbone=backbone.name,
        sha256=backbone.sha256(),
        parameters=backbone.num_parameters,
    )
    write_evaluation(folder / "evaluation.json", content)
    figure = tradeoff_figure(evaluation.curves, evaluation.held_out.native, headroom=evaluation.headroom)
    save_figure(figure, folder / "tradeoff.png")
    parts = list(report_parts(evaluation))
    print_and_keep(parts, folder / "tables.txt")
    profile, passage = profile_split(
        backbone,
        corpus.test,
        showcase(
            evaluation.specs,
            [scored.selection for scored in evaluation.scored],
            best=next((row.rival for row in evaluation.comparisons if row.best and row.compute == 0.5), None),
            bounds=evaluation.bounds,
        ),
        seq_len=backbone.config.seq_len,
        device=next(backbone.parameters()).device,
    )
    write_html_report(
        folder / "report.html",
        evaluation=content,
        parts=parts,
        tradeoff=figure,
        profile=profile,
        passage=passage,
        provenance=run_provenance(context.folder, corpus, command=sys.argv, seeds=context.seeds),
    )
    return figure


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score the router of a training run beside every other."""

    run_dir: tyro.conf.Positional[Path]
    """Folder that `train_rl.py` left."""
    output: Path | None = None
    """Where table, plot and JSON go; the run folder itself if not given."""
    seeds: int = 1
    """Seeds of learned and random routers, counted from the run's own; missing ones are trained first."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where there is one."""
    trace: Path | None = None
    """File, `.npz`, to write the learned router's decisions on all scored tokens to, as vLLM captures routed experts:
    tokens x layers x k."""
    trace_cost_limit: float = 0.5
    """Budget of the router that `trace` records."""
    replay: Path | None = None
    """File that `trace` wrote, whose decisions are scored as one more router."""
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        require_at_least(self, 1, "seeds")


def learned_routers(run_dir: Path, trained: TrainConfig, context: Context) -> dict[int, LinearRouter]:
    """The learned router of each seed, trained first where it is missing; an interrupted training goes on.

    Args:
        run_dir: The run; other seeds lie in `seeds/<seed>/`.
        trained: Settings of the run.
        context: Its seeds are made, on its device.
    """
    from policies.portable import DESCRIPTION, WEIGHTS, load_router
    from run_folder import describe_run
    from training_run import train_router

    if trained.adapt_backbone and len(context.seeds) > 1:
        raise ValueError(
            f"seeds must be 1 for a run with an adapted backbone, as each has its own, got {len(context.seeds)}"
        )
    device = next(context.backbone.parameters()).device
    folders = {seed: run_dir if seed == trained.seed else run_dir / "seeds" / str(seed) for seed in context.seeds}
    missing = [
        seed
        for seed, folder in folders.items()
        if folder != run_dir and not ((folder / WEIGHTS).exists() and (folder / DESCRIPTION).exists())
    ]
    for number, seed in enumerate(missing, 1):
        logger.info("training the router with seed %d, %d of %d", seed, number, len(missing))
        config = replace(trained, seed=seed, eval_times=0)
        folders[seed].mkdir(parents=True, exist_ok=True)
        with locked(folders[seed], "run folder"):
            describe_run(folders[seed], config)
            train_router(config, folders[seed], context.corpus, context.backbone)
    return {seed: load_router(folder, context.backbone).to(device) for seed, folder in folders.items()}


def run(config: EvaluateConfig) -> None:
    """Load the run's backbone and router, train what is missing, score, report.

    Raises:
        ValueError: If native routing, scored twice, gave two scores.
    """
    from policies.portable import load_router
    from policies.trace import replay_point
    from train_rl import load_run, pick_device

    trained, corpus, backbone = load_run(config.run_dir, ranks.join(pick_device(config.device)))
    load_router(config.run_dir, backbone)  # refuse before anything long
    seeds = range(trained.seed, trained.seed + config.seeds)
    where: dict[str, Any] = {"folder": config.run_dir, "seeds": seeds, "output": config.output}
    context = evaluation_context(backbone, corpus, config.evaluation, **where)
    replayed = [] if config.replay is None else [replay_point(config.replay, backbone)]
    learned = learned_routers(config.run_dir, trained, context)
    if config.trace is not None and ranks.is_first():
        write_trace(config.trace, learned[trained.seed].at_cost_limit(config.trace_cost_limit), context)
    evaluation = evaluate(context, learned, replayed)
    if ranks.is_first():
        write_report(evaluation, context)
    if any(check.exact and not check.equal for check in evaluation.checks):
        raise ValueError("native routing must score the same twice, got another score: no figure above can be trusted")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if arguments is None else list(arguments)
    config = tyro.cli(EvaluateConfig, description=__doc__, args=words)
    with ending(f"go on with: {shlex.join(['python', 'evaluate_rl.py', *words])}"):
        run(config)


if __name__ == "__main__":
    main()

"""Recipes side by side, a table for each group.

python -m benchmarks.recipes router      # how the router learns, one change at a time
python -m benchmarks.recipes price       # one router for all prices, or one for each
python -m benchmarks.recipes backbone    # how its backbone is trained, and what a router reaches on it

Every row trains the router of a run with each seed, scores it at many prices, router cost counted, and gives absolute
losses in nats a token at equal compute: means over seeds with the lowest and the highest. What is trained is kept in
the output folder, where the next call finds it. `--text validation` is for choosing, `--text test` for reporting.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from commands import ending
from evaluate_rl import LearnedPoint
from evaluation import Evaluator, Scored, average_quality, compute_at_accuracy, frontier, loss_at
from evaluation.curves import Curve
from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.corpus import Corpus, load_corpus
from moe_backbone.files import write_text_atomic
from moe_backbone.pretrain import PretrainConfig, load_weights
from policies.portable import WEIGHTS, load_router
from run_folder import describe_run
from training_config import TrainConfig
from training_run import ADAPTED, load_backbone, train_router, tuned_natively

Change = Callable[[TrainConfig], TrainConfig]
REFERENCE = "default"


def _env(**values: Any) -> Change:
    return lambda config: replace(config, env=replace(config.env, **values))


def _gates(**values: Any) -> Change:
    return lambda config: replace(config, warm_start=replace(config.warm_start, **values))


def _ppo(**values: Any) -> Change:
    return lambda config: replace(config, ppo=replace(config.ppo, **values))


def _pretrain(**values: Any) -> Change:
    return lambda config: replace(config, pretrain=replace(config.pretrain, **values))


def _adapt(steps: int) -> Change:
    return lambda config: replace(config, adapt_backbone=steps)


LATE = 2 / 3
"""Share of pretraining that passes before late random routing."""
LONGER = 1200
"""Steps that a backbone is trained on, under the router or natively: the same, since one is held against the other."""
GROUPS: dict[str, dict[str, Change]] = {
    "router": {
        REFERENCE: lambda config: config,
        "no compensation": lambda config: replace(config, compensation=False),
        "sharpness 1": _gates(sharpness=(1.0, 1.0)),
        "no gates": _gates(steps=0, per_update=0),
        "critic, no leave-one-out": _ppo(advantage="gae"),
        "quality log-likelihood": _env(quality="log_likelihood"),
        "quality accuracy": _env(quality="accuracy"),
    },
    "price": {
        REFERENCE: lambda config: config,
        **{f"price {price} only": _env(price_low=price, price_high=price) for price in (0.03, 0.1, 0.3, 1.0)},
    },
    "backbone": {
        REFERENCE: lambda config: config,
        "random routing throughout": _pretrain(random_routing=0.5),
        "late random routing": _pretrain(random_routing=0.5, random_from=LATE),
        "late, share grows": _pretrain(random_routing=1.0, random_from=LATE, random_schedule="linear"),
        "late, consistency 1": _pretrain(random_routing=0.5, random_from=LATE, consistency=1.0),
        "late, heads of a sequence": _pretrain(random_routing=0.5, random_from=LATE, random_units=("sequence_heads",)),
        "late, depth only": _pretrain(random_routing=0.5, random_from=LATE, random_units=("depth",)),
        "late, random experts": _pretrain(random_routing=0.5, random_from=LATE, random_units=("experts",)),
        "longer, native": _adapt(LONGER),
        "longer, under the learned router": _adapt(LONGER),
    },
}
CONTROL = "longer, native"
"""The row that trains its backbone on without a router; its router is trained on the result."""


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """Which rows, and how much each may spend."""

    group: tyro.conf.Positional[Literal["router", "price", "backbone"]]
    """What is changed."""
    output: Path = Path("runs/recipes")
    """Where routers and scores are kept."""
    only: tuple[str, ...] = ()
    """Rows by how their names begin; none for all."""
    seeds: tuple[int, ...] = (0,)
    """Of routers; the backbone has one."""
    total_timesteps: int = 2_000_000
    """Decisions that PPO learns from."""
    gate_steps: int = 300
    """Steps of gates before PPO."""
    text: Literal["validation", "test"] = "validation"
    """Documents that are scored."""
    max_tokens: int = 16_384
    """Tokens that are scored."""
    num_prices: int = 10
    """Prices that each router is scored at."""
    computes: tuple[float, ...] = (0.7, 0.6, 0.5, 0.4)
    """Fractions of native compute that the table shows."""
    corpus: tuple[Path, ...] = ()
    """Files and folders of text; none for the source of the Python standard library."""
    backbone: BackboneConfig = BackboneConfig()
    pretrain: PretrainConfig = PretrainConfig()

    def base(self) -> TrainConfig:
        """What every row changes."""
        sizes = {"corpus": self.corpus, "backbone": self.backbone, "pretrain": self.pretrain}
        config = TrainConfig(total_timesteps=self.total_timesteps, eval_times=0, **sizes)  # type: ignore[arg-type]
        return replace(config, warm_start=replace(config.warm_start, steps=self.gate_steps))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe."""

    curves: list[Curve]
    """Of the routers, one for each seed."""
    native: list[float]
    """Native losses of their backbones, nats a token."""


def train(name: str, config: TrainConfig, corpus: Corpus, folder: Path) -> MoETransformer:
    """Train backbone and router of a recipe unless they are there; returns the backbone that the router is for."""
    backbone = tuned_natively(config, corpus, "cpu") if name == CONTROL else load_backbone(config, corpus, "cpu")
    if name == CONTROL:
        config = replace(config, adapt_backbone=0)
    if not (folder / WEIGHTS).exists():
        describe_run(folder, config)
        trained = train_router(config, folder, corpus, backbone).backbone
        assert isinstance(trained, MoETransformer)
        return trained
    if config.adapt_backbone:
        load_weights(backbone, folder / ADAPTED)
    return backbone


def measure(config: RecipesConfig, name: str, corpus: Corpus) -> Row:
    """Train and score one recipe with every seed."""
    row = Row(curves=[], native=[])
    for seed in config.seeds:
        settings = replace(GROUPS[config.group][name](config.base()), seed=seed)
        folder = config.output / name.replace(" ", "-").replace(",", "") / str(seed)
        logging.info("%s, seed %d: %s", name, seed, folder)
        backbone = train(name, settings, corpus, folder)
        split = corpus.test if config.text == "test" else corpus.validation
        evaluator = Evaluator(backbone, split, max_tokens=config.max_tokens)
        router = load_router(folder, backbone)
        low, high = settings.env.price_low, settings.env.price_high
        prices = np.geomspace(low, high, config.num_prices if high > low else 1)
        specs = [LearnedPoint(learned=router, price=float(price), seed=seed) for price in prices]
        points = [evaluator.score(spec.name, spec.router, setting=spec.setting, seed=seed) for spec in specs]
        row.curves.append([Scored.on_one_text(point) for point in points])
        row.native.append(evaluator.native.loss)
    return row


def one_curve_of_all(rows: dict[str, Row]) -> dict[str, Row]:
    """The reference, and the routers of one price each as one curve for each seed."""
    single = [row for name, row in rows.items() if name != REFERENCE]
    curves: list[Curve] = [
        [point for curve in seed for point in curve] for seed in zip(*(row.curves for row in single), strict=True)
    ]
    reference = rows[REFERENCE]
    return {REFERENCE: reference, "a router for each price": Row(curves=curves, native=reference.native)}


def compute_for(curve: Curve, loss: float) -> float:
    """Least compute at which a curve reaches a loss, linear between settings; NaN where it never does."""
    points = frontier(curve)
    computes = np.array([point.held_out.compute for point in points])
    losses = np.minimum.accumulate([point.held_out.loss for point in points])
    if losses[-1] > loss:
        return float("nan")
    return float(np.interp(-loss, -losses, computes))


def _cell(values: Sequence[float | None], digits: int = 4) -> str:
    """Mean, and the range where there are several."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if len(known) < len(values):
        return "-"
    spread = f" [{min(known):.{digits}f}, {max(known):.{digits}f}]" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{spread}"


def table(config: RecipesConfig, rows: dict[str, Row]) -> tuple[Table, dict[str, Any]]:
    """What each recipe reaches, and the compute at which it has the loss of the reference at .6 and .5."""
    compared = [compute for compute in (0.6, 0.5) if config.group == "backbone"]
    shown = Table("recipe", "native", *(f"loss at {compute:g}" for compute in config.computes), "99 % at", "AIQ")
    for compute in compared:
        shown.add_column(f"same loss as at {compute:g}")
    content: dict[str, Any] = {}
    for name, row in rows.items():
        reference = rows[CONTROL if name.startswith("longer") and CONTROL in rows else REFERENCE]
        found: dict[str, list[float | None]] = {"native": [*row.native]}
        found |= {f"loss at {c:g}": [loss_at(curve, c) for curve in row.curves] for c in config.computes}
        found["99 % at"] = [compute_at_accuracy(curve) for curve in row.curves]
        found["AIQ"] = [average_quality(curve, 1.0) for curve in row.curves]
        for compute in compared:
            goals = [loss_at(curve, compute) for curve in reference.curves]
            goal = float(np.mean([value if value is not None else np.nan for value in goals]))
            found[f"same loss as at {compute:g}"] = [compute_for(curve, goal) for curve in row.curves]
        digits = {key: 4 if key in ("native", "AIQ") or key.startswith("loss") else 3 for key in found}
        shown.add_row(name, *(_cell(values, digits[key]) for key, values in found.items()))
        content[name] = found
    return shown, content


def run(config: RecipesConfig) -> None:
    """Train and score what is wanted, print the table and keep its figures."""
    wanted = [name for name in GROUPS[config.group] if not config.only or name.startswith(config.only)]
    corpus = load_corpus(config.corpus, seq_len=config.backbone.seq_len)
    rows: dict[str, Row] = {}
    for name in [REFERENCE, *(name for name in wanted if name != REFERENCE)]:
        rows[name] = measure(config, name, corpus)
    if config.group == "price":
        rows = one_curve_of_all(rows)
    shown, content = table(config, rows)
    Console(width=200).print(shown)
    path = config.output / f"{config.group}-{config.text}.json"
    write_text_atomic(path, json.dumps(content, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(RecipesConfig, description=__doc__, args=arguments)
    with ending("the same command goes on"):
        run(config)


if __name__ == "__main__":
    main()

"""Quantisation and pruning beside routing: each alone and together with a run's learned router, in bit-operations.

python -m benchmarks.compression RUN                          # RUN: folder that train_rl.py left
python -m benchmarks.compression RUN --students OUT/students/kl-2   # and students of benchmarks.distillation

Settings are chosen on validation documents and reported on test documents. Rows that are finished stay in the output
folder: stopped, the command goes on after them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from benchmarks.compression_rows import WIDTH, Row, RowFile, Scorer, own_run, rise
from evaluate_rl import greedy_points
from evaluation import (
    at_compute,
    frontier,
    log_likelihood_difference,
    print_and_keep,
    save_figure,
    summarize,
    tradeoff_figure,
    tradeoff_table,
)
from moe_backbone import MoETransformer, Router, ranks
from moe_backbone.checks import require
from moe_backbone.compression import quantize, unit_magnitudes
from moe_backbone.corpus import Corpus
from moe_backbone.files import write_text_atomic
from moe_backbone.saved import load_saved
from policies.baselines import ExpertPruning, TopK, UnitPruning, prune_share
from policies.baselines.calibration import Calibration
from policies.compensated import CompensatedRouter
from policies.linear_router import LinearRouter
from policies.portable import WEIGHTS, load_router
from policies.threshold_table import ThresholdTable, fit_table, load_table

logger = logging.getLogger(__name__)

ROWS = "rows.json"
BITS = {"full": 32, "int8": 8, "int4": 4}
COMPUTES = (0.8, 0.6, 0.5, 0.3, 0.25, 0.2, 0.16)
"""Bit-operations at which lines are compared, fractions of the full native model's."""
DRAWN = (
    *("learned, int8", "quantised", "learned, int4", "learned", "greedy", "threshold table, int8", "pruned, int8"),
    *("greedy, int8", "learned, pruned, int8", "pruned", "student, int8"),
)
"""Lines of the figure: the first on top, the next six in colour."""
TICKS = (0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
GREEDY_POINTS = 8


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Score quantised, pruned and routed models on the same text."""

    run: tyro.conf.Positional[Path]
    """Folder of a run of `train_rl.py`."""
    output: Path | None = None
    """Where rows, tables and the figure go; `compression` in the run's folder if None."""
    students: tuple[Path, ...] = ()
    """Folders of `save_backbone`, such as `benchmarks.distillation` leaves, to score beside the run's backbone."""
    num_prices: int = 5
    """Prices of the learned router, log-spaced over its training range."""
    shares: tuple[float, ...] = (0.875, 0.75, 0.5)
    """Shares of heads and experts that pruning keeps."""
    fit_tokens: int = 8_192
    """Training tokens that importance and threshold tables are fitted on."""
    selection_tokens: int = 8_192
    """Validation tokens that choose settings."""
    max_tokens: int = 16_384
    """Test tokens that are reported."""
    report_only: bool = False
    """Score nothing: tables and figure of the rows that an earlier, perhaps stopped, command has left."""


@dataclass(kw_only=True)
class Subject:
    """A run's backbone and router, and what is fitted to them."""

    corpus: Corpus
    backbone: MoETransformer
    learned: LinearRouter
    config: CompressionConfig
    folder: Path
    scorer: Scorer = field(init=False)
    rows: RowFile = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.scorer = Scorer(self.backbone, self.corpus, config.selection_tokens, config.max_tokens)
        for name in ("int8", "int4"):
            self.scorer.add(name, quantize(self.backbone, BITS[name]).dequantized(), BITS[name])  # type: ignore[arg-type]
        texts = {name: getattr(config, name) for name in ("fit_tokens", "selection_tokens", "max_tokens")}
        router = hashlib.sha256((config.run / WEIGHTS).read_bytes()).hexdigest()
        about = {"backbone": self.backbone.sha256(), "corpus": self.corpus.sha256, "router": router, **texts}
        self.rows = RowFile(self.folder / ROWS, about)

    @property
    def prices(self) -> list[float]:
        """At which the learned router and its tables are scored."""
        spec = self.learned.spec
        return [float(price) for price in np.geomspace(spec.price_low, spec.price_high, self.config.num_prices)]

    @cached_property
    def training_text(self) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens (num_windows, seq_len), int64."""
        return self.corpus.train.windows(self.backbone.config.seq_len, self.config.fit_tokens)[:2]

    @cached_property
    def importance(self) -> Mapping[str, Mapping[int, Tensor]]:
        """Of every unit by rule and site: its norm, the loss without it, or (experts) its share of the gate."""
        path = self.folder / "importance.json"
        if not path.exists():
            text = Calibration(self.backbone, *self.training_text, seed=0)
            loss = {**text.head_importance, **text.expert_importance}
            found = {"magnitude": unit_magnitudes(self.backbone), "loss": loss, "mass": loss | dict(text.routing_mass)}
            listed = {rule: {site: of.tolist() for site, of in sites.items()} for rule, sites in found.items()}
            write_text_atomic(path, json.dumps(listed) + "\n")
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            rule: {int(site): torch.tensor(of, dtype=torch.float64) for site, of in sorted(sites.items())}
            for rule, sites in content.items()
        }

    def table(self, price: float) -> ThresholdTable:
        """The learned router at a price as a table, kept in a file."""
        path = self.folder / "tables" / f"price-{price:.4f}.json"
        if not path.exists():
            fit_table(self.learned.at_price(price), self.backbone, self.training_text[0], price).save(
                path, self.backbone
            )
        return load_table(path, self.backbone)

    def row(self, line: str, backbone: str, router: Router | None, setting: Mapping[str, Any]) -> Row:
        """One row, scored unless it is kept; lines on a quantised backbone say so."""
        name = line if backbone == "full" or router is None else f"{line}, {backbone}"
        return self.rows.get(
            name, {**setting, "on": backbone}, lambda: self.scorer.score(name, backbone, router, setting)
        )


def baselines(subject: Subject) -> Iterator[Row]:
    """No learning: fewer bits, fewer experts, greedy search."""
    for backbone in BITS:
        yield subject.row("quantised", backbone, None, {})
    for k in range(1, subject.backbone.config.top_k):
        for backbone in ("full", "int8"):
            yield subject.row("top-k", backbone, TopK(k=k), {"k": k})
    points = greedy_points(subject.backbone, subject.corpus, *subject.training_text)
    for step in sorted({round(place) for place in np.linspace(0, len(points) - 1, GREEDY_POINTS)}):
        for backbone in ("full", "int8"):
            yield subject.row("greedy", backbone, points[step].router, {"step": step})


def pruned(subject: Subject) -> Iterator[Row]:
    """Units that are gone for all tokens; int8 under the rule that is best on validation text."""
    for share in subject.config.shares:
        for rule in subject.importance:
            yield subject.row("pruned", "full", _static(subject, rule, share), {"keep": share, "by": rule})
    rule = _best_rule(subject)
    for share in subject.config.shares:
        yield subject.row("pruned", "int8", _static(subject, rule, share), {"keep": share, "by": rule})


def _static(subject: Subject, rule: str, share: float) -> Router:
    """Native routing among the kept units."""
    sites = subject.backbone.sites
    kept = prune_share(sites, subject.importance[rule], share)
    of = {
        kind: {index: units for index, units in kept.items() if sites[index].kind == kind}
        for kind in ("heads", "experts")
    }
    return UnitPruning(ExpertPruning(of["experts"]), of["heads"])


def _best_rule(subject: Subject) -> str:
    """By the mean validation loss over all shares."""
    losses: dict[str, list[float]] = {}
    for row in subject.rows.rows.values():
        if row.router == "pruned":
            losses.setdefault(row.selection.setting["by"], []).append(row.selection.loss)
    return min(losses, key=lambda rule: float(np.mean(losses[rule])))


def learned(subject: Subject) -> Iterator[Row]:
    """The router alone, on quantised models, over mildly pruned units, and as a table."""
    rule, share = _best_rule(subject), max(subject.config.shares)
    for price in subject.prices:
        router, setting = subject.learned.at_price(price), {"price": round(price, 4)}
        for backbone in BITS:
            yield subject.row("learned", backbone, router, setting)
        masked = UnitPruning(router, prune_share(subject.backbone.sites, subject.importance[rule], share))
        for backbone in ("full", "int8"):
            yield subject.row("learned, pruned", backbone, masked, {**setting, "keep": share, "by": rule})
        table = subject.table(price)
        for backbone in ("full", "int8"):
            yield subject.row("threshold table", backbone, table, setting)
        if router.compensation is not None:
            constants = CompensatedRouter(table, router.compensation)
            yield subject.row("threshold table, constants", "full", constants, setting)


def students(subject: Subject) -> Iterator[Row]:
    """Backbones with fewer experts, run natively."""
    for folder in subject.config.students:
        student = load_saved(folder)
        require(
            student.config.vocab_size == subject.backbone.config.vocab_size,
            f"students must have the run's vocabulary of {subject.backbone.config.vocab_size}, got {folder}",
        )
        for bits in (32, 8):
            line, model = "student", student
            if bits == 8:
                line, model = "student, int8", quantize(student, 8).dequantized()
            name = f"{folder.name}-{bits}"
            setting = {"student": folder.name, "k": student.config.top_k, "sha256": student.sha256()[:12]}

            def make(name: str = name, model: MoETransformer = model, bits: int = bits, line: str = line) -> Row:
                subject.scorer.add(name, model, bits)
                return subject.scorer.score(line, name, None, setting)  # noqa: B023  # called before the next

            yield subject.rows.get(line, setting, make)


def score(subject: Subject) -> dict[str, list[list[Row]]]:
    """All rows by line, behind a progress bar; those that are kept pass at once."""
    lines: dict[str, list[list[Row]]] = {}
    with ranks.bar(desc="compression", unit="row") as bar:
        for part in (baselines, pruned, learned, students):
            for row in part(subject):
                lines.setdefault(row.router, [[]])[0].append(row)
                bar.set_postfix_str(row.router)
                bar.update()
    return lines


def rows_table(lines: Mapping[str, Sequence[Sequence[Row]]]) -> Table:
    """Every setting that validation text chose, with its test scores."""
    table = Table(title="Settings chosen on validation text, scored on test text; compute over the full native model's")
    table.add_column("line")
    table.add_column("setting")
    for name in ("bit-ops", "FLOPs routed", "MB", "accuracy", "loss", "rise of the loss [95 %]"):
        table.add_column(name, justify="right")
    for name, (curve,) in lines.items():
        for row in frontier(curve):
            assert isinstance(row, Row)
            point = row.held_out
            shown = " ".join(f"{key} {value}" for key, value in point.setting.items() if key not in ("bits", "sha256"))
            cells = [f"{point.compute:.3f}", f"{row.flops:.3f}", f"{row.megabytes:.2f}"]
            cells += [f"{point.accuracy:.4f}", f"{point.loss:.4f}", rise(point)]
            table.add_row(name, f"{shown} {point.setting['bits']} bits", *cells)
        table.add_section()
    return table


def kept_gain_table(lines: Mapping[str, Sequence[Sequence[Row]]]) -> Table:
    """What a threshold table keeps of the learned router's gain over greedy search and over top-k."""
    table = Table(title="Threshold tables at equal bit-operations: loss in nats; gain over a rival that is kept")
    for name in ("line", "price", "bit-ops", "table", "learned", "greedy", "top-k", "kept of the gain over greedy",
                 "kept over top-k", "table minus greedy [95 %]"):  # fmt: skip
        table.add_column(name, justify="left" if name == "line" else "right")
    for line in ("threshold table", "threshold table, constants"):
        for row in frontier(lines.get(line, [[]])[0]):
            point = row.held_out
            others = {name: at_compute(lines[name][0], point.compute) for name in ("learned", "greedy", "top-k")}
            losses = {name: None if sums is None else -sums.mean_log_likelihood for name, sums in others.items()}
            cells = ["-" if loss is None else f"{loss:.4f}" for loss in losses.values()]
            kept = [_kept(point.loss, losses["learned"], losses[rival]) for rival in ("greedy", "top-k")]
            gap = "-"
            if others["greedy"] is not None:
                found = log_likelihood_difference(others["greedy"], point.documents)
                gap = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
            price = f"{point.setting['price']:.4f}"
            table.add_row(line, price, f"{point.compute:.3f}", f"{point.loss:.4f}", *cells, *kept, gap)
    return table


def _kept(loss: float, best: float | None, rival: float | None) -> str:
    if best is None or rival is None or rival - best < 1e-3:
        return "-"
    return f"{100 * (rival - loss) / (rival - best):.0f} %"


def figure(lines: Mapping[str, Sequence[Sequence[Row]]], native: Row) -> Figure:
    """Accuracy and log-likelihood against bit-operations."""
    shown = {name: lines[name] for name in DRAWN if name in lines}
    drawn = tradeoff_figure(shown, native.held_out, learned="learned, int8")
    for axes in drawn.axes:
        axes.set_xlabel("Bit-operations (fraction of the full native model's)")
        axes.set_xscale("log")
        axes.set_xlim(0.11, 1.05)
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
    drawn.suptitle(
        "Held-out quality at equal bit-operations; bands: 95 % interval of the difference to native", fontsize=11
    )
    return drawn


def report(lines: dict[str, list[list[Row]]], folder: Path) -> None:
    """Write `compression.json`, `compression.png` and `tables.txt`, and print the tables."""
    native = lines["quantised"][0][0]  # the first row that is scored: all bits, native routing
    summary = summarize(lines, random_accuracy=0.0)
    equal = tradeoff_table(lines, native.held_out, summary, computes=COMPUTES)
    equal.title = "Test loss in nats, change from native, % of native accuracy kept; by bit-operations"
    print_and_keep([rows_table(lines), equal, kept_gain_table(lines)], folder / "tables.txt", width=WIDTH)
    points = [
        {**row.to_json(), "flops": row.flops, "megabytes": row.megabytes}
        for (curve,) in lines.values()
        for row in curve
    ]
    content = {"native": native.to_json() | {"megabytes": native.megabytes}, "points": points, "summary": summary}
    write_text_atomic(folder / "compression.json", json.dumps(content, indent=1) + "\n")
    save_figure(figure(lines, native), folder / "compression.png")


def kept_rows(folder: Path) -> dict[str, list[list[Row]]]:
    """Rows of an output folder by line, the full native model among them.

    Raises:
        ValueError: If there are none.
    """
    path = folder / ROWS
    require(path.exists(), f"output must hold {ROWS} to report on, got {folder}")
    lines: dict[str, list[list[Row]]] = {}
    for row in RowFile(path).rows.values():
        lines.setdefault(row.router, [[]])[0].append(row)
    return lines


def load_subject(config: CompressionConfig, folder: Path) -> Subject:
    """The run's parts.

    Raises:
        ValueError: If it is no run on a backbone of our own.
    """
    corpus, backbone = own_run(config.run)
    router = load_router(config.run, backbone)
    folder.mkdir(parents=True, exist_ok=True)
    return Subject(corpus=corpus, backbone=backbone, learned=router, config=config, folder=folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(CompressionConfig, description=__doc__, args=arguments)
    folder = config.output or config.run / "compression"
    try:
        lines = kept_rows(folder) if config.report_only else score(load_subject(config, folder))
        report(lines, folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    logger.info("rows, tables and compression.png are in %s", folder)


if __name__ == "__main__":
    main()

"""`evaluation.json`, and the same as tables for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evaluation.compare import Comparison, at_compute, compute_at_accuracy
from evaluation.evaluator import Evaluator
from evaluation.intervals import DocumentSums, Interval
from evaluation.points import Point
from moe_backbone.files import write_text_atomic

SCHEMA = 1
KEYS = {"schema", "corpus", "backbone", "native", "points", "summary"}
"""Top-level keys of `evaluation.json`."""
COMPUTES = (0.7, 0.6, 0.5, 0.4)
"""Fractions of native compute that the tables show."""
PIPED_WIDTH = 100
"""Columns where the output is not a terminal."""
NAME_WIDTH = 17
"""Columns after which a router's name goes on in the next line, so that the numbers keep theirs."""


def build_evaluation(
    evaluator: Evaluator,
    points: Sequence[Point],
    summary: Mapping[str, Mapping[str, float | None]],
    *,
    corpus: str,
    backbone: str,
    sha256: str,
    parameters: int,
) -> dict[str, Any]:
    """The content of `evaluation.json`, schema 1.

    Args:
        evaluator: Holds the held-out windows and the native scores.
        points: Points of all routers.
        summary: From `summarize`.
        corpus: Name of the corpus.
        backbone: Name of the backbone.
        sha256: Hash of its weights.
        parameters: Trained numbers in it.
    """
    return {
        "schema": SCHEMA,
        "corpus": {
            "name": corpus,
            "split": evaluator.split.name,
            "tokens": evaluator.num_tokens,
            "documents": evaluator.num_documents,
        },
        "backbone": {
            "name": backbone,
            "sha256": sha256,
            "parameters": parameters,
            "sites": [site.name for site in evaluator.sites],
        },
        "native": {"accuracy": evaluator.native.accuracy, "log_likelihood": evaluator.native.log_likelihood},
        "points": [point.to_json() for point in points],
        "summary": {name: dict(entry) for name, entry in summary.items()},
    }


def write_evaluation(path: Path, evaluation: Mapping[str, Any]) -> None:
    """Write `evaluation.json` whole or not at all.

    Raises:
        ValueError: If a number is not finite.
    """
    write_text_atomic(path, json.dumps(evaluation, indent=2, allow_nan=False) + "\n")


def load_evaluation(path: Path) -> dict[str, Any]:
    """Read `evaluation.json`.

    Raises:
        ValueError: If the file is not JSON of schema 1.
    """
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"evaluation must be a JSON file, got {path}: {error}") from None
    schema = evaluation.get("schema") if isinstance(evaluation, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {schema!r} in {path}")
    if set(evaluation) != KEYS:
        raise ValueError(f"evaluation must have the keys {sorted(KEYS)}, got {sorted(evaluation)} in {path}")
    return evaluation


def report_console(file: IO[str] | None = None) -> Console:
    """A console as wide as the terminal, or 100 columns where the output goes elsewhere."""
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=PIPED_WIDTH)


def tradeoff_table(
    curves: Mapping[str, Sequence[Point]], native: Point, *, computes: Sequence[float] = COMPUTES
) -> Table:
    """One row for each router: held-out loss, difference to native and accuracy retained at equal compute.

    Args:
        curves: Points of each router by name.
        native: The point of native routing.
        computes: Fractions of native compute, one column each.
    """
    table = _table("Held-out loss in nats, change from native, % of native accuracy kept; by compute", "router")
    for compute in computes:
        table.add_column(f"at {compute:.2f}", justify="right")
    table.add_column("99% at", justify="right")
    facts = [f"loss {native.loss:.4f}", f"accuracy {native.accuracy:.4f}", f"compute {native.compute:.2f}"]
    cells = (facts + [""] * len(computes))[: len(computes)]
    table.add_row("native", *cells, f"{native.compute:.3f}", end_section=True)
    for name, points in curves.items():
        cells = [_cell(at_compute(points, compute), native) for compute in computes]
        reached = compute_at_accuracy(points, native.accuracy)
        style = "bold" if name == "learned" else None
        table.add_row(name, *cells, "-" if reached is None else f"{reached:.3f}", style=style)
    table.caption = "99% at: least compute that keeps 99% of native accuracy.  -: this router costs more."
    return table


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """The learned router against the best fixed one, one row for each compute; differences with 95 % intervals."""
    table = _table("Learned router against the best fixed router at equal compute", "compute")
    table.add_column("best fixed\nrouter", overflow="fold", max_width=NAME_WIDTH)
    gains = ("gain in log-likelihood\n(nats/token)", "gain in accuracy\n(% points)")
    for header in ("learned\nloss", "fixed\nloss", *gains):
        table.add_column(header, justify="right")
    for row in comparisons:
        table.add_row(
            f"{row.compute:.2f}",
            row.rival,
            f"{row.learned_loss:.4f}",
            f"{row.rival_loss:.4f}",
            _interval(row.difference, 1, 4),
            _interval(row.accuracy_difference, 100, 2),
        )
    table.caption = "Gain: learned minus best fixed [95% interval, paired over documents]."
    return table


def _table(title: str, first_column: str) -> Table:
    table = Table(
        title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", caption_justify="left"
    )
    table.add_column(first_column, overflow="fold", max_width=NAME_WIDTH)
    return table


def _cell(scores: DocumentSums | None, native: Point) -> str:
    """Loss, change of loss and percentage of native accuracy, such as `1.326 +.023 99.4`."""
    if scores is None:
        return "-"
    loss = -scores.mean_log_likelihood
    share = scores.accuracy / native.accuracy if native.accuracy else 1.0
    change = loss - native.loss
    digits = 2 if abs(change) >= 1 else 3  # a column of one width leaves room for the names
    return f"{loss:.3f} {_signed(change, digits)} {100 * share:.1f}"


def _interval(interval: Interval, scale: float, digits: int) -> str:
    mean, low, high = (_signed(scale * value, digits) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _signed(value: float, digits: int) -> str:
    """The sign always, a leading zero never: `+.023`."""
    return f"{value:+.{digits}f}".replace("+0.", "+.").replace("-0.", "-.")

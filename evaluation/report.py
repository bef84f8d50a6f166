"""`evaluation.json`, and the same as tables for a terminal."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evaluation.checks import Check
from evaluation.compare import COMPUTES, Comparison, best_others
from evaluation.curves import Curve, Curves, Quantity, Scored, cache_along, compute_at_f1, f1_along, scores_along
from evaluation.evaluator import Evaluator
from evaluation.intervals import Interval
from evaluation.points import Point
from evaluation.results import Evaluation
from evaluation.summary import compute_at_accuracy
from moe_backbone.files import write_text_atomic

SCHEMA = 1
KEYS = {"schema", "corpus", "backbone", "native", "points", "summary"}
"""Top-level keys that every `evaluation.json` has; newer ones also have `comparisons` and `checks`."""
PIPED_WIDTH = 100
"""Columns where the output is not a terminal."""
NAME_WIDTH = 17
"""Columns after which a router's name goes on in the next line, so that the numbers keep theirs."""
UNITS: Mapping[Quantity, tuple[float, int, str]] = {"log_likelihood": (1, 4, "nats"), "accuracy": (100, 2, "%")}
"""Factor, digits and unit of a quantity in the tables."""
SMALL_UNITS: Mapping[Quantity, tuple[float, int, str]] = {
    "log_likelihood": (1000, 1, "0.001 nats a token"),
    "accuracy": (100, 1, "% points of accuracy"),
}
"""The same where columns are scarce."""


def build_evaluation(
    evaluation: Evaluation, *, corpus: str, backbone: str, sha256: str, parameters: int
) -> dict[str, Any]:
    """The content of `evaluation.json`, schema 1.

    Args:
        evaluation: All that was scored; native becomes the first of `points`.
        corpus: Name of the corpus.
        backbone: Name of the backbone.
        sha256: Hash of its weights.
        parameters: Trained numbers in it.
    """
    selection, held_out = evaluation.selection, evaluation.held_out
    native = Scored(selection=selection.native, held_out=held_out.native)
    return {
        "schema": SCHEMA,
        "corpus": {"name": corpus, **_text(held_out), "selection": _text(selection)},
        "backbone": {
            "name": backbone,
            "sha256": sha256,
            "parameters": parameters,
            "sites": [site.name for site in held_out.sites],
        },
        "native": {
            "accuracy": held_out.native.accuracy,
            "log_likelihood": held_out.native.log_likelihood,
            **({} if held_out.native.f1 is None else {"f1": held_out.native.f1}),
        },
        "points": [point.to_json() for point in (native, *evaluation.scored)],
        "summary": evaluation.summary,
        "comparisons": [comparison.to_json() for comparison in evaluation.comparisons],
        "checks": [check.to_json() for check in evaluation.checks],
        "control": None if evaluation.control is None else evaluation.control.to_json(),
        "oracle": [point.to_json() for point in evaluation.headroom],
    }


def _text(evaluator: Evaluator) -> dict[str, Any]:
    return {"split": evaluator.split.name, "tokens": evaluator.num_tokens, "documents": evaluator.num_documents}


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
    if not set(evaluation) >= KEYS:
        raise ValueError(f"evaluation must have the keys {sorted(KEYS)}, got {sorted(evaluation)} in {path}")
    return evaluation


def report_console(file: IO[str] | None = None) -> Console:
    """A console as wide as the terminal, or 100 columns where the output goes elsewhere."""
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=PIPED_WIDTH)


def print_and_keep(parts: Sequence[Table | str], path: Path, *, width: int = 0) -> None:
    """Print tables, and write them to a file, whole or not at all, as they stand where the output is piped.

    Args:
        parts: What is shown, in order.
        path: Of the text file.
        width: Least columns of both.
    """
    text = StringIO()
    for console in (report_console(), report_console(text)):
        console.width = max(console.width, width)
        for part in parts:
            console.print(part, highlight=False)
    write_text_atomic(path, text.getvalue())


def report_parts(evaluation: Evaluation) -> Iterator[Table | str]:
    """What a terminal shows, the answer last."""
    curves, comparisons = evaluation.curves, evaluation.comparisons
    yield tradeoff_table(curves, evaluation.held_out.native, evaluation.summary)
    yield summary_table(curves, evaluation.summary)
    if evaluation.held_out.native.cache is not None:
        yield cache_table(curves)
    if evaluation.held_out.native.f1 is not None:
        yield f1_table(curves, evaluation.held_out.native.f1)
    if comparisons:
        yield rivals_table(comparisons, "log_likelihood")
        yield rivals_table(comparisons, "accuracy")
        yield comparison_table(comparisons)
    if evaluation.control is not None:
        yield control_line(evaluation)
    yield "\n".join(check_lines(evaluation.checks))


def control_line(evaluation: Evaluation) -> str:
    """What an adapted backbone must be held against, and the compute that keeps 99 % of the better native accuracy."""
    native, control = evaluation.held_out.native, evaluation.control
    assert control is not None
    best = max(native.accuracy, control.accuracy)
    scores = f"loss {control.loss:.4f}, accuracy {control.accuracy:.4f}"
    line = f"Backbone trained on as long under native routing: {scores}.\n99% of the better native accuracy is"
    reached = [compute_at_accuracy(curve, 0.99 * best / native.accuracy) for curve in evaluation.curves["learned"]]
    kept = [compute for compute in reached if compute is not None]
    if not kept or len(kept) < len(reached):
        return f"{line} {0.99 * best:.4f}, out of the learned router's reach."
    return f"{line} {0.99 * best:.4f}; the learned router keeps it from compute {sum(kept) / len(kept):.3f} on."


def tradeoff_table(
    curves: Curves,
    native: Point,
    summary: Mapping[str, Mapping[str, Any]],
    *,
    computes: Sequence[float] = COMPUTES,
) -> Table:
    """One row for each router: held-out loss, difference to native and accuracy retained at equal compute.

    Args:
        curves: Of all routers.
        native: The held-out point of native routing.
        summary: From `summarize`.
        computes: Fractions of native compute, one column each.
    """
    table = _table("Held-out loss in nats, change from native, % of native accuracy kept; by compute", "router")
    for compute in computes:
        table.add_column(f"at {compute:.2f}", justify="right")
    table.add_column("99% at", justify="right")
    facts = [f"loss {native.loss:.4f}", f"accuracy {native.accuracy:.4f}", f"compute {native.compute:.2f}"]
    cells = (facts + [""] * len(computes))[: len(computes)]
    table.add_row("native", *cells, f"{native.compute:.3f}", end_section=True)
    for name, seeds in curves.items():
        scores = zip(
            scores_along(seeds, computes, "log_likelihood"), scores_along(seeds, computes, "accuracy"), strict=True
        )
        cells = [_cell(log_likelihood, accuracy, native) for log_likelihood, accuracy in scores]
        reached = summary[name]["compute_at_99_accuracy"]
        cells.append("-" if reached is None else f"{reached:.3f}")
        table.add_row(_marked(name, seeds), *cells, style=_style(name))
    most = max(map(len, curves.values()))
    over = f"Interquartile mean over {most} seeds where anything is drawn.\n" if most > 1 else ""
    table.caption = f"{over}99% at: least compute that keeps 99% of native accuracy.  -: this router costs more."
    table.caption += _note(curves)
    return table


def summary_table(curves: Curves, summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row for each router: numbers for its whole curve, with intervals."""
    table = _table("Whole curves: mean over seeds [95% interval over seeds and documents]", "router")
    keys = {"hypervolume": "hypervolume", "aiq": "AIQ", "compute_at_99_accuracy": "99% accuracy at"}
    for header in ("seeds", *keys.values()):
        table.add_column(header, justify="right")
    for name, seeds in curves.items():
        intervals = summary[name]["intervals"]
        cells = [_ends(intervals[key]) if key in intervals else "-" for key in keys]
        table.add_row(_marked(name, seeds), str(len(seeds)), *cells, style=_style(name))
    table.caption = "Hypervolume, AIQ: areas under accuracy by compute, more is better." + _note(curves)
    return table


def cache_table(curves: Curves, *, computes: Sequence[float] = COMPUTES) -> Table:
    """One row for each router: keys and values that it keeps at equal compute, in % of the native bytes."""
    table = _table("Keys and values kept, % of native bytes", "router")
    for compute in computes:
        table.add_column(f"at {compute:.2f}", justify="right")
    for name, seeds in curves.items():
        shares = cache_along(seeds, computes)
        cells = ["-" if math.isnan(share) else f"{100 * share:.1f}" for share in shares]
        table.add_row(_marked(name, seeds), *cells, style=_style(name))
    table.caption = "-: this router costs more." + _note(curves)
    return table


def f1_table(curves: Curves, native: float, *, computes: Sequence[float] = COMPUTES) -> Table:
    """One row for each router: F1 of entities at equal compute, in %.

    Args:
        curves: Of all routers.
        native: F1 of native routing, a fraction.
        computes: Fractions of native compute, one column each.
    """
    table = _table(f"F1 of entities, %; native routing {100 * native:.1f}", "router")
    for compute in computes:
        table.add_column(f"at {compute:.2f}", justify="right")
    table.add_column("99% at", justify="right")
    for name, seeds in curves.items():
        scores = f1_along(seeds, computes)
        cells = ["-" if math.isnan(score) else f"{100 * score:.1f}" for score in scores]
        reached = [compute_at_f1(curve, 0.99 * native) for curve in seeds]
        kept = [compute for compute in reached if compute is not None]
        cells.append(f"{sum(kept) / len(kept):.3f}" if len(kept) == len(seeds) else "-")
        table.add_row(_marked(name, seeds), *cells, style=_style(name))
    table.caption = "99% at: least compute that keeps 99% of native F1.  -: this router costs more." + _note(curves)
    return table


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """The learned router against the best other, one row for each quantity and compute, with intervals."""
    table = _table("Learned router against the best other router at equal compute, held-out text", "compute")
    table.add_column("best other", overflow="fold", max_width=NAME_WIDTH)
    table.add_column("in")
    for header in ("learned", "other", "gain [95%]", "P(better) [95%]"):
        table.add_column(header, justify="right")
    for row in best_others(comparisons):
        scale, digits, unit = UNITS[row.quantity]
        table.add_row(
            f"{row.compute:.2f}",
            _folded(row.rival),
            unit,
            f"{scale * row.gain.ours:.{digits}f}",
            f"{scale * row.gain.theirs:.{digits}f}",
            _interval(row.gain.difference, scale, digits),
            _interval(row.gain.probability, 1, 2, sign=""),
        )
    table.caption = (
        "Best other: named by selection text. nats: log-likelihood a token; %: accuracy.\n"
        "P(better): share of pairs of seeds in which the learned router is better.\n"
        "Intervals: paired over documents, stratified over seeds."
    )
    return table


def rivals_table(comparisons: Sequence[Comparison], quantity: Quantity) -> Table:
    """The learned router against every other: its gain at each compute, with intervals; the best other is marked."""
    rows = [row for row in comparisons if row.quantity == quantity]
    computes = list(dict.fromkeys(row.compute for row in rows))
    scale, digits, title = SMALL_UNITS[quantity]
    table = _table(f"Gain of the learned router over each other, {title} [95%]", "over")
    for compute in computes:
        table.add_column(f"at {compute:.2f}", justify="right")
    for rival in dict.fromkeys(row.rival for row in rows):
        found = {row.compute: row for row in rows if row.rival == rival}
        cells = [
            ("†" if found[compute].best else "") + _short(found[compute].gain.difference, scale, digits)
            if compute in found
            else "-"
            for compute in computes
        ]
        table.add_row(_folded(rival), *cells)
    table.caption = "†: the best other router at this compute, by selection text.\n-: one of the two costs more."
    return table


def check_lines(checks: Sequence[Check]) -> list[str]:
    """What the A/A checks found, a line each; those that failed begin with `A/A FAILED`."""
    lines = []
    for check in checks:
        scale, digits, unit = UNITS[check.quantity]
        verdict = "A/A equal" if check.equal else "A/A FAILED"
        lines.append(f"{verdict}: {check.name}: {_interval(check.difference, scale, digits)} {unit}")
    return lines


def _table(title: str, first_column: str) -> Table:
    table = Table(
        title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", caption_justify="left"
    )
    table.add_column(first_column, overflow="fold", max_width=NAME_WIDTH)
    return table


def _cell(log_likelihood: float, accuracy: float, native: Point) -> str:
    """Loss, change of loss and percentage of native accuracy, such as `1.326 +.023 99.4`."""
    if math.isnan(log_likelihood):
        return "-"
    share = accuracy / native.accuracy if native.accuracy else 1.0
    change = native.log_likelihood - log_likelihood
    digits = 2 if abs(change) >= 1 else 3  # a column of one width leaves room for the names
    return f"{-log_likelihood:.3f} {_signed(change, digits)} {100 * share:.1f}"


def _marked(name: str, seeds: Sequence[Curve]) -> str:
    return _folded(name if _causal(seeds) else f"{name}*")


def _causal(seeds: Sequence[Curve]) -> bool:
    return all(point.causal for curve in seeds for point in curve)


def _folded(name: str) -> str:
    """Long names in lines that fit their column, broken behind hyphens."""
    return "\n".join(textwrap.wrap(name, NAME_WIDTH))


def _note(curves: Curves) -> str:
    return "" if all(map(_causal, curves.values())) else "\n*: not causal, so it is a bound and no rival."


def _style(name: str) -> str | None:
    return "bold" if name == "learned" else None


def _ends(interval: Mapping[str, float | None]) -> str:
    """`.570 [.565, .576]`; a dash for an end out of reach."""
    ends = ("-" if value is None else f"{value:.3f}".removeprefix("0") for value in interval.values())
    mean, low, high = ends
    return f"{mean} [{low}, {high}]"


def _interval(interval: Interval, scale: float, digits: int, sign: str = "+") -> str:
    mean, low, high = (_signed(scale * value, digits, sign) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _short(interval: Interval, scale: float, digits: int) -> str:
    """`+6.7 [3.3, 9.6]` in at most 17 columns: whole numbers from 10 on, and no plus sign from 1000 on."""
    values = [scale * value for value in (interval.mean, interval.low, interval.high)]
    largest = max(map(abs, values))
    mean, low, high = (f"{value:.{digits if largest < 10 else 0}f}" for value in values)
    plus = "+" if largest < 1000 and not mean.startswith("-") else ""
    return f"{plus}{mean} [{low}, {high}]"


def _signed(value: float, digits: int, sign: str = "+") -> str:
    """The sign always, a leading zero never: `+.023`."""
    text = f"{value:{sign}.{digits}f}"
    return text.replace("+0.", "+.").replace("-0.", "-.").removeprefix("0")

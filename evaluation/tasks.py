"""Scores of lm-evaluation-harness: its metrics read, and one table of all settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

MAIN_METRICS = ("acc_norm", "acc")
"""What the table shows of a task, the first that it has; else its first metric."""


def metrics(raw: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Each metric with its standard error, None where it has none; from lm_eval's `acc,none` and `acc_stderr,none`."""
    for key, value in raw.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = raw.get(f"{name}_stderr,{kind}")
        known = isinstance(error, int | float) and math.isfinite(error)
        yield name if kind == "none" else key, {"value": value, "stderr": error if known else None}


def tasks_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each setting; a column for each task, or one for a whole group that has a score of its own."""
    first, groups = rows[0]["tasks"], rows[0]["groups"]
    inside = {task for group, tasks in groups.items() if first.get(group) for task in tasks}
    shown = {
        task: next((main for main in MAIN_METRICS if main in found), next(iter(found)))
        for task, found in first.items()
        if found and task not in inside
    }
    table = Table(box=SIMPLE_HEAD)
    table.add_column("routing")
    table.add_column("compute", justify="right")
    for task, metric in shown.items():
        table.add_column(f"{task}\n{metric}", justify="right")
    for row in rows:
        scores = [row["tasks"][task][metric] for task, metric in shown.items()]
        table.add_row(row["name"], f"{row['compute']:.3f}", *map(_cell, scores))
    return table


def _cell(score: Mapping[str, float | None]) -> str:
    error = score["stderr"]
    return f"{score['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")

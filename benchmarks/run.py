"""All benchmarks, one subject after the other: a table on the screen, figures in a file.

Outputs are compared first; a row whose outputs disagree has no ratio and makes the command fail. A missed bar does not:
this is a measurement. Close what else runs on the machine.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from benchmarks import checkpoint, environment, experts, iteration, mask, ppo
from benchmarks.measure import Row
from moe_backbone.files import write_text_atomic

Subjects = Mapping[str, Callable[[], Iterable[Row]]]
SUBJECTS: Subjects = {
    "experts": experts.rows,
    "mask": mask.rows,
    "ppo": ppo.rows,
    "iteration": iteration.rows,
    "environment": environment.rows,
    "checkpoint": checkpoint.rows,
}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure speed on this CPU, side by side with what others use."""

    only: str | None = None
    """One subject: experts, mask, ppo, iteration, environment or checkpoint; None for all."""
    output: Path = Path("benchmarks/out.json")
    """Where the figures go."""


def chosen(only: str | None, subjects: Subjects) -> Subjects:
    """One subject, or all.

    Raises:
        ValueError: If it is unknown.
    """
    if only is None:
        return subjects
    if only not in subjects:
        raise ValueError(f"only must be one of {', '.join(subjects)}, got {only!r}")
    return {only: subjects[only]}


def run(subjects: Subjects, progress: Console) -> list[Row]:
    """Measure, and say so on `progress`."""
    rows: list[Row] = []
    for name, measure in subjects.items():
        with progress.status(f"{name} ..."):
            for row in measure():
                rows.append(row)
                progress.print(f"{row.name}: {row.verdict}", highlight=False)
        gc.collect()  # gigabytes of weights, before the next subject takes its own
    return rows


def table(rows: Iterable[Row]) -> Table:
    """What a reader wants first."""
    shown = Table("benchmark", "ratio", "bar", "verdict", caption="ratio: more is better")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        shown.add_row(row.name, ratio, f"{row.bar:.2f}", row.verdict)
    return shown


def main(arguments: Sequence[str] | None = None, subjects: Subjects = SUBJECTS) -> int:
    """Command line: 1 where outputs disagree, otherwise 0."""
    progress = Console(stderr=True)
    handler = RichHandler(console=progress, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    config = tyro.cli(BenchConfig, description=__doc__, args=arguments)
    try:
        wanted = chosen(config.only, subjects)
    except ValueError as error:
        sys.exit(f"error: {error}")
    rows = run(wanted, progress)
    Console().print(table(rows))
    write_text_atomic(config.output, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if all(row.equal for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

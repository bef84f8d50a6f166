"""What a benchmark is made of: outputs that are compared first, clocks that take turns, and a row that says both."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_backbone.checks import require

LIBRARIES = ("torch", "numpy", "gymnasium", "stable-baselines3", "transformers")
Measured = tuple[float, dict[str, Any]]
"""A ratio, more is better, and what it was made of."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Raises:
        ValueError: If there is a ratio although the outputs disagree.
    """

    name: str
    """`subject/case`."""
    ratio: float | None
    """More is better; None where the outputs disagree, as speed says nothing then."""
    bar: float
    """What the ratio shall reach."""
    equal: bool
    """Whether both sides computed the same."""
    detail: dict[str, Any]
    """Times in ms, sizes, versions: whatever explains the ratio and fits into JSON."""

    def __post_init__(self) -> None:
        if self.ratio is not None and not self.equal:
            raise ValueError(f"ratio must be None where outputs disagree, got {self.ratio}")

    @property
    def verdict(self) -> str:
        """In one or two words."""
        if self.ratio is None:
            return "outputs disagree"
        return "met" if self.ratio >= self.bar else "missed"


def compare(name: str, *, bar: float, equal: bool, measure: Callable[[], Measured]) -> Row:
    """A row that is only measured if the outputs agree."""
    ratio, detail = measure() if equal else (None, {})
    return Row(name=name, ratio=ratio, bar=bar, equal=equal, detail={**detail, "versions": versions()})


def interleave(
    functions: Sequence[Callable[[], object]],
    *,
    seconds: float = 8.0,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Shortest time of each function, s, so that what else runs on the machine counts least.

    Each is called once before the clock starts. Then they take turns, every other round in reverse order, so that a
    slow spell of the machine hits all of them and none always follows the same other.

    Args:
        functions: What to time.
        seconds: Least time in all.
        rounds: Least calls of each.
        clock: Seconds from anywhere.
    """
    for function in functions:
        function()
    shortest, order = [math.inf] * len(functions), list(range(len(functions)))
    started, finished = clock(), 0
    while finished < rounds or clock() - started < seconds:
        for place in order:
            begun = clock()
            functions[place]()
            shortest[place] = min(shortest[place], clock() - begun)
        order.reverse()
        finished += 1
    return shortest


def on_ranks(module: str, words: Sequence[str], size: int) -> Any:
    """Start a benchmark as a job of several processes, one thread each, and read what its first rank left.

    Args:
        module: Of the benchmark, which then works as one rank since it is given `--worker FILE`.
        words: Its other words.
        size: Ranks.

    Returns:
        The JSON of that file.

    Raises:
        ValueError: If the job failed; it says why by itself, as its progress goes to the terminal.
    """
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command = [*launcher, "-m", module, *words, "--worker", str(left)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        require(done.returncode == 0, f"job of {size} ranks must end well, got exit code {done.returncode}, see above")
        return json.loads(left.read_text())


def agree(first: Tensor, second: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether no number differs by more than `tolerance` of the largest; NaN and nothing agree with nothing."""
    if first.shape != second.shape or not second.numel():
        return False
    return bool(((first - second).abs() <= tolerance * second.abs().max()).all())


def milliseconds(seconds: float) -> float:
    """For the detail of a row: ms to a tenth of a microsecond."""
    return round(1e3 * seconds, 4)


def versions() -> dict[str, str | int | None]:
    """What the figures depend on besides the code."""
    found = {name: _version(name) for name in LIBRARIES}
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs"
    return {"python": platform.python_version(), **found, "machine": machine, "threads": torch.get_num_threads()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

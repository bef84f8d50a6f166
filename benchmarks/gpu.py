"""All GPU measurements in one command of minutes: what is most wanted first, each subject's rows written at once.

Outputs are compared before speed counts. A subject that fails is reported and the others still run; that, and outputs
that disagree, make the command fail. A missed bar does not: this is a measurement.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_experts, gpu_heads
from benchmarks.gpu_machine import Machine
from benchmarks.measure import Row
from moe_backbone.files import write_text_atomic

logger = logging.getLogger(__name__)


def rollouts(machine: Machine) -> Iterator[Row]:
    """Left out aloud without the libraries that it needs."""
    missing = [name for name in ("gymnasium", "stable_baselines3") if importlib.util.find_spec(name) is None]
    if missing:
        logger.warning("rollouts left out, they need: %s", ", ".join(missing))
        return
    from benchmarks import gpu_rollouts

    yield from gpu_rollouts.rollouts(machine)


Subjects = Mapping[str, Callable[[Machine], Iterator[Row]]]
SUBJECTS: Subjects = {
    "accuracy": gpu_checks.accuracy,
    "any-subset": gpu_experts.any_subset,
    "compute-bound": gpu_experts.compute_bound,
    "launch-bound": gpu_experts.launch_bound,
    "memory-bound": gpu_experts.memory_bound,
    "valley": gpu_experts.valley,
    "follows-mask": gpu_experts.follows_mask,
    "no-waits": gpu_checks.no_waits,
    "equal-bits": gpu_checks.equal_bits,
    "heads": gpu_heads.heads,
    "rollouts": rollouts,
    "skew": gpu_experts.skew,
    "first-call": gpu_checks.first_call,
}


def run(machine: Machine, subjects: Subjects, keep: Callable[[list[dict[str, Any]]], None]) -> int:
    """Measure and say so line by line; `keep` gets all rows after each subject. 1 if anything failed or disagrees."""
    kept: list[dict[str, Any]] = []
    code, started = 0, time.perf_counter()
    for name, measure in subjects.items():
        try:
            for row in measure(machine):
                kept.append(asdict(row))
                code |= not row.equal
                print(line(row), flush=True)
        except Exception:  # one subject must not take the others with it
            logger.exception("%s failed", name)
            code = 1
        keep(kept)
        machine.release()
        print(f"-- {name}: {time.perf_counter() - started:.0f} s since the start", flush=True)
    return code


def line(row: Row) -> str:
    """Name, ratio, bar and verdict."""
    ratio = "-" if row.ratio is None else f"{row.ratio:.3g}"
    return f"{row.name:<36} {ratio:>9} of {row.bar:<6.3g} {row.verdict}{_reason(row)}"


def _reason(row: Row) -> str:
    error = row.detail.get("error")
    return f": {str(error)[:200]}" if error else ""


def main(arguments: Sequence[str] | None = None, subjects: Subjects = SUBJECTS) -> int:
    """Command line. Not tyro, as a GPU machine may have PyTorch and Triton alone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure speed on this GPU.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/gpu.json"), help="where the figures go")
    parser.add_argument("--only", choices=list(subjects), help="one subject")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.gpu must run on a machine with a CUDA GPU, found none")
    wanted = subjects if options.only is None else {options.only: subjects[options.only]}

    def keep(rows: list[dict[str, Any]]) -> None:
        write_text_atomic(options.output, json.dumps(rows, indent=1) + "\n")

    return run(Machine(), wanted, keep)


if __name__ == "__main__":
    sys.exit(main())

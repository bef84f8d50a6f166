"""Runs that are killed, starved of disk or shown a clock that steps back: what is lost, and where they end.

python -m benchmarks.faults            # 50 kills at random moments, then every other fault; about ten minutes

A small training run is started and killed by SIGKILL, again and again: at random times, and at random moments of saving
a file. The next command goes on. Counted is what had to be done twice; the router must be that of a run that nobody
touched, to the bit.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from commands import ending
from moe_backbone.checks import require
from moe_backbone.files import write_text_atomic
from policies.portable import WEIGHTS

Fault = Literal["none", "kill", "save", "disk", "user", "clock"]
EVERY = 4
"""Updates, or steps, between two checkpoints of the run."""
SIZES = {
    "device": "cpu",
    "total-timesteps": 40 * 256,
    "eval-times": 2,
    "checkpoint-every": EVERY,
    "backbone.hidden-size": 32,
    "backbone.num-layers": 2,
    "backbone.num-heads": 4,
    "backbone.num-experts": 4,
    "backbone.top-k": 2,
    "backbone.intermediate-size": 16,
    "backbone.seq-len": 16,
    "pretrain.steps": 80,
    "pretrain.sequences": 8,
    "pretrain.eval-every": EVERY,
    "warm-start.steps": 40,
    "warm-start.num-sequences": 2,
    "warm-start.save-every": EVERY,
    "ppo.num-sequences": 2,
    "ppo.batch-size": 128,
    "env.rollouts-per-sequence": 2,
    "evaluation.max-tokens": 256,
    "evaluation.num-prices": 3,
    "evaluation.greedy-tokens": 128,
}
SLOWNESS = 0.05
"""Seconds added to a step, so that every phase is long enough to be hit."""
LIMIT = 65_536
"""Bytes of a file at which the disk is full; a checkpoint is larger."""
NOBODY = 65534
WORDS = ("the", "router", "sends", "every", "token", "to", "an", "expert", "and", "some", "need", "none", "at", "all")


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Break runs and count."""

    kills: int = 50
    """By SIGKILL, every other one while a file is saved."""
    seed: int = 0
    """Of the moments."""
    output: Path = Path("runs/faults.json")
    """Where the figures are kept."""
    worker: str = ""
    """Used by the command itself: JSON of what one process does."""


def notice(log: Path) -> None:
    """Every step of every phase leaves a line in `log` before it begins, and takes a little longer."""
    import evaluation.scoring as scoring
    from moe_backbone.pretrain import Pretraining
    from policies.callbacks import PeriodicSave
    from policies.gating import GateTrainer

    def noticed(owner: Any, name: str, phase: str, number: Callable[[Any], int]) -> None:
        original = getattr(owner, name)

        def wrapped(self: Any, *args: Any) -> Any:
            with log.open("a") as file:
                file.write(f"{phase} {number(self)}\n")
            time.sleep(SLOWNESS)
            return original(self, *args)

        setattr(owner, name, wrapped)

    noticed(Pretraining, "_train_step", "pretraining", lambda self: self.step)
    noticed(GateTrainer, "_train_step", "gates", lambda self: self.step)
    noticed(PeriodicSave, "_on_rollout_start", "training", lambda self: self.model.num_timesteps // 256)
    noticed(scoring, "_score", "evaluation", lambda self: 0)


def suffer(fault: Fault, moment: int) -> None:
    """Make this process meet its fault."""
    if fault == "save":
        calls = [0]

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return wrapped

        os.fsync = dying(os.fsync)
        Path.replace = dying(Path.replace)  # type: ignore[method-assign]
    if fault == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    if fault == "user":
        os.setuid(NOBODY)
    if fault == "clock":
        now, now_ns, started = time.time, time.time_ns, time.monotonic()
        time.time = lambda: now() - 1e4 * (time.monotonic() - started)
        time.time_ns = lambda: int(now_ns() - 1e13 * (time.monotonic() - started))


def work(order: dict[str, Any]) -> None:
    """What one process does."""
    from train_rl import main

    notice(Path(order["log"]))
    suffer(order["fault"], order["moment"])
    main(order["words"])


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Where runs are broken.

    Attributes:
        folder: Of everything.
        corpus: Text.
    """

    folder: Path
    corpus: Path

    def start(self, run_dir: Path, fault: Fault = "none", moment: int = 0, after: float | None = None) -> Any:
        """Start or go on with a run; kill it `after` seconds if that is given."""
        words = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
        words = (
            ["--resume", str(run_dir)] if (run_dir / "config.json").exists() else [*words, "--run-dir", str(run_dir)]
        )
        if "--resume" not in words:
            shutil.rmtree(run_dir, ignore_errors=True)  # killed before it had written its settings
            words += ["--corpus", str(self.corpus), "--evaluation.routers", "top-k"]
        order = {"log": str(self.log(run_dir)), "fault": fault, "moment": moment, "words": words}
        command = [sys.executable, "-m", "benchmarks.faults", "--worker", json.dumps(order)]
        cache = {"ROUTEGYM_CACHE": str(self.folder / f"cache-{run_dir.name}"), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, env=os.environ | cache, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as job:
            try:
                _, printed = job.communicate(timeout=after)
            except subprocess.TimeoutExpired:
                job.kill()
                _, printed = job.communicate()
        return job.returncode, printed.decode(errors="replace")

    def log(self, run_dir: Path) -> Path:
        """What the run has begun, line by line."""
        return self.folder / f"{run_dir.name}.log"

    def steps(self, run_dir: Path) -> list[tuple[str, int]]:
        """The same, read."""
        lines = self.log(run_dir).read_text().splitlines() if self.log(run_dir).exists() else []
        return [(phase, int(number)) for phase, number in (line.split() for line in lines)]


def same(one: Path, other: Path) -> bool:
    """Whether two runs left the same router, to the bit."""
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


def lost(before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]) -> int | None:
    """Steps of the phase that was killed which the next process did again; None where it began nothing of it."""
    if not before or not after or before[-1][0] == "evaluation":
        return None
    phase, last = before[-1]
    again = [number for name, number in after if name == phase]
    return max(0, last - again[0]) if again else None


def kill(config: FaultsConfig, ground: Ground, whole: Path, seconds: float) -> dict[str, Any]:
    """Kill runs at random moments until there were enough, each run until it ends: what that cost."""
    moments, phases, losses, runs = random.Random(config.seed), Counter[str](), list[int](), 0
    run_dir, kills, unequal, errors = ground.folder / "killed-0", 0, 0, list[str]()
    while kills < config.kills or not (run_dir / "report.html").exists():
        before = ground.steps(run_dir)
        how: Fault = "none" if kills >= config.kills else "kill" if kills % 2 else "save"
        after = moments.uniform(0.3, 0.6 * seconds) if how == "kill" else None
        code, printed = ground.start(run_dir, how, moments.randint(1, 40), after)
        steps = ground.steps(run_dir)
        if (again := lost(before, steps[len(before) :])) is not None:
            losses.append(again)
        if code == -signal.SIGKILL:
            kills += 1
            phases[steps[-1][0] if len(steps) > len(before) else "start"] += 1
        elif code != 0:
            errors.append(printed.splitlines()[-1])
            break
        if (run_dir / "report.html").exists() and code == 0:
            runs, unequal = runs + 1, unequal + (not same(run_dir, whole))
            if kills >= config.kills:
                break
            run_dir = ground.folder / f"killed-{runs}"
    found = {"kills": kills, "by phase": dict(phases), "runs": runs, "unequal": unequal, "errors": errors}
    return found | {"most steps lost": max(losses, default=0), "interval": EVERY}


def other_faults(ground: Ground, whole: Path) -> dict[str, str]:
    """Each fault once: what was printed, and how the run went on."""
    found = {}
    run_dir = ground.folder / "disk"
    code, printed = ground.start(run_dir, "disk")
    went_on = ground.start(run_dir)[0] == 0 and same(run_dir, whole)
    found["disk full"] = f"exit {code}: {printed.splitlines()[-1]}; goes on: {went_on}"
    if os.getuid() == 0:
        code, printed = ground.start(ground.folder / "user", "user")
        found["folder not writable"] = f"exit {code}: {printed.splitlines()[-1]}"
    run_dir = ground.folder / "clock"
    code, _ = ground.start(run_dir, "clock")
    found["clock steps back"] = f"exit {code}, router equal: {code == 0 and same(run_dir, whole)}"
    return found


def run(config: FaultsConfig) -> None:
    """Break runs, print the table and keep its figures."""
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), random.Random(config.seed)
        folder.chmod(0o755)
        texts = [{"text": f"{number}: {' '.join(draw.choices(WORDS, k=40))}"} for number in range(60)]
        (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
        ground, whole = Ground(folder=folder, corpus=folder / "corpus.jsonl"), folder / "whole"
        started = time.monotonic()
        code, printed = ground.start(whole)
        require(code == 0, f"run that nobody touches must end, got exit {code}: {printed[-500:]}")
        found: dict[str, Any] = {"SIGKILL": kill(config, ground, whole, time.monotonic() - started)}
        found |= other_faults(ground, whole)
    shown = Table("fault", "what happened")
    for fault, outcome in found.items():
        shown.add_row(fault, json.dumps(outcome, indent=1) if isinstance(outcome, dict) else outcome)
    Console(width=150).print(shown)
    write_text_atomic(config.output, json.dumps(found, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    config = tyro.cli(FaultsConfig, description=__doc__, args=arguments)
    with ending():
        work(json.loads(config.worker)) if config.worker else run(config)


if __name__ == "__main__":
    main()

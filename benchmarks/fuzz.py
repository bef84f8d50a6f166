"""Readers against damaged and hostile files: whatever lies there, they read it or refuse it with one line.

python -m benchmarks.fuzz --seconds 60                 # every reader for a minute, guided by coverage (extra `fuzz`)
python -m benchmarks.fuzz --only config checkpoint

Each target is given bytes in place of one file that a user may get from others. A refusal is a `ValueError` or an
`OSError` of one line; anything else, a hang of `HANG` seconds or memory beyond `MEMORY` MiB ends the process and fails.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from commands import ending
from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.checkpoints import read_checkpoint, write_checkpoint
from moe_backbone.checks import require
from moe_backbone.corpus import load_corpus
from moe_backbone.files import write_text_atomic
from moe_backbone.saved import DESCRIPTION as BACKBONE_DESCRIPTION
from moe_backbone.saved import WEIGHTS as BACKBONE_WEIGHTS
from moe_backbone.saved import load_saved, save_backbone
from moe_backbone.tasks import load_task
from policies.linear_router import LinearRouter, RouterSpec
from policies.portable import DESCRIPTION, WEIGHTS, load_router, save_router
from policies.trace import Trace, record
from run_folder import describe_run, read_config
from training_config import TrainConfig

HANG, MEMORY = 20, 2048
START = """
import sys
try:
    import atheris
except ImportError:
    sys.exit("error: fuzzing needs atheris: pip install -c constraints.txt -e '.[fuzz]'")
with atheris.instrument_imports(include=["moe_backbone", "policies", "run_folder"]):
    from benchmarks import fuzz
fuzz.main()
"""
"""A process that attacks: what it imports is followed by coverage."""
CONFIG = BackboneConfig(
    hidden_size=8, num_layers=1, num_heads=2, num_experts=2, top_k=1, intermediate_size=4, seq_len=8
)
TEXT = "\n\n".join(f"{number} some tokens need an expert, others none at all." for number in range(40))


@cache
def world() -> Path:
    """A folder of good files, one of each kind; made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="routegym-fuzz-"))
    torch.manual_seed(0)
    backbone = MoETransformer(CONFIG).requires_grad_(False).eval()
    save_backbone(backbone, folder / "backbone")
    router = LinearRouter(RouterSpec(hidden_size=8, sites=backbone.sites))
    save_router(router, folder / "router", backbone)
    describe_run(folder / "run", TrainConfig())
    write_checkpoint(folder / "checkpoint" / "last.pt", {"step": 3, "weights": {"a": torch.ones(3)}})
    record(backbone, router.at_price(0.1), torch.zeros(2, 8, dtype=torch.int64)).save(folder / "trace" / "trace.npz")
    for name, text in {
        "text/text.txt": TEXT,
        "jsonl/text.jsonl": "\n".join(json.dumps({"text": line}) for line in TEXT.split("\n\n")),
        "csv/train.csv": "text,category\n" + "\n".join(f"text {number},label{number % 3}" for number in range(30)),
        "conll/train.txt": "\n\n".join("The O\nBank B-ORG\nof I-ORG\nBasel I-ORG" for _ in range(20)) + "\n",
    }.items():
        write_text_atomic(folder / name, text)
    return folder


@cache
def backbone() -> MoETransformer:
    """What routers are read for."""
    return load_saved(world() / "backbone")


def _task(path: Path) -> Any:
    return load_task(path, seq_len=32)


@dataclass(frozen=True)
class Target:
    """A file, and what reads it."""

    file: str
    """Under `world()`."""
    read: Callable[[Path], Any]
    """Called with the file."""


TARGETS = {
    "checkpoint": Target("checkpoint/last.pt", lambda path: read_checkpoint(path, "checkpoint", lambda state: None)),
    "router": Target(f"router/{DESCRIPTION}", lambda path: load_router(path.parent, backbone())),
    "router-weights": Target(f"router/{WEIGHTS}", lambda path: load_router(path.parent, backbone())),
    "backbone": Target(f"backbone/{BACKBONE_DESCRIPTION}", lambda path: load_saved(path.parent)),
    "backbone-weights": Target(f"backbone/{BACKBONE_WEIGHTS}", lambda path: load_saved(path.parent)),
    "config": Target("run/config.json", lambda path: read_config(path.parent, TrainConfig)),
    "trace": Target("trace/trace.npz", Trace.load),
    "text": Target("text/text.txt", lambda path: load_corpus([path], seq_len=8)),
    "jsonl": Target("jsonl/text.jsonl", lambda path: load_corpus([path], seq_len=8)),
    "csv": Target("csv/train.csv", _task),
    "conll": Target("conll/train.txt", _task),
}


def seed_input(name: str) -> bytes:
    """The good file of a target."""
    return (world() / TARGETS[name].file).read_bytes()


def attack(name: str, data: bytes) -> bool:
    """Give a target these bytes; whether it read them.

    Raises:
        Exception: Whatever is no refusal of one line.
    """
    good = seed_input(name)
    path = world() / TARGETS[name].file
    path.write_bytes(data)
    try:
        TARGETS[name].read(path)
        return True
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.strip(), f"a {type(error).__name__} must say what is wrong"
        assert "\n" not in message.strip(), f"a refusal is one line, got {message!r}"
        return False
    finally:
        path.write_bytes(good)


@dataclass(frozen=True, kw_only=True)
class FuzzConfig:
    """Attack readers."""

    seconds: int = 60
    """For each."""
    only: tuple[str, ...] = ()
    """Targets by name; none for all."""
    seed: int = 1
    """Of the mutations."""
    output: Path = Path("runs/fuzz.json")
    """Where the figures are kept."""
    worker: str = ""
    """Used by the command itself: the target that this process attacks."""

    def __post_init__(self) -> None:
        for name in self.only:
            require(name in TARGETS, f"only must name some of {' '.join(TARGETS)}, got {name}")


def work(config: FuzzConfig) -> None:
    """Attack one target until the time is up."""
    import atheris

    logging.disable()
    torch.set_num_threads(1)
    name, corpus = config.worker, world() / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed_input(name))
    limits = [f"-max_total_time={config.seconds}", f"-timeout={HANG}", f"-rss_limit_mb={MEMORY}"]
    report = [f"-artifact_prefix={world()}/", f"-seed={config.seed}", "-max_len=20000", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *report, str(corpus)], lambda data: attack(name, data) and None)
    atheris.Fuzz()


def _figure(printed: str, name: str) -> int:
    found = re.search(rf"stat::{name}:\s+(\d+)", printed)
    return int(found[1]) if found else 0


def run(config: FuzzConfig) -> None:
    """Attack every target in a process of its own, print the table and keep its figures."""
    found, shown = {}, Table("reader", "inputs", "most memory, MiB", "outcome")
    for name in config.only or TARGETS:
        command = [sys.executable, "-c", START, "--worker", name, "--seconds", str(config.seconds)]
        done = subprocess.run([*command, "--seed", str(config.seed)], capture_output=True, text=True, check=False)
        inputs, memory = (_figure(done.stderr, figure) for figure in ("number_of_executed_units", "peak_rss_mb"))
        said = [line for line in done.stdout.splitlines() if line.strip()]
        outcome = "good" if done.returncode == 0 else "\n".join([f"exit {done.returncode}", *said[-4:]])
        found[name] = {"inputs": inputs, "memory_mib": memory, "outcome": outcome}
        shown.add_row(name, f"{inputs:,}", f"{memory:,}", outcome)
    Console(width=150).print(shown)
    write_text_atomic(config.output, json.dumps(found, indent=1) + "\n")
    failed = [name for name, figures in found.items() if figures["outcome"] != "good"]
    require(not failed, f"readers must read or refuse, got other ends of {', '.join(failed)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    config = tyro.cli(FuzzConfig, description=__doc__, args=arguments)
    with ending():
        work(config) if config.worker else run(config)


if __name__ == "__main__":
    main()

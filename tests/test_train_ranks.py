"""Data-parallel training under torchrun, two ranks by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

JOB = Path(__file__).parent / "helpers" / "rank_job.py"
SECONDS = 60
"""After a rank has died, the job must have ended."""
Job = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def job(run_world: Path, tiny_run: Any) -> Job:
    """Runs a training on two ranks: exit code, and what it printed."""

    def start(said: Path, words: list[str], fault: str = "none", restarts: int = 0) -> tuple[int, str]:
        said.mkdir(exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "--max-restarts", str(restarts), str(JOB), str(said), fault, *words]
        where = os.environ | {"ROUTEGYM_CACHE": str(run_world / "rank-cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=where, capture_output=True, text=True, timeout=280, check=False)
        return done.returncode, done.stderr

    return start


def _words(tiny_run: Any, run_dir: Path) -> list[str]:
    words: list[str] = tiny_run.words(run_dir, evaluation__routers="top-k", total_timesteps=12 * tiny_run.transitions)
    return words


@pytest.fixture(scope="module")
def whole(job: Job, tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on two ranks, beside it what the ranks said."""
    folder = tmp_path_factory.mktemp("ranks")
    code, printed = job(folder / "said", _words(tiny_run, folder / "run"))
    assert code == 0, printed
    return folder / "run"


def _hashes(said: Path) -> list[str]:
    return [(said / f"rank{rank}").read_text() for rank in range(2)]


def test_ranks_end_with_the_same_router(tiny_run: Any, whole: Path) -> None:
    """To the bit; the first wrote everything that a run leaves."""
    one, other = _hashes(whole.parent / "said")
    assert one == other
    assert tiny_run.files <= {path.name for path in whole.iterdir()}


def test_backbone_is_that_of_one_process(
    tiny_run: Any, whole: Path, run_world: Path, finished: Path, shared_cache: Path
) -> None:
    """Ranks share out a batch, so its gradient is the same but for rounding."""
    (sharded,) = (run_world / "rank-cache").glob("backbone-*")
    one, other = load_file(sharded), load_file(shared_cache / sharded.name)
    flat, expected = (torch.cat([weight.flatten() for weight in weights.values()]) for weights in (one, other))
    assert not torch.equal(flat, expected)
    assert (flat - expected).norm() < 1e-3 * expected.norm()


def test_interrupt_of_one_rank_stops_all_and_resumes_to_the_same_router(
    job: Job, tiny_run: Any, whole: Path, tmp_path: Path
) -> None:
    """Draws of every rank are in the checkpoint: the router is that of the run without a break, to the bit."""
    run_dir = tmp_path / "run"
    code, printed = job(tmp_path / "said", _words(tiny_run, run_dir), "interrupted")
    assert code != 0
    assert f"go on with: python train_rl.py --resume {run_dir}" in printed
    code, printed = job(tmp_path / "said", ["--resume", str(run_dir)])
    assert code == 0, printed
    assert _hashes(tmp_path / "said") == _hashes(whole.parent / "said")
    assert tiny_run.same_weights(run_dir, whole)


def test_a_rank_that_dies_ends_the_job_with_its_own_error(job: Job, tiny_run: Any, whole: Path, tmp_path: Path) -> None:
    """Within a minute; what was saved before it is gone on from."""
    started = time.monotonic()
    code, printed = job(tmp_path / "said", _words(tiny_run, tmp_path / "run"), "killed")
    assert time.monotonic() - started < SECONDS
    assert code != 0
    assert "Signal 9 (SIGKILL) received by PID" in printed
    assert "rank      : 1" in printed
    code, printed = job(tmp_path / "said", ["--resume", str(tmp_path / "run")])
    assert code == 0, printed
    assert tiny_run.same_weights(tmp_path / "run", whole)


def test_torchrun_starts_a_job_again_where_it_was(job: Job, tiny_run: Any, whole: Path, tmp_path: Path) -> None:
    """The command has no --resume; the folder that it names is gone on with."""
    code, printed = job(tmp_path / "said", _words(tiny_run, tmp_path / "run"), "killed", restarts=1)
    assert code == 0, printed
    assert "going on at timestep" in printed
    assert tiny_run.same_weights(tmp_path / "run", whole)

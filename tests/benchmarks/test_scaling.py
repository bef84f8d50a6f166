"""Weak scaling: what the table says, and a job of two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.scaling import by_itself, table
from moe_backbone import ranks

ROOT = Path(__file__).parents[2]
TINY = {
    "rounds": "1",
    "train.backbone.hidden-size": "16",
    "train.backbone.num-layers": "1",
    "train.backbone.num-heads": "2",
    "train.backbone.num-experts": "4",
    "train.backbone.top-k": "2",
    "train.backbone.intermediate-size": "8",
    "train.backbone.seq-len": "8",
    "train.pretrain.sequences": "2",
    "train.ppo.num-sequences": "1",
    "train.ppo.batch-size": "64",
}


def test_efficiency_is_the_median_of_ratios_within_a_round() -> None:
    """A slow round of all ways counts no more than a fast one."""
    seconds = {"step": {"alone": [1.0, 10.0, 1.0], "beside": [1.25, 12.5, 1.25], "together": [2.0, 20.0, 1.0]}}
    console = Console(width=120)
    with console.capture() as shown:
        console.print(table(2, seconds))
    row = next(line for line in shown.get().splitlines() if "step" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("step", "1000", "1250", "2000", "0.50 [0.50, 0.75]", "0.80", "0.62")
    ]


def test_a_rank_by_itself_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error it is one of many again."""
    monkeypatch.setattr(ranks, "world_size", lambda: 4)
    with pytest.raises(ZeroDivisionError), by_itself():
        assert ranks.world_size() == 1
        raise ZeroDivisionError
    assert ranks.world_size() == 4


def test_two_ranks_work_alone_beside_and_together(tmp_path: Path) -> None:
    """Both subjects get a time for every way, and the weights agreed, or the job would have failed."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text(f"document {number} " * 50)
    words = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "benchmarks.scaling", *words, "--train.corpus", str(text)]
    output = tmp_path / "scaling.json"
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds = json.loads(output.read_text())["seconds"]
    assert set(seconds) == {"step of pretraining", "iteration of PPO"}
    assert all(len(ways[way]) == 1 for ways in seconds.values() for way in ("alone", "beside", "together"))

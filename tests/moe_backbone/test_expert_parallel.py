"""Experts over ranks: the same model, each rank with a part of its experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_backbone import BackboneConfig, MoETransformer, NativeRouter
from moe_backbone.expert_parallel import spread_experts
from moe_backbone.placement import place_experts

JOB = Path(__file__).parents[1] / "helpers" / "expert_job.py"


def _run(rule: str, ranks: int) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    where = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(JOB), rule], env=where, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("rule", "ranks"), [("balanced", 2), ("round_robin", 4)])
def test_output_is_that_of_the_whole_model(rule: str, ranks: int) -> None:
    """Native and random subsets, empty ones too, a rank without tokens; what is counted is what was sent."""
    found = _run(rule, ranks)
    assert max(error for rank in found["ranks"] for error in rank["errors"]) < 1e-5
    assert [sum(layer) for layer in zip(*(rank["experts"] for rank in found["ranks"]), strict=True)] == [5, 5]
    assert found["same_traffic"]


def test_replicas_are_drawn_and_change_nothing() -> None:
    """Every rank has every expert, and tokens are spread over both."""
    found = _run("random", 2)
    assert max(error for rank in found["ranks"] for error in rank["errors"]) < 1e-5
    assert all(rank["experts"] == [5, 5] for rank in found["ranks"])
    assert min(found["rows"]) > 0


def test_one_rank_runs_it_too(tiny_config: BackboneConfig, tiny_tokens: torch.Tensor) -> None:
    """Without torchrun, to the bit."""
    torch.manual_seed(0)
    backbone = MoETransformer(tiny_config).requires_grad_(False).eval()
    expected = backbone.run(tiny_tokens, NativeRouter())[0]
    spread_experts(backbone, [place_experts("round_robin", 1, torch.ones(4))] * 2)
    assert torch.equal(backbone.run(tiny_tokens, NativeRouter())[0], expected)


def test_what_does_not_fit_is_refused(tiny_config: BackboneConfig) -> None:
    """Nodes that are no ranks, and a layer without a placement."""
    backbone = MoETransformer(tiny_config).eval()
    with pytest.raises(ValueError, match="one node for each of 1 ranks, got 2"):
        spread_experts(backbone, [place_experts("round_robin", 2, torch.ones(4))] * 2)
    with pytest.raises(ValueError, match="placements must be one for each of 2, got 1"):
        spread_experts(backbone, [place_experts("round_robin", 1, torch.ones(4))])

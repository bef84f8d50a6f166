"""A backbone that is adapted to its router, and a router that is trained for a budget, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.report import load_evaluation
from policies.callbacks import GateSteps
from policies.portable import load_router
from policies.routing_ppo import RoutingPPO
from train_rl import load_run, main

pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]
QUICK = {"evaluation__routers": "top-k", "adapt_backbone": 6}


@pytest.fixture(scope="module")
def adapted(start_run: Callable[..., Path]) -> Path:
    """Folder of a run whose backbone was adapted."""
    return start_run("adapted", **QUICK)


def test_run_brings_its_own_backbone(tiny_run: Any, adapted: Path, finished: Path) -> None:
    """The router is tied to the adapted weights, which are others than those it began with."""
    _, _, backbone = load_run(adapted, "cpu")
    _, _, before = load_run(finished, "cpu")
    assert backbone.sha256() != before.sha256()
    router = load_router(adapted, backbone)
    with pytest.raises(ValueError, match="router must be made for this backbone"):
        load_router(adapted, before)
    assert router.calibration is not None
    assert not (adapted / "backbone.partial").exists()


def test_comparison_is_with_a_backbone_trained_on_as_long(adapted: Path, finished: Path) -> None:
    content = load_evaluation(adapted / "evaluation.json")
    control = content["control"]
    assert control["router"] == "native-fine-tuned"
    assert control["compute"] == pytest.approx(1.0)
    assert control["log_likelihood"] > load_evaluation(finished / "evaluation.json")["native"]["log_likelihood"]
    assert load_evaluation(finished / "evaluation.json")["control"] is None
    tables = (adapted / "tables.txt").read_text()
    assert "Backbone trained on as long under native routing" in tables
    best = max(control["accuracy"], content["native"]["accuracy"])
    assert f"99% of the better native accuracy is {0.99 * best:.4f}" in tables


def test_interrupted_after_the_adaptation_ends_like_one_that_was_not(
    tiny_run: Any, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        start, starts = GateSteps._on_training_start, []

        def second_stops(self: GateSteps) -> None:
            starts.append(1)
            if len(starts) == 2:
                raise KeyboardInterrupt
            start(self)

        patch.setattr(GateSteps, "_on_training_start", second_stops)
        with pytest.raises(SystemExit):
            main(tiny_run.words(run_dir, **QUICK))
    assert (run_dir / "backbone.safetensors").exists()
    main(["--resume", str(run_dir)])
    assert tiny_run.same_weights(run_dir, adapted)


def test_router_for_a_budget_is_calibrated_around_it(tiny_run: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    main(tiny_run.words(run_dir, evaluation__routers="top-k", cost_limit=0.7))
    multiplier = RoutingPPO.load(run_dir / "router.zip", device="cpu").lagrangian_multiplier
    _, _, backbone = load_run(run_dir, "cpu")
    calibration = load_router(run_dir, backbone).calibration
    assert calibration is not None
    assert sum(abs(price / multiplier - 1) < 0.3 for price in calibration.prices) >= 5
    assert list(calibration.prices) == sorted(calibration.prices)


@pytest.mark.parametrize("limit", ["0", "1.5"])
def test_impossible_budget_is_refused(refusal: Callable[..., str], limit: str) -> None:
    assert f"cost_limit must lie in (0, 1], got {float(limit)}" in refusal(main, ["--cost-limit", limit])

"""A finished run: what lies in its folder, and that the same command leaves the same router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate_rl
from evaluation.report import KEYS, load_evaluation
from policies.baselines import FIXED_NAMES
from policies.router_policy import RouterPolicy
from policies.routing_ppo import RoutingPPO
from run_folder import LIBRARIES, read_config
from train_rl import main, parse
from training_config import PRESETS, TrainConfig

POINT_KEYS = {
    "router",
    "setting",
    "seed",
    "compute",
    "router_overhead",
    "compute_total",
    "accuracy",
    "log_likelihood",
    "accuracy_retained",
    "delta_log_likelihood",
    "units_per_token",
    "distinct_units",
    "load_cv",
    "max_vio",
    "dead_units",
    "diversity",
    "busiest_load",
    "seconds",
    "causal",
    "selection",
}
SUMMARY_KEYS = {
    *("hypervolume", "aiq", "compute_at_99_accuracy", "accuracy_at_50_compute"),
    *("seeds", "intervals", "rival"),
}
pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    # of SB3's rollout buffer, which leave-one-out advantages do not use
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]


def test_run_folder_holds_what_the_design_says(tiny_run: Any, finished: Path) -> None:
    """Every file, TensorBoard's among them, and no scratch file."""
    names = {path.name for path in finished.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert names - events == tiny_run.files | {".lock"}
    assert len(events) == 1
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "last-gates.pt",
        "last-previous.pt",
        "last.pt",
    ]
    assert (finished / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_run_folder_says_how_it_was_made(tiny_run: Any, finished: Path) -> None:
    """Settings that read back equal, the command, and the versions of all libraries."""
    assert read_config(finished, TrainConfig) == parse(tiny_run.words(finished))
    command = (finished / "command.txt").read_text()
    assert command.startswith("python train_rl.py --corpus ")
    assert f"--seed {tiny_run.seed}" in command
    versions = json.loads((finished / "versions.json").read_text())
    assert set(versions) >= {*LIBRARIES, "python", "system"}
    assert versions["torch"] == torch.__version__


def test_evaluation_follows_the_schema(tiny_run: Any, finished: Path) -> None:
    """Schema 1: native first, the learned router once a price with its seed and its own cost, on the test part."""
    content = load_evaluation(finished / "evaluation.json")
    assert set(content) == KEYS | {"comparisons", "checks", "oracle", "control"}
    assert content["corpus"]["split"] == "test"
    assert content["corpus"]["documents"] >= 2
    assert len(content["backbone"]["sites"]) == tiny_run.num_sites
    assert content["native"]["log_likelihood"] < 0
    points = content["points"]
    for point in points:
        assert set(point) == POINT_KEYS
        assert len(point["units_per_token"]) == tiny_run.num_sites
        interval = point["delta_log_likelihood"]
        assert interval["low"] <= interval["mean"] <= interval["high"]
        assert 0 <= point["accuracy"] <= 1
    assert points[0]["router"] == "native"
    assert points[0]["compute"] == pytest.approx(1.0)
    learned = [point for point in points if point["router"] == "learned"]
    prices = [point["setting"]["price"] for point in learned]
    low, high = PRESETS["small"][1].env.price_low, PRESETS["small"][1].env.price_high
    assert prices == pytest.approx([low, (low * high) ** 0.5, high], rel=1e-3)
    assert {point["seed"] for point in learned} == {tiny_run.seed}
    for point in learned:
        assert 0 < point["router_overhead"] < point["compute"]
    assert {point["router"] for point in points} == {"native", "learned", *FIXED_NAMES}
    assert set(content["summary"]) == {point["router"] for point in points} - {"native"}
    assert all(set(entry) == SUMMARY_KEYS for entry in content["summary"].values())


def test_tensorboard_shows_learning_routing_and_evaluation(tiny_run: Any, finished: Path) -> None:
    """SB3's names, ours beside them, and a figure."""
    events = EventAccumulator(str(finished)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        "rollout/ep_rew_mean",
        "train/gradient_norm",
        "train/flip_rate",
        "train/approx_kl",
        "train/learning_rate",
        "time/fps",
        "reward/quality",
        "reward/cost",
        "routing/compute",
        "routing/load_cv",
        "units_per_token/layer1.experts",
        "eval/native_loss",
    }
    assert "figures/tradeoff" in events.Tags()["images"]
    assert len(events.Scalars("rollout/ep_rew_mean")) == tiny_run.num_updates
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0] / 2


def test_both_saved_routers_are_the_same_and_have_learned(tiny_run: Any, finished: Path) -> None:
    """The zip for SB3 and the portable files hold equal weights, which are no longer zero."""
    model = RoutingPPO.load(finished / "router.zip", device="cpu")
    assert isinstance(model.policy, RouterPolicy)
    router = model.policy.router
    weights = tiny_run.weights(finished)
    assert {"weight", "price_weight", "compensation.sites.0.vectors", "compensation.sites.1.scale"} < set(weights)
    for name, weight in router.state_dict().items():
        assert torch.equal(weight.cpu(), weights[name])
        assert weight.abs().max() > 1e-4
    assert model.num_timesteps == tiny_run.num_updates * tiny_run.transitions


def test_evaluation_alone_repeats_the_learned_points(tiny_run: Any, finished: Path, tmp_path: Path) -> None:
    """`evaluate_rl.py` on the run folder: the same numbers to the last digit, time aside, and the run untouched."""
    before = (finished / "evaluation.json").read_bytes()
    words = [word for name, value in tiny_run.evaluation.items() for word in (f"--{name}", str(value))]
    evaluate_rl.main([str(finished), "--output", str(tmp_path), "--device", "cpu", *words])

    def points(folder: Path) -> list[dict[str, Any]]:
        content = load_evaluation(folder / "evaluation.json")
        return [{name: value for name, value in point.items() if name != "seconds"} for point in content["points"]]

    assert points(tmp_path) == points(finished)
    assert (finished / "evaluation.json").read_bytes() == before


def test_same_command_learns_the_same_router_and_another_seed_another(
    tiny_run: Any, finished: Path, tmp_path: Path
) -> None:
    """To the bit; every difference of a run is in its folder and its seed."""
    torch.rand(3)
    main(tiny_run.words(tmp_path / "again", evaluation__routers="top-k"))
    assert tiny_run.same_weights(tmp_path / "again", finished)
    main(tiny_run.words(tmp_path / "other", evaluation__routers="top-k", seed=tiny_run.seed + 1))
    assert not tiny_run.same_weights(tmp_path / "other", finished)

"""Rivals are trained once, kept in the run folder, and come back as what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_rivals
from evaluation import Evaluator
from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.corpus import Corpus
from policies.ada_k import AdaKConfig
from policies.gating import GateTrainer, GatingConfig
from train_rivals import RIVALS, DQNSettings, OnPolicySettings, RivalPoint, RivalSettings

SETTINGS = RivalSettings(
    gating=GatingConfig(steps=3, num_sequences=2),
    gating_l0=GatingConfig(steps=3, num_sequences=2, relaxation="hard_concrete"),
    cost_weights=(0.0, 10.0),
    ada_k=AdaKConfig(warm_updates=2, updates=3, batch_size=16),
    ada_k_sequences=2,
    a2c=OnPolicySettings(num_sequences=2, updates=2),
    reinforce=OnPolicySettings(critic=False, num_sequences=2, updates=2),
    dqn=DQNSettings(num_sequences=2, episodes=3, gradient_steps=2, batch_size=16),
)
NUM_PRICES, SEED = 3, 4
Train = Callable[..., list[RivalPoint]]


@pytest.fixture
def train(tiny_config: BackboneConfig, tiny_backbone: MoETransformer, tiny_corpus: Corpus, tmp_path: Path) -> Train:
    """Train a rival in one run folder, in less than a second."""
    from training_config import TrainConfig

    config = TrainConfig(backbone=tiny_config)
    config = replace(config, evaluation=replace(config.evaluation, num_prices=NUM_PRICES))

    def run(
        name: str, backbone: MoETransformer = tiny_backbone, settings: RivalSettings = SETTINGS, seed: int = SEED
    ) -> list[RivalPoint]:
        return RIVALS[name](config, backbone, tiny_corpus, seed, tmp_path, progress=False, settings=settings)

    return run


def _chosen(points: list[RivalPoint], backbone: MoETransformer, tokens: Tensor) -> list[Tensor]:
    """Subsets of every point, site after site."""
    with torch.no_grad():
        return [torch.cat(backbone.run(tokens, point.router)[1], dim=1) for point in points]


@pytest.mark.parametrize("name", RIVALS)
def test_second_call_finds_the_same_routers(
    train: Train,
    tiny_backbone: MoETransformer,
    tiny_tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Without learning again; the files are there, load no code, and every point has a setting of its own."""
    first = train(name)
    kept = tmp_path / "rivals" / f"{name}-seed{SEED}"
    files = {path.name for path in kept.rglob("*") if path.is_file()}
    assert files == {"rival.json", "router.json", "router.safetensors"}

    def refuse(*_: object) -> None:
        raise AssertionError("learned again")

    monkeypatch.setattr(train_rivals, "_learn", refuse)
    monkeypatch.setattr(train_rivals.AdaK, "learn", refuse)
    monkeypatch.setattr(GateTrainer, "train", refuse)
    second = train(name)
    assert [point.setting for point in second] == [point.setting for point in first]
    pairs = zip(*(_chosen(points, tiny_backbone, tiny_tokens) for points in (first, second)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert len({str(point.setting) for point in first}) == len(first) == (2 if name == "ada-k" else NUM_PRICES)
    assert {(point.name, point.seed) for point in first} == {(name, SEED)}
    with pytest.raises(AssertionError, match="learned again"):
        train(name, seed=SEED + 1)


@pytest.mark.parametrize("name", RIVALS)
def test_another_backbone_is_refused(train: Train, tiny_config: BackboneConfig, name: str) -> None:
    """A router reads features that another backbone does not have."""
    train(name)
    with pytest.raises(ValueError, match="router must be made for this backbone"):
        train(name, backbone=MoETransformer(tiny_config).requires_grad_(False).eval())


def test_other_settings_are_trained_anew(train: Train) -> None:
    """Only those of the rival itself count."""
    kept = train("reinforce")[0].router
    other = replace(SETTINGS, ada_k_sequences=1, dqn=replace(SETTINGS.dqn, episodes=9))
    assert torch.equal(train("reinforce", settings=other)[0].router.weight, kept.weight)  # type: ignore[attr-defined]
    other = replace(SETTINGS, reinforce=replace(SETTINGS.reinforce, updates=3))
    again = train("reinforce", settings=other)[0].router
    assert not torch.equal(again.weight, kept.weight)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RIVALS)
def test_evaluator_counts_the_routers_own_cost(
    train: Train, tiny_backbone: MoETransformer, tiny_corpus: Corpus, name: str
) -> None:
    """Every point can be scored, and compute includes what its router spends."""
    evaluator = Evaluator(tiny_backbone, tiny_corpus.test, max_tokens=64)
    for point in train(name):
        scored = evaluator.score(point.name, point.router, setting=point.setting, seed=point.seed)
        assert scored.router_overhead == point.router.overhead_flops / evaluator._meter.native_flops > 0  # type: ignore[attr-defined]
        assert scored.compute > scored.router_overhead


def test_ada_k_spends_less_where_experts_cost_more(
    train: Train, tiny_backbone: MoETransformer, tiny_tokens: Tensor
) -> None:
    """At 10 nats an expert fewer run than at no cost; heads stay native, so no token runs less than 8 + 2 units."""
    preset = replace(SETTINGS.ada_k, warm_start="none", updates=30, learning_rate=0.03)
    settings = replace(SETTINGS, ada_k=preset)
    free, dear = _chosen(train("ada-k", settings=settings), tiny_backbone, tiny_tokens)
    assert dear.sum(1).amin() == 2 * 4 + 2 * 1
    assert (dear.sum(1) - 8).float().mean() < 0.8 * (free.sum(1) - 8).float().mean()


def test_reinforce_is_a2c_without_critic(train: Train) -> None:
    """Same seed, same settings but the critic: other weights; told not to train one, A2C is REINFORCE to the bit."""
    reinforce, a2c = train("reinforce")[0].router, train("a2c")[0].router
    assert not torch.equal(reinforce.weight, a2c.weight)  # type: ignore[attr-defined]
    alike = replace(SETTINGS, a2c=SETTINGS.reinforce)
    assert torch.equal(train("a2c", settings=alike)[0].router.weight, reinforce.weight)  # type: ignore[attr-defined]

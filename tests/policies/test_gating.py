"""Gates trained by back-propagation: they learn, answer to the price, go on after a stop, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from envs import EnvConfig, FixedSource, RoutingMDP
from moe_backbone import MoETransformer, NativeRouter
from policies.calibration import mean_compute
from policies.gating import GateTrainer, GatingConfig
from policies.linear_router import LinearRouter, RouterSpec

STEPS = GatingConfig(steps=30, num_sequences=3, learning_rate=0.03, save_every=10)


@pytest.fixture
def make_trainer(tiny_backbone: MoETransformer, tiny_tokens: torch.Tensor) -> Callable[..., GateTrainer]:
    """Trains on the same three sequences at drawn prices."""

    def make(config: GatingConfig = STEPS, *, compensation: bool = True, **kept: Any) -> GateTrainer:
        rules = EnvConfig(price_low=0.01, price_high=1.0)
        source = FixedSource(tiny_tokens, tiny_tokens.roll(-1, 1))
        mdp = RoutingMDP(tiny_backbone, source, rules, num_sequences=config.num_sequences)
        spec = RouterSpec(
            hidden_size=32, sites=tiny_backbone.sites, price_low=0.01, price_high=1.0, compensation=compensation
        )
        router, generator = LinearRouter(spec), np.random.default_rng(0)

        def restore(state: Any) -> None:
            generator.bit_generator.state = state

        generators = (lambda: generator.bit_generator.state, restore)
        draw: Any = lambda: mdp.draw(generator)  # noqa: E731
        return GateTrainer(router, tiny_backbone, draw, config, generators=generators, **kept)

    return make


def routed_loss(trainer: GateTrainer, price: float) -> float:
    """KL from native plus price times compute, without chance, on the text of the trainer."""
    batch, router = trainer.draw(), trainer.router.at_price(price)
    logits, _ = trainer.backbone.run(batch.tokens, router)
    native, _ = trainer.backbone.run(batch.tokens, NativeRouter())
    lost = torch.nn.functional.kl_div(logits.log_softmax(-1), native.log_softmax(-1), log_target=True, reduction="none")
    return lost.sum(-1).mean().item() + price * mean_compute(router, trainer.backbone, batch.tokens)


@pytest.mark.parametrize("meaning", ["query", "query_key_value"])
@pytest.mark.parametrize("relaxation", ["straight_through", "hard_concrete"])
def test_gates_learn(
    make_trainer: Callable[..., GateTrainer], tiny_backbone: MoETransformer, relaxation: Any, meaning: Any
) -> None:
    """At a low and at a high price the trained router is worth more than the prior, and a high price buys less."""
    tiny_backbone.head_meaning = meaning
    trainer = make_trainer(replace(STEPS, steps=120, relaxation=relaxation))
    before = [routed_loss(trainer, price) for price in (0.02, 0.9)]
    assert trainer.run(progress=False)
    after = [routed_loss(trainer, price) for price in (0.02, 0.9)]
    assert after[0] < before[0]
    assert after[1] < 0.9 * before[1]
    tokens = trainer.draw().tokens
    cheap, dear = (mean_compute(trainer.router.at_price(price), trainer.backbone, tokens) for price in (0.9, 0.02))
    assert cheap < dear - 0.1


def test_a_price_of_the_cache_drops_keys(
    make_trainer: Callable[..., GateTrainer], tiny_backbone: MoETransformer
) -> None:
    """Same text and draws: a dear cache leaves fewer keys than a free one; the expected cost is that of the meter."""
    tiny_backbone.head_meaning = "query_key_value"
    kept = {}
    for cache_price in (0.0, 3.0):
        trainer = make_trainer(replace(STEPS, steps=120), cache_price=cache_price)
        trainer.run(progress=False)
        _, subsets = trainer.backbone.run(trainer.draw().tokens, trainer.router.at_price(0.3))
        shares = [trainer.meter.cache_bytes(index, subset).mean().item() for index, subset in enumerate(subsets)]
        kept[cache_price] = sum(shares) / trainer.meter.native_cache_bytes
    assert kept[3.0] < kept[0.0] - 0.1
    batch = trainer.draw()
    trainer.router.weight.data[:, -1] = 100.0  # every chance is 1
    _, spent = trainer._episode(batch.tokens, batch.price.repeat_interleave(16))
    everything = [torch.ones(48, site.num_units, dtype=torch.bool) for site in tiny_backbone.sites]
    places = torch.arange(16).repeat(3)
    costs = [trainer.meter.compute(index, subset, places) for index, subset in enumerate(everything)]
    torch.testing.assert_close(spent.compute, torch.stack(costs).sum(0))
    torch.testing.assert_close(spent.cache, torch.ones(48))


def test_compensation_helps_and_is_trained(make_trainer: Callable[..., GateTrainer]) -> None:
    """Same text, same draws: with constants for what is skipped less is lost."""
    settings = replace(STEPS, steps=120)
    with_constants, without = make_trainer(settings), make_trainer(settings, compensation=False)
    for trainer in (with_constants, without):
        trainer.run(progress=False)
    assert routed_loss(with_constants, 0.9) < routed_loss(without, 0.9)
    assert without.router.compensation is None
    assert any(weight.abs().max() > 0.01 for weight in with_constants.router.compensation[0].parameters())


def test_training_leaves_the_backbone_and_the_flags_as_they_were(make_trainer: Callable[..., GateTrainer]) -> None:
    """No gradient stays behind that a later optimiser would clip by."""
    trainer = make_trainer()
    before = trainer.backbone.sha256()
    for weight in trainer.router.compensation_parameters():
        weight.requires_grad_(False)
    trainer.run(progress=False)
    assert trainer.backbone.sha256() == before
    assert trainer.backbone.compensation is None
    assert not any(weight.requires_grad for weight in trainer.router.compensation_parameters())
    assert all(weight.grad is None for weight in trainer.router.parameters())


def test_stopped_training_ends_like_one_that_was_not(make_trainer: Callable[..., GateTrainer], tmp_path: Path) -> None:
    """Weights, optimiser, draws of units and of text: to the bit."""
    whole = make_trainer()
    whole.run(progress=False)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 17

    first = make_trainer(checkpoint=tmp_path / "gates.pt")
    assert not first.run(progress=False, stop=stop)
    assert first.step == 17
    second = make_trainer(checkpoint=tmp_path / "gates.pt")
    steps: list[int] = []
    assert second.run(progress=False, stop=lambda: steps.append(1) is not None)
    assert len(steps) == whole.step - 17
    for name, weight in whole.router.state_dict().items():
        assert torch.equal(weight, second.router.state_dict()[name]), name


def test_finished_training_is_not_done_again(make_trainer: Callable[..., GateTrainer], tmp_path: Path) -> None:
    """The checkpoint of the end gives the weights of the end."""
    first = make_trainer(checkpoint=tmp_path / "gates.pt")
    first.run(progress=False)
    second = make_trainer(checkpoint=tmp_path / "gates.pt")
    assert second.run(progress=False, stop=lambda: pytest.fail("asked for a step"))
    assert torch.equal(first.router.weight, second.router.weight)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", -1, "steps must be at least 0, got -1"),
        ("learning_rate", 0.0, "learning_rate must be positive, got 0.0"),
        ("relaxation", "soft", "relaxation must be one of straight_through, hard_concrete, got 'soft'"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatingConfig(**{field: value})


def test_quality_without_gradient_is_refused(make_trainer: Callable[..., GateTrainer]) -> None:
    with pytest.raises(ValueError, match="quality must be kl or log_likelihood for gates, got accuracy"):
        make_trainer(quality="accuracy")

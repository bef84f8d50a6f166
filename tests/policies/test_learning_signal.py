"""What an update learns follows reward, bonus and seed, moves as far as the log says, and leaves the backbone alone.

Every check is a function; beside the test that it passes stands one that plants the bug and shows that it does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from envs import RoutingMDP, RoutingVecEnv
from envs import mdp as mdp_module
from envs.planted import PLANTED_RULES
from moe_backbone import MoETransformer
from policies import routing_ppo
from policies.bits import bits_entropy, bits_terms
from policies.routing_ppo import RoutingPPO

REWARD_RULES = {
    "base": PLANTED_RULES,
    "dearer": replace(PLANTED_RULES, price_low=2.0, price_high=2.0),
    "kl": replace(PLANTED_RULES, quality="kl"),
    "accuracy": replace(PLANTED_RULES, quality="accuracy"),
}


def check_results_respond_to_the_reward(make_model: Callable[..., Any]) -> None:
    """Same seed, other reward: other weights, for every pair of rewards, after a single update."""
    results = {}
    for name, rules in REWARD_RULES.items():
        model = make_model(rules)
        model.one_update()
        results[name] = model.router_weights()
    for one, other in itertools.combinations(results, 2):
        assert (results[one] - results[other]).abs().max() > 1e-4, (one, other)


def test_results_respond_to_reward_type_and_price(make_model: Callable[..., Any]) -> None:
    """Price, KL, log-likelihood and accuracy each teach something else."""
    check_results_respond_to_the_reward(make_model)


@pytest.mark.parametrize("bug", ["price ignored", "kind ignored", "no reward"])
def test_results_that_ignore_the_reward_are_seen(
    make_model: Callable[..., Any], bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: costs without their price, quality without its type, and neither of the two."""
    quality, unit_price = mdp_module.quality, vars(RoutingMDP)["unit_price"].fget
    assert unit_price is not None
    if bug == "price ignored":
        monkeypatch.setattr(RoutingMDP, "unit_price", property(lambda mdp: unit_price(mdp) / mdp.state.price))
    if bug == "kind ignored":
        monkeypatch.setattr(mdp_module, "quality", lambda kind, *tensors: quality("kl", *tensors))
    if bug == "no reward":
        monkeypatch.setattr(mdp_module, "quality", lambda *args: 0 * quality(*args))
        monkeypatch.setattr(RoutingMDP, "unit_price", property(lambda mdp: 0 * unit_price(mdp)))
    with pytest.raises(AssertionError):
        check_results_respond_to_the_reward(make_model)


def check_results_respond_to_the_entropy_bonus(make_model: Callable[..., Any]) -> None:
    """With a bonus the entropy after updates is higher than without."""
    entropies = []
    for weight in (0.0, 1.0):
        model = make_model(ent_coef=weight)
        for _ in range(5):
            model.one_update()
        entropies.append(bits_entropy(model.site_logits(model._episode)).mean().item())
    assert entropies[1] > entropies[0] + 0.01


def test_results_respond_to_the_entropy_bonus(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bonus keeps actions random; planted, an entropy without a graph is seen."""
    check_results_respond_to_the_entropy_bonus(make_model)

    def detached(logits: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_prob, entropy, count = bits_terms(logits, bits)
        return log_prob, entropy.detach(), count

    monkeypatch.setattr(routing_ppo, "bits_terms", detached)
    with pytest.raises(AssertionError):
        check_results_respond_to_the_entropy_bonus(make_model)


def check_flip_rate(make_model: Callable[..., Any]) -> None:
    """The logged share is that of the decisions an update turned round; none without a step, some after a large one."""
    rates = {}
    for learning_rate in (1e-12, 0.3):
        model = make_model(learning_rate=learning_rate, n_epochs=4)
        rates[learning_rate] = model.one_update().get("train/flip_rate", -1.0)
        turned = (model.site_logits(model._episode) > 0) != (make_model().site_logits(model._episode) > 0)
        assert rates[learning_rate] == pytest.approx(turned.float().mean().item())
    assert rates[1e-12] == 0
    assert rates[0.3] > 0.02


def test_flip_rate_is_reported(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of decisions that an update turned round; planted, a rate taken before the update is seen."""
    check_flip_rate(make_model)
    log_update = RoutingPPO._log_update
    monkeypatch.setattr(
        RoutingPPO, "_log_update", lambda self, stats, flips: log_update(self, stats, torch.zeros_like(flips))
    )
    with pytest.raises(AssertionError):
        check_flip_rate(make_model)


@pytest.mark.parametrize(("target_kl", "steps"), [(None, 8), (1e-6, 1)], ids=["no bound", "tight bound"])
def test_update_stops_when_the_policy_has_moved_too_far(
    make_model: Callable[..., Any], target_kl: float | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a tight bound the first step is the last; without one all epochs run."""
    taken: list[Tensor] = []
    descend = RoutingPPO._descend

    def counted(self: RoutingPPO, loss: Tensor) -> Tensor:
        taken.append(loss)
        return descend(self, loss)

    monkeypatch.setattr(RoutingPPO, "_descend", counted)
    make_model(target_kl=target_kl, n_epochs=8).one_update()
    assert len(taken) == steps


def check_seeds_differ(run: Callable[[int], Tensor], seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Every pair of runs ends with other weights."""
    results = [run(seed) for seed in seeds]
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one, other)


def test_three_seeds_are_three_runs(make_model: Callable[..., Any]) -> None:
    """A replication is one; planted, the same seed three times is seen."""

    def run(seed: int) -> Tensor:
        model = make_model(seed=seed)
        model.one_update()
        return model.router_weights()

    check_seeds_differ(run)
    with pytest.raises(AssertionError):
        check_seeds_differ(lambda seed: run(0))


def test_backbone_never_learns(make_model: Callable[..., Any]) -> None:
    """The router's world stands still: no backbone weight moves while it trains."""
    model = make_model()
    assert isinstance(model.env, RoutingVecEnv)
    before = model.env.mdp.backbone.sha256()
    model.learn(3 * model.env.num_envs * model.env.num_sites)
    backbone = model.env.mdp.backbone
    assert isinstance(backbone, MoETransformer)
    assert backbone.sha256() == before
    assert all(weight.grad is None for weight in backbone.parameters())

"""Ada-K: labels, loss and learning, against hand-worked and enumerated numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import EnvConfig, FixedSource, RoutingVecEnv
from envs.planted import PLANTED_CONFIG, PLANTED_RULES, PlantedSource, planted_backbone
from moe_backbone import MoETransformer
from policies.ada_k import AdaK, AdaKConfig, Allocation, calibrated_mass, expected_count, top_p_counts

RULES = replace(PLANTED_RULES, action="count", rollouts_per_sequence=1)
LANES = 16 * PLANTED_CONFIG.seq_len
PRESET = AdaKConfig(warm_start="none", updates=40, batch_size=32, learning_rate=0.01, cost_weight=0.01)
"""Fast enough for a problem of eight tokens."""


def _learner(seed: int = 0, rules: EnvConfig = RULES, **changes: Any) -> AdaK:
    env = RoutingVecEnv(LANES, planted_backbone(), PlantedSource(), rules, seed=seed)
    return AdaK(env, replace(PRESET, **changes), seed)


def _counts(learner: AdaK) -> Tensor:
    """What the router chooses without chance for the eight tokens of the vocabulary (8,), int64."""
    backbone = learner.env.mdp.backbone
    with torch.no_grad():
        return backbone.run(torch.arange(8)[None], learner.router)[1][1].sum(1)


def test_labels_of_a_worked_example() -> None:
    """Probabilities (.5, .3, .2): one expert reaches .49, two .6 and .8, three all; even gates need all for all."""
    scores = torch.tensor([0.3, 0.5, 0.2]).log()
    assert [top_p_counts(scores, mass).item() for mass in (0.1, 0.49, 0.6, 0.79, 0.9)] == [1, 1, 2, 2, 3]
    assert top_p_counts(torch.full((2, 4), 0.25).log(), 0.99).tolist() == [4, 4]


def test_mass_is_calibrated_to_the_mean_count() -> None:
    """On random gates the labels' mean is native k; so it is at other counts."""
    scores = torch.randn(3, 500, 8).mul(2).log_softmax(-1)
    for wanted in (1.5, 2.0, 4.0):
        labels = top_p_counts(scores, calibrated_mass(scores, wanted))
        assert labels.float().mean().item() == pytest.approx(wanted, abs=0.01)
        assert labels.unique().numel() > 2


def test_expected_count_of_a_worked_example() -> None:
    """0 and 2 half the time each, and 1 always."""
    chances = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    assert expected_count(chances.log()).tolist() == [1.0, 1.0]


def _enumerated_gradient(learner: AdaK, features: Tensor, qualities: Tensor) -> Tensor:
    """Mean gradient of the loss over the counts of one lane at one layer, each as often as it is drawn."""
    total = torch.zeros_like(learner.router.weight)
    log_probs = learner.router.values(slice(None), features).log_softmax(-1).detach()[0, 0]
    for count, quality in enumerate(qualities, start=1):
        counts = torch.tensor([[count]])
        part = Allocation(features, features, counts, log_probs[count].view(1, 1), quality.view(1, 1))
        learner.router.zero_grad()
        learner.loss(part).backward()
        assert learner.router.weight.grad is not None
        total += log_probs[count].exp() * learner.router.weight.grad
    return total


def test_both_forms_of_the_cost_have_the_gradient_of_the_objective() -> None:
    """Over all counts of a lane: minus the gradient of expected quality minus cost, exactly, in either form."""
    qualities, features = torch.tensor([0.3, -0.2, 0.5, 0.1]), torch.randn(1, 1, 32)
    gradients = []
    for cost in ("loss", "reward"):
        learner = _learner(cost=cost, cost_weight=0.2)
        torch.manual_seed(1)
        torch.nn.init.normal_(learner.router.weight, std=0.1)
        gradients.append(_enumerated_gradient(learner, features, qualities))
    log_probs = learner.router.values(slice(None), features).log_softmax(-1)
    objective = (log_probs[0, 0, 1:].exp() * qualities).sum() - 0.2 * expected_count(log_probs).sum()
    (exact,) = torch.autograd.grad(-objective, learner.router.weight)
    for gradient in gradients:
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)
    assert exact.abs().max() > 0.01


def test_clipped_ratio_stops_learning() -> None:
    """A count that has become much likelier and was good teaches nothing more; a bad one still does."""
    learner, features = _learner(cost_weight=0.0), torch.randn(1, 1, 32)
    for quality, learns in ((1.0, False), (-1.0, True)):
        learner.router.zero_grad()
        old = torch.full((1, 1), -5.0)  # now a quarter
        part = Allocation(features, features, torch.tensor([[2]]), old, torch.tensor([[quality]]))
        learner.loss(part).backward()
        assert learner.router.weight.grad is not None
        assert bool(learner.router.weight.grad.any()) == learns


def test_warm_starts_begin_where_they_say(tiny_backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """None: level. Native k: k for every token. Top-p: other counts too, whose mean is k."""
    source = FixedSource(tiny_tokens, tiny_tokens)
    env = RoutingVecEnv(tiny_tokens.numel(), tiny_backbone, source, RULES)
    config = AdaKConfig(warm_updates=20, batch_size=24, learning_rate=0.1, weight_decay=0.0)
    chosen = {}
    for warm_start in ("none", "native_k", "top_p"):
        learner = AdaK(env, replace(config, warm_start=warm_start), seed=0)
        learner.warm_up()
        if warm_start == "none":
            assert not learner.router.weight.any()
        with torch.no_grad():
            subsets = tiny_backbone.run(tiny_tokens, learner.router)[1]
        chosen[warm_start] = torch.stack(subsets[1::2]).sum(-1).float()
        assert all(heads.all() for heads in subsets[::2])
    assert (chosen["native_k"] == 2).all()
    assert chosen["top_p"].mean().item() == pytest.approx(2, abs=0.15)
    assert chosen["top_p"].std() > 0.3


def _count_returns(learner: AdaK) -> Tensor:
    """Quality minus cost of one to four experts for every token of the vocabulary (4, 8), each tried."""
    mdp = RoutingVecEnv(8, learner.env.mdp.backbone, PlantedSource(), RULES).mdp
    tokens, heads, returns = torch.arange(8)[None], torch.full((8,), 2), []
    batch = mdp.draw(np.random.default_rng(0), tokens=tokens, targets=(tokens + 3) % 8)
    for count in range(1, 5):
        mdp.begin(batch)
        mdp.step(heads)
        returns.append(mdp.step(torch.full((8,), count)).quality - count * learner.config.cost_weight)
    return torch.stack(returns)


@pytest.mark.parametrize("cost", ["loss", "reward"])
def test_learns_the_best_count_of_every_token(cost: str) -> None:
    """The gate asks a wrong expert first, so one is not enough and how many are depends on the token."""
    learner = _learner(cost=cost)
    returns = _count_returns(learner)
    best = returns.argmax(0) + 1
    assert best.tolist() == [2, 3, 4, 4, 2, 3, 4, 4]
    learner.learn()
    assert torch.equal(_counts(learner), best)


def test_cost_weight_sets_the_count() -> None:
    """Nothing is worth 100 nats an expert; the same seed learns the same, to the bit, and another seed otherwise."""
    weights = []
    for seed, cost_weight in ((0, 100.0), (0, 0.01), (0, 0.01), (1, 0.01)):
        learner = _learner(seed=seed, cost_weight=cost_weight, updates=15)
        learner.learn()
        weights.append(learner.router.weight.detach().clone())
        if cost_weight == 100.0:
            assert (_counts(learner) == 1).all()
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[3])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (replace(RULES, action="subset"), "action must be 'count' for Ada-K, got 'subset'"),
        (replace(RULES, quality="kl"), "quality must be 'log_likelihood' for Ada-K, got 'kl'"),
    ],
    ids=["action", "quality"],
)
def test_other_rules_are_refused(rules: EnvConfig, message: str) -> None:
    """The message names the rule."""
    with pytest.raises(ValueError, match=message):
        _learner(rules=rules)


def test_impossible_settings_are_refused() -> None:
    """The message names name, rule and value."""
    with pytest.raises(ValueError, match="warm_start must be one of top_p, native_k, none, got 'random'"):
        AdaKConfig(warm_start="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cost_weight must be at least 0, got -1"):
        AdaKConfig(cost_weight=-1)

"""Reward terms by hand; native routing is the zero of quality and the unit of compute; nothing leaks the label."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import EnvConfig, RoutingMDP, Step, TokenBatch, TokenSource
from envs.reward import quality, step_reward
from moe_backbone import MoETransformer, best_units
from moe_backbone.quality import credited

SEED = 7
NUM_SEQUENCES, SEQ_LEN = 3, 8
MANY = 2000
"""Sequences of which prices are counted; at this many the largest gap to a uniform law is below .037 in 99 %."""
LOG_3 = math.log(3)
NATIVE_LOGITS = torch.tensor([[[0.0, LOG_3]]])
"""Probabilities 1/4 and 3/4."""
ROUTED_LOGITS = torch.tensor([[[LOG_3, 0.0]]])
"""Probabilities 3/4 and 1/4."""
KINDS = ("kl", "log_likelihood", "accuracy")


def _mdp(
    backbone: MoETransformer, source: TokenSource, num_sequences: int = NUM_SEQUENCES, **rules: object
) -> RoutingMDP:
    return RoutingMDP(backbone, source, EnvConfig(**rules), num_sequences=num_sequences)  # type: ignore[arg-type]


def _draw(mdp: RoutingMDP, **given: object) -> TokenBatch:
    return mdp.draw(np.random.default_rng(SEED), **given)  # type: ignore[arg-type]


def _native_action(mdp: RoutingMDP) -> Tensor:
    view = mdp.backbone.observe(mdp.state)
    subset = best_units(view.scores, view.site.native_units)
    return torch.nn.functional.pad(subset, (0, mdp.layout.max_units - view.site.num_units))


def _native_episode(mdp: RoutingMDP, batch: TokenBatch) -> list[Step]:
    mdp.begin(batch)
    return [mdp.step(_native_action(mdp)) for _ in mdp.backbone.sites]


def _random_episode(mdp: RoutingMDP, batch: TokenBatch) -> tuple[list[Tensor], list[Step]]:
    generator = torch.Generator().manual_seed(SEED)
    observations, steps = [mdp.begin(batch)], []
    for _ in mdp.backbone.sites:
        steps.append(mdp.step(torch.rand(mdp.num_lanes, mdp.layout.max_units, generator=generator) < 0.5))
        observations.append(steps[-1].observation)
    return observations, steps


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("kl", 0, -(0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25))),
        ("kl", 1, -0.5 * LOG_3),
        ("log_likelihood", 0, LOG_3),
        ("log_likelihood", 1, -LOG_3),
        ("accuracy", 0, 1.0),
        ("accuracy", 1, -1.0),
    ],
)
def test_quality_by_hand(kind: str, target: int, expected: float) -> None:
    """Probabilities turned round from (1/4, 3/4): minus half log 3, plus or minus log 3, plus or minus one."""
    value = quality(kind, NATIVE_LOGITS, ROUTED_LOGITS, torch.tensor([[target]]))
    torch.testing.assert_close(value, torch.tensor([[expected]]))


def test_divergence_is_taken_from_native() -> None:
    """KL(native || routed), not the other way round: native certain of what routed holds for 1/4 costs log 4."""
    native = torch.tensor([[[-100.0, 0.0]]])
    value = quality("kl", native, ROUTED_LOGITS, torch.tensor([[0]]))
    torch.testing.assert_close(value, torch.tensor([[-math.log(4)]]))


def test_credit_of_a_sequence_is_its_mean() -> None:
    """Each lane gets its own value, or all lanes of one sequence the mean."""
    values, targets = torch.tensor([[0.0, 4.0], [1.0, 3.0]]), torch.ones(2, 2).long()
    assert credited(values, targets, "token").tolist() == [[0.0, 4.0], [1.0, 3.0]]
    assert credited(values, targets, "sequence").tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_step_reward_by_hand() -> None:
    """Quality minus price times compute; before the last site only the latter."""
    price, compute = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 0.125])
    assert step_reward(price, compute, None).tolist() == [-0.125, -0.25]
    assert step_reward(price, compute, torch.tensor([1.0, -1.0])).tolist() == [0.875, -1.25]


def test_unit_price_is_what_one_more_unit_costs(backbone: MoETransformer, source: TokenSource) -> None:
    """Times the chosen units it is the cost that the step takes off the reward, at every site and position."""
    mdp = _mdp(backbone, source)
    mdp.begin(_draw(mdp))
    generator = torch.Generator().manual_seed(SEED)
    for site in backbone.sites:
        action = torch.rand(mdp.num_lanes, mdp.layout.max_units, generator=generator) < 0.5
        paid = mdp.unit_price * action[:, : site.num_units].sum(1)
        step = mdp.step(action)
        torch.testing.assert_close(step.reward - step.quality, -paid, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_native_rollout_earns_nothing_and_pays_the_price_of_one(
    backbone: MoETransformer, source: TokenSource, kind: Literal["kl", "log_likelihood", "accuracy"]
) -> None:
    """Quality 0 for every token, and the mean return of each full sequence is minus its price."""
    mdp = _mdp(backbone, source, quality=kind)
    batch = _draw(mdp)
    steps = _native_episode(mdp, batch)
    torch.testing.assert_close(steps[-1].quality, torch.zeros(mdp.num_lanes), rtol=0, atol=1e-6)
    cost = torch.stack([step.cost for step in steps]).sum(0).view(NUM_SEQUENCES, SEQ_LEN)
    torch.testing.assert_close(cost.mean(1), torch.ones(NUM_SEQUENCES))
    total = torch.stack([step.reward for step in steps]).sum(0).view(NUM_SEQUENCES, SEQ_LEN)
    torch.testing.assert_close(total.mean(1), -batch.price, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_last_reward_holds_the_quality_of_the_logits(
    backbone: MoETransformer, source: TokenSource, kind: Literal["kl", "log_likelihood", "accuracy"]
) -> None:
    """Quality comes once, at the end, and is that of the routed logits against the native ones."""
    mdp = _mdp(backbone, source, quality=kind)
    drawn = _draw(mdp)
    batch = replace(drawn, targets=drawn.native_logits.argmax(-1))  # native always right, so accuracy can fall
    _, steps = _random_episode(mdp, batch)
    assert all((step.quality == 0).all() for step in steps[:-1])
    assert mdp.logits is not None
    expected = quality(kind, batch.native_logits, mdp.logits, batch.targets).flatten()
    assert expected.min() < 0
    torch.testing.assert_close(steps[-1].quality, expected)
    price = batch.price.repeat_interleave(SEQ_LEN)
    torch.testing.assert_close(steps[-1].reward, expected - price * steps[-1].cost)


def test_sequence_credit_pays_every_lane_the_mean_quality_and_its_own_cost(
    backbone: MoETransformer, source: TokenSource
) -> None:
    """The same episode under both credits: equal costs, and the mean of a sequence in place of each value."""
    outcomes = {}
    for credit in ("token", "sequence"):
        mdp = _mdp(backbone, source, credit=credit)
        outcomes[credit] = _random_episode(mdp, _draw(mdp))[1][-1]
    own = outcomes["token"].quality.view(NUM_SEQUENCES, SEQ_LEN)
    paid = outcomes["sequence"].quality.view(NUM_SEQUENCES, SEQ_LEN)
    torch.testing.assert_close(paid, own.mean(1, keepdim=True).expand_as(own))
    assert torch.equal(outcomes["token"].cost, outcomes["sequence"].cost)
    assert (own - paid).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_observations_never_hold_the_label(
    backbone: MoETransformer, source: TokenSource, kind: Literal["kl", "log_likelihood", "accuracy"]
) -> None:
    """Other next tokens change no observation and no cost, only the quality, and KL not even that."""
    mdp = _mdp(backbone, source, quality=kind)
    batch = _draw(mdp)
    right = replace(batch, targets=batch.native_logits.argmax(-1))
    wrong = replace(batch, targets=batch.native_logits.argmin(-1))
    observations, steps = _random_episode(mdp, right)
    others, other_steps = _random_episode(mdp, wrong)
    assert all(torch.equal(one, other) for one, other in zip(observations, others, strict=True))
    assert all(torch.equal(one.cost, other.cost) for one, other in zip(steps, other_steps, strict=True))
    assert torch.equal(steps[-1].quality, other_steps[-1].quality) == (kind == "kl")


def test_observations_never_hold_a_later_token(backbone: MoETransformer, source: TokenSource) -> None:
    """The last token is the label of the one before: changing it changes no observation of earlier lanes."""
    mdp = _mdp(backbone, source)
    batch = _draw(mdp)
    changed = replace(batch, tokens=batch.tokens.clone())
    changed.tokens[:, -1] = (changed.tokens[:, -1] + 1) % 32
    for one, other in zip(_random_episode(mdp, batch)[0], _random_episode(mdp, changed)[0], strict=True):
        same = (one == other).all(1).view(NUM_SEQUENCES, SEQ_LEN)
        assert same[:, :-1].all()
        assert not same[:, -1].any()


def test_prices_are_log_uniform_over_the_range(backbone: MoETransformer, source: TokenSource) -> None:
    """Every decade is equally likely, and no price lies outside."""
    mdp = _mdp(backbone, source, num_sequences=MANY, price_low=0.01, price_high=1.0)
    price = _draw(mdp).price
    assert price.min() >= 0.01
    assert price.max() <= 1.0
    quantiles = (price.log().sort().values - math.log(0.01)) / math.log(100)
    assert (quantiles - torch.linspace(0, 1, MANY)).abs().max() < 0.037


def test_a_range_of_one_price_is_that_price(backbone: MoETransformer, source: TokenSource) -> None:
    """And a price given at reset overrides the range, for every sequence."""
    mdp = _mdp(backbone, source, price_low=0.3, price_high=0.3)
    torch.testing.assert_close(_draw(mdp).price, torch.full((NUM_SEQUENCES,), 0.3))
    torch.testing.assert_close(_draw(mdp, price=2.0).price, torch.full((NUM_SEQUENCES,), 2.0))


def test_copies_of_a_sequence_are_neighbours_with_the_same_text_and_price(
    backbone: MoETransformer, source: TokenSource
) -> None:
    """Groups for a leave-one-out baseline: same tokens, targets, price and native logits; groups differ."""
    mdp = _mdp(backbone, source, rollouts_per_sequence=4)
    batch = _draw(mdp)
    assert batch.tokens.shape == (4 * NUM_SEQUENCES, SEQ_LEN)
    assert mdp.num_lanes == batch.tokens.numel()
    for part in (batch.tokens, batch.targets, batch.price, batch.native_logits):
        groups = part.unflatten(0, (NUM_SEQUENCES, 4))
        assert (groups == groups[:, :1]).all()
        assert not torch.equal(groups[0], groups[1])


def test_same_actions_give_copies_the_same_return_and_other_actions_another(
    backbone: MoETransformer, source: TokenSource
) -> None:
    """What sets copies apart is what they do, nothing else."""
    mdp = _mdp(backbone, source, rollouts_per_sequence=2)
    batch = _draw(mdp)
    native = torch.stack([step.reward for step in _native_episode(mdp, batch)]).sum(0).view(NUM_SEQUENCES, 2, SEQ_LEN)
    torch.testing.assert_close(native[:, 0], native[:, 1])
    random = torch.stack([step.reward for step in _random_episode(mdp, batch)[1]]).sum(0)
    assert not torch.allclose(random.view_as(native)[:, 0], random.view_as(native)[:, 1])

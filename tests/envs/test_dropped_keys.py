"""Environments in which a token drops its keys: what is paid is what runs, and what is kept may have a price."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import EnvConfig, FixedSource, RoutingMDP, TokenSource
from moe_backbone import BackboneConfig, ComputeMeter, MoETransformer

SEED, NUM_SEQUENCES = 5, 3
THREE_TOKENS = torch.tensor([[True, True], [False, True], [True, False]])
"""Subset of three tokens and two heads: head 0 keeps tokens 0 and 2, head 1 tokens 0 and 1."""


@pytest.fixture
def kept(backbone: MoETransformer) -> MoETransformer:
    """The backbone under which a token drops out of the heads that it does not use."""
    backbone.head_meaning = "query_key_value"
    return backbone


def _mdp(backbone: MoETransformer, source: TokenSource, **rules: float) -> RoutingMDP:
    mdp = RoutingMDP(backbone, source, EnvConfig(**rules), num_sequences=NUM_SEQUENCES)  # type: ignore[arg-type]
    mdp.reset(np.random.default_rng(SEED))
    return mdp


def _actions(mdp: RoutingMDP) -> Tensor:
    return torch.rand(len(mdp.backbone.sites), mdp.num_lanes, mdp.layout.max_units) < 0.5


def test_costs_of_three_tokens_by_hand() -> None:
    """hidden_size 8, two heads: a projection is 64 FLOPs, a key 16, and a head keeps half of a token's bytes.

    Tokens find 1 and 1, none and 2, 2 and no keys in the heads that they use.
    """
    sizes = {"hidden_size": 8, "num_heads": 2, "num_layers": 1, "num_experts": 2, "top_k": 1, "seq_len": 3}
    backbone = MoETransformer(BackboneConfig(vocab_size=4, intermediate_size=4, **sizes)).requires_grad_(False)
    backbone.head_meaning = "query_key_value"
    tokens = torch.tensor([[0, 1, 2]])
    for cache_price in (0.0, 0.5):
        config = EnvConfig(price_low=2.0, price_high=2.0, cache_price=cache_price)
        mdp = RoutingMDP(backbone, FixedSource(tokens, tokens), config)
        mdp.reset(np.random.default_rng(0))
        prices, step = mdp.unit_prices(THREE_TOKENS), mdp.step(THREE_TOKENS)
        flops = torch.tensor([2 * (4 * 64 + 16), 4 * 64 + 2 * 16, 4 * 64 + 2 * 16])
        share = torch.tensor([1.0, 0.5, 0.5])
        torch.testing.assert_close(step.cost, flops / mdp.meter.native_flops + cache_price * share)
        torch.testing.assert_close(step.reward, -2.0 * step.cost)
        keys = torch.tensor([[1, 1], [2, 2], [2, 3]])
        expected = 2.0 * ((4 * 64 + 16 * keys) / mdp.meter.native_flops + cache_price / 2)
        torch.testing.assert_close(prices, expected)


def test_cost_is_that_of_the_meter(kept: MoETransformer, source: TokenSource) -> None:
    """Of the keys that exist, never more than if every earlier token were one; and it is what unit prices add up to."""
    mdp = _mdp(kept, source)
    actions = _actions(mdp)
    meter, positions = ComputeMeter(kept.sites, source.seq_len), torch.arange(source.seq_len).repeat(NUM_SEQUENCES)
    assert mdp.prices_follow_draws
    for index, (site, action) in enumerate(zip(kept.sites, actions, strict=True)):
        prices, most = mdp.unit_prices(action), mdp.unit_price
        step, subset = mdp.step(action), action[:, : site.num_units]
        assert torch.equal(step.cost, meter.compute(index, subset, positions))
        torch.testing.assert_close(step.reward - step.quality, -(prices * action).sum(1), rtol=1e-5, atol=1e-6)
        paid = prices[:, : site.num_units]
        assert (paid <= most.unsqueeze(1) + 1e-6).all()
        assert (paid < most.unsqueeze(1) - 1e-6).any() == (site.kind == "heads")


def test_native_routing_costs_one_and_its_cache(kept: MoETransformer, source: TokenSource) -> None:
    """Per token of a full sequence; dropping every head leaves the experts' compute and no cache."""
    mdp = _mdp(kept, source, cache_price=0.25)
    experts = torch.zeros(mdp.num_lanes, 4, dtype=torch.bool)
    experts[:, :2] = True
    total, without = 0.0, 0.0
    for site in kept.sites:
        action = torch.ones_like(experts) if site.kind == "heads" else experts
        total += mdp.step(action).cost.mean().item()
    assert total == pytest.approx(1.25)
    mdp.reset(np.random.default_rng(SEED))
    for site in kept.sites:
        without += mdp.step(torch.zeros_like(experts) if site.kind == "heads" else experts).cost.mean().item()
    assert without == pytest.approx(sum(2 * site.unit_flops for site in kept.sites[1::2]) / mdp.meter.native_flops)


def test_a_dropped_key_changes_later_tokens_only(kept: MoETransformer, source: TokenSource) -> None:
    """What later tokens of the same sequence see and pay; under `query` they see and pay the same."""
    for meaning, changes in (("query", False), ("query_key_value", True)):
        kept.head_meaning = meaning  # type: ignore[assignment]
        mdp = _mdp(kept, source)
        whole = torch.ones(mdp.num_lanes, 4, dtype=torch.bool)
        fewer = whole.clone()
        fewer[2] = False
        one = mdp.step(whole)
        mdp.reset(np.random.default_rng(SEED))
        other = mdp.step(fewer)
        same = (one.observation == other.observation).all(1)
        assert not same[2]
        assert same[:2].all()
        assert same[source.seq_len :].all()
        assert bool(same[3 : source.seq_len].all()) == (not changes)
        cheaper = other.cost < one.cost
        assert cheaper.nonzero().flatten().tolist() == ([*range(2, source.seq_len)] if changes else [2])

"""PPO where a token drops its keys: costs are expected given the keys that were drawn; a dear cache is left small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from envs.planted import PLANTED_CONFIG, PLANTED_RULES
from moe_backbone import MoETransformer
from moe_backbone.compute import earlier_keys
from policies.callbacks import episode_metrics

RULES = replace(PLANTED_RULES, cache_price=0.5)
HEADS, SEQ_LEN, NUM_SEQUENCES = PLANTED_CONFIG.num_heads, PLANTED_CONFIG.seq_len, 4


@pytest.fixture
def kept(seed: int) -> MoETransformer:
    """Random weights of the planted sizes, under which a token drops out of the heads that it does not use."""
    backbone = MoETransformer(PLANTED_CONFIG).requires_grad_(False).eval()
    backbone.head_meaning = "query_key_value"
    return backbone


def _head_costs(model: Any, actions: Tensor) -> Tensor:
    """Of each head for every lane, given the keys of earlier tokens: fractions of native compute."""
    meter, site = model.env.mdp.meter, model.env.mdp.backbone.sites[0]
    positions = torch.arange(SEQ_LEN).repeat(len(actions) // SEQ_LEN)
    flops = site.unit_flops + site.unit_flops_per_key * (1 + earlier_keys(actions[:, :HEADS], positions).float())
    return flops / meter.native_flops + RULES.cache_price / HEADS


def test_costs_are_expected_given_the_keys_that_were_drawn(
    make_model: Callable[..., Any], kept: MoETransformer
) -> None:
    """A unit costs what it would cost in this rollout, whether it was drawn or not; the loss has its gradient."""
    model = make_model(RULES, backbone=kept, normalize_advantage=False)
    episode = model.collect()
    expected = episode.log_price[0].exp() * _head_costs(model, episode.actions[0])
    torch.testing.assert_close(episode.unit_price[0, :, :HEADS], expected)
    assert (episode.unit_price[0, :, HEADS:] == 0).all()
    alone = episode._replace(advantages=torch.zeros_like(episode.advantages))
    (gradient,) = torch.autograd.grad(model._loss(alone)[0], model.router.weight)
    chance = model.site_logits(episode).sigmoid()
    cost = (episode.weight.unsqueeze(2) * episode.unit_price * chance).sum(2).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(cost, model.router.weight)[0])


def test_a_dear_cache_is_left_small(make_model: Callable[..., Any], kept: MoETransformer) -> None:
    """And what is logged adds up to the return."""
    shares = {}
    for cache_price in (0.0, 4.0):
        model = make_model(replace(RULES, cache_price=cache_price), backbone=kept, learning_rate=0.05)
        for _ in range(30):
            logged = model.one_update()
        metrics = episode_metrics(model.env.mdp)
        shares[cache_price] = metrics["routing/cache"]
        parts = metrics["reward/cost"] + metrics["reward/quality"]
        assert parts == pytest.approx(model.ep_info_buffer[-1]["r"], abs=1e-4)
        assert logged["train/gradient_norm"] > 0
    assert shares[4.0] < 0.5 * shares[0.0]

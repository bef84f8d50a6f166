"""Sharper logits draw fewer units against the router's own decision, and change no decision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from envs import EnvConfig, RoutingMDP, RoutingVecEnv
from envs.planted import PLANTED_CONFIG, PLANTED_RULES, PlantedSource, planted_backbone
from moe_backbone import MoETransformer
from policies.gating import GateTrainer, GatingConfig
from policies.linear_router import LinearRouter, RouterSpec
from policies.routing_ppo import RoutingPPO

SHARPNESS = 4.0


@pytest.fixture
def backbone() -> MoETransformer:
    return planted_backbone()


@pytest.fixture
def routers(backbone: MoETransformer) -> tuple[LinearRouter, LinearRouter]:
    """The same random weights, plain and sharp."""
    spec = RouterSpec(hidden_size=backbone.hidden_size, sites=tuple(backbone.sites))
    plain, sharp = LinearRouter(spec), LinearRouter(spec)
    sharp.sharpness = SHARPNESS
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    sharp.load_state_dict(plain.state_dict())
    return plain, sharp


def test_all_logits_are_scaled_and_no_decision_changes(
    backbone: MoETransformer, routers: tuple[LinearRouter, LinearRouter]
) -> None:
    """At a site, for a whole episode, and with the price folded in."""
    plain, sharp = routers
    tokens = torch.randint(PLANTED_CONFIG.vocab_size, (3, PLANTED_CONFIG.seq_len))
    view = backbone.observe(backbone.begin(tokens, torch.full((tokens.numel(),), 0.2)))
    assert torch.equal(sharp.view_logits(view), SHARPNESS * plain.view_logits(view))
    assert torch.equal(sharp.select(view), plain.select(view))
    assert torch.equal(sharp.at_price(0.2).select(view), plain.select(view))
    inputs = torch.randn(len(backbone.sites), 5, plain.spec.num_inputs)
    priors = torch.randn(len(backbone.sites), 5, plain.spec.max_units)
    log_price = torch.randn(len(backbone.sites), 5, 1)
    whole = [router.site_logits(inputs, priors, log_price) for router in routers]
    assert torch.equal(whole[1], SHARPNESS * whole[0])


def test_rollouts_leave_the_routers_own_decisions_less_often(backbone: MoETransformer) -> None:
    """Which is what training then measures."""
    drawn = {}
    for sharpness in (1.0, SHARPNESS):
        lanes = 8 * PLANTED_RULES.rollouts_per_sequence * PLANTED_CONFIG.seq_len
        env = RoutingVecEnv(lanes, backbone, PlantedSource(), EnvConfig(**vars(PLANTED_RULES)), seed=0)
        spec = RouterSpec(hidden_size=backbone.hidden_size, sites=tuple(backbone.sites))
        policy = {"router_spec": spec.to_json(), "critic": False}
        model = RoutingPPO("RouterPolicy", env, policy_kwargs=policy, batch_size=512, seed=0, device="cpu")
        model.policy.router.sharpness = sharpness
        episode, _ = model._play(env, env.draw_batch())
        drawn[sharpness] = (episode.actions != episode.chosen).float().mean()
    assert drawn[SHARPNESS] < 0.7 * drawn[1.0]


def test_sharpness_grows_over_the_steps_and_comes_back_with_them(backbone: MoETransformer) -> None:
    """From the first value to the last; a trainer that goes on stands where the other one stood."""
    source, rules = PlantedSource(), replace(PLANTED_RULES, rollouts_per_sequence=1)
    mdp, generator = RoutingMDP(backbone, source, rules, num_sequences=2), np.random.default_rng(0)
    spec = RouterSpec(hidden_size=backbone.hidden_size, sites=tuple(backbone.sites))

    def trainer() -> GateTrainer:
        config = GatingConfig(steps=2, sharpness=(2.0, 4.0))
        return GateTrainer(LinearRouter(spec), backbone, lambda: mdp.draw(generator), config, later_steps=2)

    first, second = trainer(), trainer()
    seen = [first.router.sharpness]
    for _ in range(4):
        first.train(1)
        seen.append(first.router.sharpness)
        if first.step == 3:
            second.restore(first.state())
    assert seen == [2.0, 2.5, 3.0, 3.5, 4.0]
    assert second.router.sharpness == 3.5


def test_impossible_sharpness_is_refused() -> None:
    """In one line."""
    with pytest.raises(ValueError, match=r"sharpness must be positive, got \(0\.0, 5\.0\)"):
        GatingConfig(sharpness=(0.0, 5.0))

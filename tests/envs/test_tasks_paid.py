"""In a task lanes are paid for labels, by both kinds of credit; gates see the same worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import EnvConfig, FixedSource, RoutingEnv, RoutingMDP, TokenSource
from moe_backbone import MoETransformer, token_divergence
from moe_backbone.quality import UNSCORED
from policies.gating import GateTrainer, GatingConfig
from policies.linear_router import LinearRouter, RouterSpec

SCORED = (2, 5)
"""Places of labels in sequences of eight tokens."""


@pytest.fixture
def labelled() -> TokenSource:
    """Two sequences with two labels each."""
    tokens = torch.arange(16).view(2, 8)
    targets = torch.full_like(tokens, UNSCORED)
    targets[:, SCORED] = 7
    return FixedSource(tokens, targets)


def paid(backbone: MoETransformer, source: TokenSource, **rules: Any) -> tuple[Tensor, Tensor]:
    """What lanes are paid for an empty subset everywhere, and what each prediction is worth (2, 8) each."""
    mdp = RoutingMDP(backbone, source, EnvConfig(price_low=1e-6, price_high=1e-6, **rules), num_sequences=2)
    batch = mdp.draw(np.random.default_rng(0))
    mdp.begin(batch)
    nothing = torch.zeros(mdp.num_lanes, mdp.layout.max_units, dtype=torch.bool)
    steps = [mdp.step(nothing) for _ in backbone.sites]
    return steps[-1].quality.view(2, 8), -token_divergence(batch.native, mdp.logits)


def test_a_lane_is_paid_for_the_label_that_follows(backbone: MoETransformer, labelled: TokenSource) -> None:
    """Bytes up to the first label for it, those up to the second for that, and nothing behind."""
    got, worth = paid(backbone, labelled)
    expected = torch.cat((worth[:, [2] * 3], worth[:, [5] * 3], torch.zeros(2, 2)), 1)
    torch.testing.assert_close(got, expected)


def test_a_sequence_shares_the_mean_of_its_labels(backbone: MoETransformer, labelled: TokenSource) -> None:
    """Tokens without a label do not thin it."""
    got, worth = paid(backbone, labelled, credit="sequence")
    torch.testing.assert_close(got, worth[:, SCORED].mean(1, keepdim=True).expand(2, 8))


@pytest.mark.parametrize(("credit", "counts"), [("token", (3, 3)), ("sequence", (4, 4))])
@pytest.mark.parametrize("quality", ["kl", "log_likelihood"])
def test_gates_weigh_labels_as_the_environment_does(
    backbone: MoETransformer, labelled: TokenSource, credit: str, counts: tuple[int, int], quality: str
) -> None:
    """The mean over lanes of what the environment pays, whatever the share of tokens that has a label."""
    mdp = RoutingMDP(backbone, labelled, EnvConfig(price_low=1e-6, price_high=1e-6), num_sequences=2)
    batch = mdp.draw(np.random.default_rng(0))
    spec = RouterSpec(hidden_size=32, sites=backbone.sites, price_low=1e-6, price_high=1.0, compensation=False)
    config = GatingConfig(steps=1, num_sequences=2, price_balance=0.0)
    trainer = GateTrainer(LinearRouter(spec), backbone, lambda: batch, config, quality=quality, credit=credit)
    found, _ = trainer._loss(batch)
    trainer.noise.manual_seed(0)
    with torch.no_grad():
        logits, _ = trainer._episode(batch.tokens, batch.price.repeat_interleave(8))
    lost = token_divergence(batch.native, logits) if quality == "kl" else -logits.log_softmax(-1)[..., 7]
    expected = (lost[:, SCORED] * torch.tensor(counts)).sum() / 16
    torch.testing.assert_close(found.detach(), expected, atol=2e-5, rtol=1e-5)


def test_one_lane_cannot_know_what_follows(backbone: MoETransformer, labelled: TokenSource) -> None:
    """The environment of one lane refuses tasks."""
    with pytest.raises(ValueError, match="every token must be scored"):
        RoutingEnv(backbone, labelled, EnvConfig()).reset(seed=0)

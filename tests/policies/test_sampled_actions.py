"""Actions are samples, their log-probability is that of the sample, and before training they follow the prior.

Every check is a function; beside the test that it passes stands one that plants the bug and shows that it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from envs.planted import PLANTED_CONFIG
from policies import routing_ppo
from policies.bits import bits_entropy, bits_log_prob

UNITS = PLANTED_CONFIG.num_heads, PLANTED_CONFIG.num_experts
SAMPLING_SIGMAS = 4.5
"""Standard deviations that a frequency may lie from its probability; the seed is fixed, so this never flickers."""


def check_actions_are_samples(make_model: Callable[..., Any]) -> None:
    """Each unit of each site is on as often as its probability says, and absent units never are."""
    model = make_model(num_sequences=32)
    model.router.weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    episode = model.collect()
    with torch.no_grad():
        probability = model.site_logits(episode).sigmoid()
    surplus = (episode.actions.float() - probability).sum(1)
    deviation = (probability * (1 - probability)).sum(1).sqrt()
    assert (surplus.abs() <= SAMPLING_SIGMAS * deviation + 1e-6).all()
    for index, units in enumerate(UNITS):
        assert not episode.actions[index, :, units:].any()


def test_sampled_actions_are_samples(make_model: Callable[..., Any]) -> None:
    """Frequencies match the probabilities."""
    check_actions_are_samples(make_model)


def test_an_argmax_taken_for_a_sample_is_seen(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every unit with a probability above one half, always."""
    monkeypatch.setattr(torch, "rand_like", lambda logits: torch.full_like(logits, 0.5))
    with pytest.raises(AssertionError):
        check_actions_are_samples(make_model)


def test_sb3s_face_samples_too(make_model: Callable[..., Any]) -> None:
    """`forward` draws from the same probabilities unless asked for the deterministic action."""
    model = make_model(num_sequences=32)
    observations = model.observations()
    logits = model.observed_logits(observations)[1]
    probability = logits.sigmoid()
    sampled, _, log_prob = model.policy.forward(observations[1])
    surplus, deviation = (sampled - probability).sum(0), (probability * (1 - probability)).sum(0).sqrt()
    assert (surplus.abs() <= SAMPLING_SIGMAS * deviation + 1e-6).all()
    torch.testing.assert_close(log_prob, bits_log_prob(logits, sampled.bool()))
    best, *_ = model.policy.forward(observations[1], deterministic=True)
    assert torch.equal(best.bool(), probability > 0.5)


def check_log_probabilities(make_model: Callable[..., Any]) -> None:
    """What the rollout stored is the Bernoulli formula for the action that was sampled, and so is SB3's face."""
    model = make_model()
    episode = model.collect()
    bernoulli = torch.distributions.Bernoulli(logits=model.site_logits(episode).detach())
    torch.testing.assert_close(episode.log_probs, bernoulli.log_prob(episode.actions.float()).sum(-1))
    torch.testing.assert_close(bits_entropy(bernoulli.logits), bernoulli.entropy().sum(-1))
    observations = model.observations()
    logits = model.observed_logits(observations)
    for site in range(len(UNITS)):
        actions = episode.actions[site]
        _, log_prob, entropy = model.policy.evaluate_actions(observations[site], actions.float())
        torch.testing.assert_close(log_prob, routing_ppo.bits_log_prob(logits[site], actions))
        assert entropy is not None
        torch.testing.assert_close(entropy, bits_entropy(logits[site]))


def test_log_probability_is_that_of_the_sampled_action(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to `torch.distributions`; planted, the formula for the opposite bits is seen."""
    check_log_probabilities(make_model)
    monkeypatch.setattr(routing_ppo, "bits_log_prob", lambda logits, bits: bits_log_prob(logits, ~bits))
    with pytest.raises(AssertionError):
        check_log_probabilities(make_model)


def test_bits_by_hand() -> None:
    """Probability 3/4 for a unit that is on and 1/2 for one that is off; a far logit stays finite."""
    logits = torch.tensor([[3.0, 1.0]]).log()
    torch.testing.assert_close(bits_log_prob(logits, torch.tensor([[True, False]])).exp(), torch.tensor([0.375]))
    assert bits_log_prob(torch.tensor([[-1e4]]), torch.tensor([[False]])).item() == 0.0
    assert bits_entropy(torch.tensor([[-1e4, 1e4]])).item() == 0.0


def test_before_training_the_router_follows_its_prior(make_model: Callable[..., Any]) -> None:
    """All heads, and the experts that the gate gives more than a fifth: no random start in a large action space."""
    model = make_model()
    observations = model.observations()
    decisions = model.observed_logits(observations) > 0
    assert decisions[0, :, : UNITS[0]].all()
    scores = observations[1][:, 32:36]
    assert torch.equal(decisions[1], scores.exp() > 0.2)
    assert decisions[1].any()
    assert not decisions[1].all()

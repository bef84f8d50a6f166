"""The baseline of a rollout is what the other rollouts of the same token earned, and lanes count by their price."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from envs.planted import PLANTED_RULES
from policies.bits import bits_log_prob
from policies.routing_ppo import leave_one_out

SEQ_LEN, COPIES, NUM_SEQUENCES, NUM_SITES = 8, 4, 4, 2


def test_leave_one_out_by_hand() -> None:
    """Two sites, one sequence, three copies of two tokens; lanes are ordered sequence, copy, token."""
    rewards = torch.tensor([[0.0, 1, 0, 0, 0, 0], [1, 0, 2, 0, 6, 3]])
    # to go, first token: 1 2 6 at both sites; second token: 1 0 3 at the first site, 0 0 3 at the second
    expected = [[1 - 4, 1 - 1.5, 2 - 3.5, 0 - 2, 6 - 1.5, 3 - 0.5], [1 - 4, 0 - 1.5, 2 - 3.5, 0 - 1.5, 6 - 1.5, 3 - 0]]
    torch.testing.assert_close(leave_one_out(rewards, copies=3, seq_len=2), torch.tensor(expected))
    docstring = leave_one_out(torch.tensor([[1.0, 3.0]]), copies=2, seq_len=1)
    assert docstring.tolist() == [[-2.0, 2.0]]


def check_baseline(advantage_of: Callable[[Tensor, int, int], Tensor]) -> None:
    """Advantages of copies sum to zero, and a copy's baseline does not move with its own reward."""
    torch.manual_seed(0)
    rewards = torch.randn(NUM_SITES, NUM_SEQUENCES * COPIES * SEQ_LEN)
    advantages = advantage_of(rewards, COPIES, SEQ_LEN)
    groups = advantages.view(NUM_SITES, NUM_SEQUENCES, COPIES, SEQ_LEN)
    torch.testing.assert_close(groups.sum(2), torch.zeros_like(groups[:, :, 0]), rtol=0, atol=1e-5)
    changed = rewards.clone().view_as(groups)
    changed[1, 2, 0, 3] += 10
    moved = (advantage_of(changed.flatten(1), COPIES, SEQ_LEN) - advantages).view_as(groups)
    expected = torch.zeros_like(groups)
    expected[:, 2, 0, 3] = 10
    expected[:, 2, 1:, 3] = -10 / (COPIES - 1)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_baseline_is_that_of_the_others() -> None:
    """So its product with the own score is zero in expectation, and the gradient stays unbiased."""
    check_baseline(leave_one_out)


def _group_mean(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    return leave_one_out(rewards, copies, seq_len) * (copies - 1) / copies


def _mean_of_all(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    returns = rewards.flip(0).cumsum(0).flip(0)
    return returns - returns.mean(1, keepdim=True)


def _wrong_order(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    return leave_one_out(rewards, seq_len, copies)


@pytest.mark.parametrize("bug", [_group_mean, _mean_of_all, _wrong_order])
def test_a_baseline_that_holds_the_own_action_or_other_tokens_is_seen(bug: Callable[..., Tensor]) -> None:
    """Planted: the mean with oneself in it, the mean of all lanes, and lanes in another order."""
    with pytest.raises(AssertionError):
        check_baseline(bug)


def test_baseline_times_score_is_zero_in_expectation() -> None:
    """By enumeration of one bit in two copies: the mean of baseline times score vanishes, that of the return not."""
    logit = torch.tensor(0.7, requires_grad=True)
    value = {False: 1.0, True: 3.0}
    with_baseline = with_return = torch.zeros(())
    for own, other in itertools.product((False, True), repeat=2):
        log_prob = bits_log_prob(logit.view(1), torch.tensor([own]))
        probability = (log_prob + bits_log_prob(logit.view(1), torch.tensor([other]))).exp().detach()
        (score,) = torch.autograd.grad(log_prob, logit)
        rewards = torch.tensor([[value[own], value[other]]])
        baseline = rewards[0, 0] - leave_one_out(rewards, 2, 1)[0, 0]
        with_baseline = with_baseline + probability * baseline * score
        with_return = with_return + probability * rewards[0, 0] * score
    assert abs(with_baseline.item()) < 1e-6
    assert with_return.item() > 0.1


def test_lanes_count_by_their_price(make_model: Callable[..., Any]) -> None:
    """In proportion to one over its root, so that high prices do not drown the low ones; all alike if asked."""
    rules = replace(PLANTED_RULES, price_low=0.04, price_high=4.0)
    for balance in (0.5, 0.0):
        model = make_model(rules, price_balance=balance)
        episode = model.collect()
        price = episode.log_price.squeeze(2).exp()
        assert price.std() > 0.1
        torch.testing.assert_close(episode.weight, price**-balance)

"""The gradient reaches every weight, is logged, keeps its scale with depth, and stops at the clip.

Every check is a function; beside the test that it passes stands one that plants the bug and shows that it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from envs.planted import PLANTED_CONFIG, PLANTED_RULES
from policies.linear_router import LinearRouter
from policies.routing_ppo import Episode, RoutingPPO

UNITS = PLANTED_CONFIG.num_heads, PLANTED_CONFIG.num_experts
SITE_LOGITS = LinearRouter.site_logits


def _detached(self: LinearRouter, *args: Tensor) -> Tensor:
    """The bug of a reference pass that overwrote the saved logits: right values, no way back to the weights."""
    return SITE_LOGITS(self, *args).detach() + 0 * self.weight.sum()


def check_gradient_reaches_the_weights(make_model: Callable[..., Any]) -> None:
    """One update leaves a gradient on the weights of both sites and changes the action distribution everywhere."""
    model = make_model()
    model.one_update()
    before = make_model().site_logits(model._episode).sigmoid()
    gradient = model.router.weight.grad
    assert gradient is not None
    for index, units in enumerate(UNITS):
        assert gradient[index, :, :units].abs().max() > 1e-4
        change = (model.site_logits(model._episode).sigmoid() - before)[index, :, :units].detach()
        assert change.abs().max() > 1e-4


def test_gradient_reaches_the_weights(make_model: Callable[..., Any]) -> None:
    """Non-zero on every site, and one step moves the probabilities."""
    check_gradient_reaches_the_weights(make_model)


def test_a_gradient_that_never_reaches_the_weights_is_seen(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: logits without a graph."""
    monkeypatch.setattr(LinearRouter, "site_logits", _detached)
    with pytest.raises(AssertionError):
        check_gradient_reaches_the_weights(make_model)


def check_gradient_norm_is_logged_and_not_zero(make_model: Callable[..., Any]) -> None:
    """Centred advantages at ratio 1 make the loss zero by construction, up to the cost, which is next to nothing here.

    The gradient is not zero, and the log says so.
    """
    logged = make_model(replace(PLANTED_RULES, price_low=1e-6, price_high=1e-6)).one_update()
    assert abs(logged["train/loss"]) < 1e-5
    assert logged.get("train/gradient_norm", 0.0) > 1e-3
    assert logged["train/advantage_std"] > 1e-3
    assert logged["train/entropy"] > 0


def test_loss_near_zero_has_a_gradient(make_model: Callable[..., Any]) -> None:
    """The number to watch is the gradient's norm."""
    check_gradient_norm_is_logged_and_not_zero(make_model)


@pytest.mark.parametrize("bug", ["no graph", "not logged"])
def test_a_gradient_norm_of_zero_or_never_logged_is_seen(
    make_model: Callable[..., Any], bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: logits without a graph, whose loss is just as close to zero; and a metric that is logged zero times."""
    if bug == "no graph":
        monkeypatch.setattr(LinearRouter, "site_logits", _detached)
    else:
        log_update = RoutingPPO._log_update

        def forgetful(self: RoutingPPO, *args: Tensor) -> None:
            log_update(self, *args)
            del self.logger.name_to_value["train/gradient_norm"]

        monkeypatch.setattr(RoutingPPO, "_log_update", forgetful)
    with pytest.raises(AssertionError):
        check_gradient_norm_is_logged_and_not_zero(make_model)


def check_gradient_scale_by_depth(make_model: Callable[..., Any]) -> None:
    """The loss is the mean over (site, lane) transitions, and nothing else divides by the number of sites.

    Deeper episodes that repeat the same transitions pull a parameter shared by all sites exactly as hard. Deeper
    episodes whose other sites have no advantage leave a site the gradient of a shallow one over the number of sites.
    """
    model = make_model(normalize_advantage=False)
    expert_site, spec = Episode(*(part[1:] for part in model.collect())), model.router.spec
    shared, own = [], []
    for depth in (1, 2, 8):
        router = model.policy.router = LinearRouter(replace(spec, sites=spec.sites[1:] * depth))
        episode = Episode(*(part.expand(depth, *part.shape[1:]) for part in expert_site))
        (gradient,) = torch.autograd.grad(model._loss(episode)[0], router.weight)
        shared.append(gradient.sum(0))
        first = torch.arange(depth).eq(0).unsqueeze(1)
        rewards = {name: getattr(episode, name) * first for name in ("advantages", "unit_price")}
        (gradient,) = torch.autograd.grad(model._loss(episode._replace(**rewards))[0], router.weight)
        own.append(depth * gradient[0])
    for gradients in (shared, own):
        assert gradients[0].abs().max() > 1e-3
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_gradient_scale_follows_the_stated_rule(make_model: Callable[..., Any]) -> None:
    """One, two and eight sites."""
    check_gradient_scale_by_depth(make_model)


@pytest.mark.parametrize("power", [1.0, -1.0], ids=["divided twice", "summed"])
def test_a_gradient_that_shrinks_or_grows_with_depth_is_seen(
    make_model: Callable[..., Any], power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: one more division by the number of sites, and a sum in place of the mean."""
    loss = RoutingPPO._loss

    def scaled(self: RoutingPPO, lanes: Episode) -> Any:
        value, numbers = loss(self, lanes)
        return value / len(lanes.actions) ** power, numbers

    monkeypatch.setattr(RoutingPPO, "_loss", scaled)
    with pytest.raises(AssertionError):
        check_gradient_scale_by_depth(make_model)


def test_ratios_outside_the_clip_have_no_pull(make_model: Callable[..., Any]) -> None:
    """Once an action is likelier than the clip allows, more of it earns nothing; the other way it still does."""
    model = make_model(normalize_advantage=False)
    episode = model.collect()
    log_probs = episode.log_probs - torch.tensor(2.0).log()  # ratio 2, clip range 0.2
    doubled = episode._replace(log_probs=log_probs, unit_price=torch.zeros_like(episode.unit_price))
    for advantage, pulls in ((1.0, False), (-1.0, True)):
        loss, (_, clipped, _) = model._loss(doubled._replace(advantages=torch.full_like(episode.advantages, advantage)))
        (gradient,) = torch.autograd.grad(loss, model.router.weight)
        assert bool(gradient.abs().max() > 1e-6) == pulls
        assert clipped == 1.0

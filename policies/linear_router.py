"""The learned router: one linear map a site, on top of a heuristic prior, with the price as an input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_backbone.checks import require, require_price
from moe_backbone.compensation import Compensation
from moe_backbone.plain import from_plain
from moe_backbone.sites import RoutingSite, SiteView

if TYPE_CHECKING:
    from policies.calibration import Calibration

SCORE_FLOOR = -6.0
"""Gate log-probabilities below this look alike to the router, nats."""
IGNORED_LOGIT = -1e4
"""Logit of a unit that the site does not have: never chosen, no gradient."""


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """Everything but the weights of a `LinearRouter`.

    Attributes:
        hidden_size: Width of token features.
        sites: The sites it routes, in running order.
        price_low: Lowest price seen in training, nats per native compute.
        price_high: Highest.
        head_prior: Logit of every head before training.
        expert_slope: Prior logit of an expert with gate probability p is this times (log p - log expert_threshold).
        expert_threshold: Gate probability whose prior logit is 0; with more than 8 experts in proportion less.
        expert_clamp: Largest absolute prior logit of an expert.
        compensation: Whether the router brings constants that stand in for skipped units.
    """

    hidden_size: int
    sites: tuple[RoutingSite, ...]
    price_low: float = 0.01
    price_high: float = 1.0
    head_prior: float = 3.0
    expert_slope: float = 3.0
    expert_threshold: float = 0.2
    expert_clamp: float = 4.0
    compensation: bool = False

    @property
    def max_units(self) -> int:
        """Units of the largest site."""
        return max(site.num_units for site in self.sites)

    @property
    def num_inputs(self) -> int:
        """Inputs of one linear map: features, scores and a constant."""
        return self.hidden_size + self.max_units + 1

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RouterSpec:
        """Inverse of `to_json`."""
        return from_plain(cls, data)


class LinearRouter(nn.Module):
    """Chooses a unit where its logit is positive.

    logit = sharpness * (prior(gate) + (weight[site] + centred_log_price * price_weight[site]) applied to
    (features, scores, 1)).
    Weights start at zero, so an untrained router follows the prior. With the same price for all tokens (`at_price`) the
    price folds into the weights, and a site costs one product of width `num_inputs`; otherwise two.

    Args:
        spec: Sizes, sites and prior.

    Attributes:
        weight: (num_sites, num_inputs, max_units).
        price_weight: Same shape.
        compensation: Constants in place of skipped units, or None.
        calibration: What it spends at each price, or None before that was measured.
        sharpness: Factor on all logits. A decision without chance is the same for any; where units are drawn, as in
            training, a larger one draws fewer of them against that decision. 1 but in training, and not saved.
    """

    def __init__(self, spec: RouterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.calibration: Calibration | None = None
        self.sharpness = 1.0
        shape = (len(spec.sites), spec.num_inputs, spec.max_units)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.price_weight = nn.Parameter(torch.zeros(shape))
        self.compensation = Compensation(spec.sites, spec.hidden_size) if spec.compensation else None
        has_unit = torch.zeros(len(spec.sites), 1, spec.max_units)
        for index, site in enumerate(spec.sites):
            has_unit[index, 0, : site.num_units] = 1.0
        self.register_buffer("has_unit", has_unit, persistent=False)
        self.register_buffer("ignored", IGNORED_LOGIT * (1 - has_unit), persistent=False)
        self.has_unit: Tensor
        self.ignored: Tensor
        low, high = torch.tensor([spec.price_low, spec.price_high]).log().tolist()
        self._middle_log_price, self._log_price_reach = (low + high) / 2, max((high - low) / 2, 1.0)

    @property
    def overhead_flops(self) -> int:
        """FLOPs of the router for one token over all sites; without the price's product `at_price`."""
        return 2 * self.map_flops + self.compensation_flops

    @property
    def map_flops(self) -> int:
        """FLOPs of one linear map for one token over all sites."""
        return 2 * self.spec.num_inputs * sum(site.num_units for site in self.spec.sites)

    @property
    def compensation_flops(self) -> int:
        """FLOPs of the compensation for one token over all sites."""
        return 0 if self.compensation is None else self.compensation.flops

    def compensation_parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the compensation, none without one."""
        return iter(()) if self.compensation is None else self.compensation.parameters()

    def at_price(self, price: float) -> PricedRouter:
        """The router for one price, at about half the cost.

        Raises:
            ValueError: If the price is not positive and finite.
        """
        require_price("price", price)
        return PricedRouter(self, price)

    def at_cost_limit(self, cost_limit: float) -> PricedRouter:
        """The router at the price that met a budget on calibration text.

        Args:
            cost_limit: Fraction of native compute, the router's own cost included.

        Raises:
            ValueError: If the router was not calibrated, or costs more at its highest price.
        """
        require(self.calibration is not None, "router must be calibrated to follow a cost_limit, got one without")
        assert self.calibration is not None
        return self.at_price(self.calibration.price(cost_limit))

    def centred_log_price(self, log_price: Tensor) -> Tensor:
        """Log price mapped so that the training range becomes [-1, 1], or less if it spans less than 2 nats."""
        return (log_price - self._middle_log_price) / self._log_price_reach

    def inputs(self, features: Tensor, scores: Tensor, out: Tensor | None = None) -> Tensor:
        """Features, clamped scores (padded to `max_units`) and a constant, side by side (..., num_inputs)."""
        return torch.cat((features, scores.clamp_min(SCORE_FLOOR), torch.ones_like(scores[..., :1])), dim=-1, out=out)

    def prior(self, site: RoutingSite, scores: Tensor) -> Tensor:
        """Logits before training, same shape as `scores` (..., max_units)."""
        spec = self.spec
        if site.kind == "heads":
            return torch.full_like(scores, spec.head_prior)
        threshold = math.log(spec.expert_threshold * min(1.0, 8 / site.num_units))
        return (spec.expert_slope * (scores - threshold)).clamp(-spec.expert_clamp, spec.expert_clamp)

    def site_prior(self, index: int, scores: Tensor) -> Tensor:
        """Logits before training at site `index`, `IGNORED_LOGIT` where it has no unit, same shape as `scores`."""
        return self.prior(self.spec.sites[index], scores) * self.has_unit[index] + self.ignored[index]

    def priors(self, scores: Tensor) -> Tensor:
        """`site_prior` of the same lanes at every site, same shape as `scores` (num_sites, num_lanes, max_units)."""
        return torch.stack([self.site_prior(index, scores[index]) for index in range(len(scores))])

    def site_logits(self, inputs: Tensor, priors: Tensor, log_price: Tensor) -> Tensor:
        """Logits of the same lanes at every site, in one batched product.

        Args:
            inputs: From `inputs` (num_sites, num_lanes, num_inputs), float32.
            priors: From `priors` (num_sites, num_lanes, max_units), float32.
            log_price: (num_sites, num_lanes, 1), float32.

        Returns:
            (num_sites, num_lanes, max_units); `IGNORED_LOGIT` where the site has no such unit.
        """
        weights = torch.cat((self.weight, self.price_weight), dim=2) * self.has_unit.repeat(1, 1, 2)
        plain, priced = torch.bmm(inputs, weights).float().chunk(2, dim=2)
        return self.sharpness * torch.addcmul(plain + priors, self.centred_log_price(log_price), priced)

    def one_site_logits(self, index: int, inputs: Tensor, prior: Tensor, log_price: Tensor) -> Tensor:
        """Logits at one site.

        Args:
            index: Place of the site in running order.
            inputs: From `inputs` (num_tokens, num_inputs), float32.
            prior: From `site_prior` (num_tokens, max_units), float32.
            log_price: (num_tokens, 1), float32.

        Returns:
            (num_tokens, max_units); `IGNORED_LOGIT` where the site has no such unit.
        """
        weights = torch.cat((self.weight[index], self.price_weight[index]), dim=1) * self.has_unit[index].repeat(1, 2)
        plain, priced = (inputs @ weights).float().chunk(2, dim=1)
        return self.sharpness * torch.addcmul(plain + prior, self.centred_log_price(log_price), priced)

    def view_logits(self, view: SiteView) -> Tensor:
        """Logits of the site's units (num_tokens, num_units), float32."""
        scores = nn.functional.pad(view.scores, (0, self.spec.max_units - view.site.num_units))
        inputs, prior = self.inputs(view.features, scores), self.site_prior(view.index, scores)
        logits = self.one_site_logits(view.index, inputs, prior, view.price.log().unsqueeze(1))
        return logits[:, : view.site.num_units]

    @torch.no_grad()
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return self.view_logits(view) > 0


class PricedRouter:
    """A `LinearRouter` for one price, folded into its weights; the price that a view shows is not read.

    Args:
        router: What to fold.
        price: Nats per native compute.

    Attributes:
        overhead_flops: FLOPs for one token over all sites.
        compensation: Constants in place of skipped units, or None.
    """

    def __init__(self, router: LinearRouter, price: float) -> None:
        self.router = router
        self.overhead_flops = router.map_flops + router.compensation_flops
        self.compensation = router.compensation
        centred = router.centred_log_price(torch.tensor(price).log())
        self.weight = (router.weight + centred * router.price_weight).detach()

    @torch.no_grad()
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        scores = nn.functional.pad(view.scores, (0, self.router.spec.max_units - view.site.num_units))
        logits = self.router.inputs(view.features, scores) @ self.weight[view.index]
        return (logits + self.router.prior(view.site, scores))[:, : view.site.num_units] > 0


def check_sites(spec: RouterSpec, sites: Sequence[RoutingSite], hidden_size: int) -> None:
    """Refuse a router that was made for another backbone.

    Raises:
        ValueError: If sites or width differ.
    """
    if spec.hidden_size != hidden_size:
        raise ValueError(f"router must fit the backbone's hidden_size={hidden_size}, got {spec.hidden_size}")
    if tuple(sites) != spec.sites:
        raise ValueError(
            f"router must fit the backbone's {len(sites)} sites of "
            f"{sorted({site.num_units for site in sites})} units, got {len(spec.sites)} sites of "
            f"{sorted({site.num_units for site in spec.sites})} units with other kinds, sizes or costs"
        )

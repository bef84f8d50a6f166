"""Routers that decide only how many units run: the best by gate score, as many as a linear map says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_backbone.checks import require_price
from moe_backbone.sites import Backbone, NativeRouter, RoutingSite, SiteView, best_units
from policies.linear_router import IGNORED_LOGIT, SCORE_FLOOR
from policies.tied_files import load_tied, save_tied

KIND = "count"


@dataclass(frozen=True, kw_only=True)
class CountSpec:
    """Everything but the weights of a `CountRouter`."""

    hidden_size: int
    """Width of token features."""
    sites: tuple[RoutingSite, ...]
    """The backbone's sites, in running order."""
    heads: bool = False
    """Whether the number of heads is decided too; otherwise heads are native."""
    least: int = 1
    """Fewest units of a site that is decided."""
    scores: bool = False
    """Whether gate scores and a constant are inputs beside the features."""
    priced: bool = False
    """Whether the price is an input: the values are linear in it."""

    @property
    def decided(self) -> tuple[int, ...]:
        """Places of the sites whose count is decided, in running order."""
        return tuple(index for index, site in enumerate(self.sites) if self.heads or site.kind == "experts")

    @property
    def max_units(self) -> int:
        """Units of the largest site."""
        return max(site.num_units for site in self.sites)

    @property
    def num_inputs(self) -> int:
        """Inputs of one linear map, the price aside."""
        return self.hidden_size + (self.max_units + 1 if self.scores else 0)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CountSpec:
        """Inverse of `to_json`."""
        return cls(**{**data, "sites": tuple(RoutingSite(**site) for site in data["sites"])})


class CountRouter(nn.Module):
    """Runs the best `n` units by gate score, `n` being the count of highest value.

    values = inputs @ (weight[row] + price * price_weight[row]), one column a count from 0 to `max_units`.

    Args:
        spec: Sizes, sites, and what is decided from what.

    Attributes:
        weight: (num_decided, num_inputs, max_units + 1), zeros at first.
        price_weight: Same shape; None where the price is no input.
    """

    def __init__(self, spec: CountSpec) -> None:
        super().__init__()
        self.spec = spec
        shape = (len(spec.decided), spec.num_inputs, spec.max_units + 1)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.price_weight = nn.Parameter(torch.zeros(shape)) if spec.priced else None
        self._row = {index: row for row, index in enumerate(spec.decided)}
        counts = torch.arange(spec.max_units + 1)
        most = torch.tensor([spec.sites[index].num_units for index in spec.decided]).view(-1, 1, 1)
        legal = (counts >= spec.least) & (counts <= most)
        self.register_buffer("ignored", torch.where(legal, 0.0, IGNORED_LOGIT), persistent=False)
        self.ignored: Tensor
        """(num_decided, 1, max_units + 1): 0 for a legal count, `IGNORED_LOGIT` for another."""

    @property
    def overhead_flops(self) -> int:
        """FLOPs of the router for one token over all sites; half of it `at_price`."""
        counts = sum(self.spec.sites[index].num_units + 1 - self.spec.least for index in self.spec.decided)
        return 2 * self.spec.num_inputs * counts * (2 if self.spec.priced else 1)

    def inputs(self, features: Tensor, scores: Tensor) -> Tensor:
        """Inputs of the linear maps (..., num_inputs) from features and scores padded to `max_units`."""
        if not self.spec.scores:
            return features
        return torch.cat((features, scores.clamp_min(SCORE_FLOOR), torch.ones_like(scores[..., :1])), dim=-1)

    def values(self, rows: Sequence[int] | slice, inputs: Tensor, price: Tensor | None = None) -> Tensor:
        """Value of every count.

        Args:
            rows: Decided sites, by their place among those decided.
            inputs: From `inputs`: (num_rows, num_lanes, num_inputs), or (num_lanes, num_inputs) for the same lanes
                at every row.
            price: Nats per native compute, float32, (num_lanes,); needed where it is an input.

        Returns:
            (num_rows, num_lanes, max_units + 1), float32; `IGNORED_LOGIT` or less for counts that are not legal.
        """
        values = inputs @ self.weight[rows]
        if self.price_weight is not None:
            assert price is not None
            values = torch.addcmul(values, price.unsqueeze(1), inputs @ self.price_weight[rows])
        return values + self.ignored[rows]

    @torch.no_grad()
    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        row = self._row.get(view.index)
        if row is None:
            return NativeRouter().select(view)
        scores = nn.functional.pad(view.scores, (0, self.spec.max_units - view.site.num_units))
        values = self.values([row], self.inputs(view.features, scores), view.price)
        return best_units(view.scores, values[0].argmax(1))

    def at_price(self, price: float) -> CountRouter:
        """The router for one price, folded into its weights, at half the cost.

        Raises:
            ValueError: If the price is not positive and finite, or is no input.
        """
        require_price("price", price)
        if self.price_weight is None:
            raise ValueError("router must have the price as an input, got one that does not")
        folded = CountRouter(replace(self.spec, priced=False)).to(self.weight.device).requires_grad_(False)
        folded.weight.copy_((self.weight + price * self.price_weight).detach())
        return folded


def save_count_router(router: CountRouter, folder: Path, backbone: Backbone) -> None:
    """Write `router.safetensors` and `router.json`, with the hash of the backbone they were trained on."""
    save_tied(folder, backbone, KIND, router.spec.to_json(), router.state_dict())


def load_count_router(folder: Path, backbone: Backbone) -> CountRouter:
    """Read a router and check that it was made for this backbone.

    Raises:
        ValueError: If the files are missing, damaged, of another kind, or made for another backbone.
    """
    description, weights = load_tied(folder, backbone, KIND)
    try:
        router = CountRouter(CountSpec.from_json(description))
        router.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        message = f"router weights must fit their description, got {folder}: {error}"
        raise ValueError(message.replace("\n", " ")) from None
    return router.requires_grad_(False)

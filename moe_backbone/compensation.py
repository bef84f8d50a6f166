"""What a site adds in place of the units that it skips: trained constants, nothing where native units run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_backbone.sites import RoutingSite


class HeadCompensation(nn.Module):
    """One vector for each skipped head, added to the update.

    Args:
        site: Head site.
        hidden_size: Width of the update.

    Attributes:
        vectors: (num_heads, hidden_size); zeros before training.
    """

    def __init__(self, site: RoutingSite, hidden_size: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(site.num_units, hidden_size))
        self.flops = 2 * site.num_units * hidden_size

    def forward(self, update: Tensor, on: Tensor) -> Tensor:
        """The update (num_tokens, hidden_size) where the heads `on`, bool or a float switch, ran."""
        return update + (1 - on.to(update.dtype)) @ self.vectors


class ExpertCompensation(nn.Module):
    """A scale and a vector for each number of experts below the native one: scale * update + vector.

    Args:
        site: Expert site.
        hidden_size: Width of the update.

    Attributes:
        scale: (native_units,) for 0, 1, ... experts; ones before training.
        vectors: (native_units, hidden_size); zeros before training.
    """

    def __init__(self, site: RoutingSite, hidden_size: int) -> None:
        super().__init__()
        self.native_units = site.native_units
        self.scale = nn.Parameter(torch.ones(site.native_units))
        self.vectors = nn.Parameter(torch.zeros(site.native_units, hidden_size))
        self.flops = 2 * hidden_size

    def forward(self, update: Tensor, count: Tensor) -> Tensor:
        """The update (..., hidden_size) of `count` experts, int64 (...)."""
        count, scale, vectors = count.clamp(max=self.native_units), *self._extended()
        return torch.addcmul(vectors[count], update, scale[count].unsqueeze(-1))

    def along(self, product: Tensor, count: Tensor, pull: Tensor) -> Tensor:
        """The result's product with `pull` (num_tokens, hidden_size), from the update's product, same shape as `count`.

        `count` is int64 (num_tokens, ...); no gradient.
        """
        scale, vectors = (constant.detach() for constant in self._extended())
        count = count.clamp(max=self.native_units)
        return torch.addcmul((pull @ vectors.t()).gather(1, count), product, scale[count])

    def _extended(self) -> tuple[Tensor, Tensor]:
        """Scale and vectors with those of the native count, which change nothing."""
        return (
            torch.cat((self.scale, self.scale.new_ones(1))),
            torch.cat((self.vectors, self.vectors.new_zeros(1, self.vectors.shape[1]))),
        )


class Compensation(nn.Module):
    """Constants for every site of a backbone; a skipped unit costs no more than adding them.

    Native routing is left as it is, to the bit. The constants belong to a router, which is trained with them, and
    travel with it. In static pruning the same is known as bias compensation (arXiv:2312.11983).

    Args:
        sites: In running order.
        hidden_size: Width of a token's features.

    Attributes:
        flops: Of one token over all sites; part of the router's own cost.
    """

    def __init__(self, sites: Sequence[RoutingSite], hidden_size: int) -> None:
        super().__init__()
        kinds: dict[str, Any] = {"heads": HeadCompensation, "experts": ExpertCompensation}
        constants = [kinds[site.kind](site, hidden_size) for site in sites]
        self.flops = sum(site.flops for site in constants)
        self.sites = nn.ModuleList(constants)

    def __getitem__(self, index: int) -> nn.Module:
        """Constants of the site at `index`."""
        return self.sites[index]

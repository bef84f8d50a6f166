"""What the loads of experts, and of the nodes that they lie on, cost a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_backbone.compute import load_excess
from moe_backbone.sites import RoutingSite


@dataclass(frozen=True, kw_only=True)
class LoadPrices:
    """Prices in nats, at every site of experts.

    Attributes:
        balance: Of uneven loads, see `load_excess`; of experts, or of nodes where there are any.
        send: Of each node that a token is sent to.
        nodes: Nodes that the experts lie on, expert e on node e modulo nodes; 0 for none.
    """

    balance: float = 0.0
    send: float = 0.0
    nodes: int = 0

    @property
    def any(self) -> bool:
        """Whether anything is priced."""
        return self.balance > 0 or self.send > 0

    def paid(self, use: Tensor, site: RoutingSite) -> Tensor:
        """What each token pays at a site (num_tokens,), float32; with gradient where `use` has one.

        Loads are taken as given; nodes are counted exactly, for chances as the expectation of independent draws.

        Args:
            use: Units that each token uses, bool or chances (num_tokens, num_units).
            site: Where; heads cost nothing.

        Example: experts 0 and 2 on node 0, expert 1 on node 1, a price of .1 a node: a token that uses 0 and 2 pays .1,
        one that uses 0 and 1 pays .2, one that uses each with chance one half .1 * (.75 + .5) = .125.
        """
        chances = use.float()
        if site.kind != "experts" or not self.any:
            return chances.new_zeros(len(use))
        paid = chances @ (self.balance * self._excess(use, site))
        if self.send:
            alone = [1 - (1 - chances[:, node :: self.nodes]).prod(1) for node in self._used_nodes(site)]
            paid = paid + self.send * torch.stack(alone).sum(0)
        return paid

    def unit_prices(self, use: Tensor, site: RoutingSite) -> Tensor:
        """What each unit adds to what a token pays, its other units given: float32 (num_tokens or 1, num_units)."""
        if site.kind != "experts" or not self.any:
            return torch.zeros(1, site.num_units, device=use.device)
        prices = (self.balance * self._excess(use, site)).unsqueeze(0)
        if self.send:
            prices = prices + self.send * self._opens_node(use)
        return prices

    def _used_nodes(self, site: RoutingSite) -> range:
        return range(min(self.nodes, site.num_units))

    def _excess(self, use: Tensor, site: RoutingSite) -> Tensor:
        """What each unit's expert or node carries beyond an even share (num_units,)."""
        if not self.nodes:
            return load_excess(use, site.native_units)
        by_node = torch.stack([use[:, node :: self.nodes].float().sum(1) for node in self._used_nodes(site)], dim=1)
        return load_excess(by_node, site.native_units)[torch.arange(site.num_units, device=use.device) % self.nodes]

    def _opens_node(self, use: Tensor) -> Tensor:
        """Whether a unit of a token is, or would be, the only one on its node: float32 (num_tokens, num_units)."""
        opens = torch.empty(use.shape, device=use.device)
        for node in range(self.nodes):
            there = use[:, node :: self.nodes].float()
            opens[:, node :: self.nodes] = (there.sum(1, keepdim=True) - there == 0).float()
        return opens

"""FLOPs of a site, of a subset, of a run. Multiplications and additions are counted separately.

Only what is really skipped counts as saved: keys and values of a head are computed for every token, as later tokens
attend to them, so they belong to the fixed part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_backbone.config import BackboneConfig
from moe_backbone.sites import RoutingSite


def transformer_sites(config: BackboneConfig) -> tuple[RoutingSite, ...]:
    """The two sites of every layer, in running order."""
    heads_flops = 4 * config.hidden_size * config.head_size  # query and output projection
    expert_flops = 6 * config.hidden_size * config.intermediate_size  # gate, up and down projection
    sites = []
    for layer in range(config.num_layers):
        sites.append(
            RoutingSite(
                kind="heads",
                layer=layer,
                num_units=config.num_heads,
                native_units=config.num_heads,
                unit_flops=heads_flops,
                unit_flops_per_key=4 * config.head_size,  # score and mix
            )
        )
        sites.append(
            RoutingSite(
                kind="experts",
                layer=layer,
                num_units=config.num_experts,
                native_units=config.top_k,
                unit_flops=expert_flops,
            )
        )
    return tuple(sites)


def fixed_flops(config: BackboneConfig) -> int:
    """FLOPs of one token that no routing can save: keys, values, native gates, shared expert, output head.

    As everywhere, products count and element-wise work does not: a gate vector adds the product of the mixing weights
    with its factors, `2 * num_experts * hidden_size` a layer, but not the division by it.
    """
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.num_experts
    layer += 2 * config.hidden_size * config.num_experts * (config.mixing == "gate_vector")
    layer += 6 * config.hidden_size * config.shared_intermediate_size
    layer += 2 * config.hidden_size * config.num_heads * config.head_gate
    return config.num_layers * layer + 2 * config.hidden_size * config.vocab_size


class ComputeMeter:
    """Turns subsets into FLOPs and into fractions of the native choice.

    The unit of compute is what native routing spends on an average token of a full sequence, so that the mean over
    the tokens of full sequences is exactly 1.0 under native routing.
    """

    def __init__(self, sites: Sequence[RoutingSite], seq_len: int) -> None:
        """Precompute the native cost of a token in a sequence of `seq_len` tokens."""
        self.sites = tuple(sites)
        self.seq_len = seq_len
        mean_keys = (seq_len + 1) / 2
        self.native_flops = sum(
            site.native_units * (site.unit_flops + site.unit_flops_per_key * mean_keys) for site in sites
        )
        """Routable FLOPs of one token under native routing, mean over a full sequence."""

    def unit_flops(self, index: int, positions: Tensor) -> Tensor:
        """FLOPs of one unit of site `index` for tokens at `positions`, counted from 0: float64, same shape."""
        site = self.sites[index]
        return site.unit_flops + site.unit_flops_per_key * (positions.double() + 1)

    def flops(self, index: int, subset: Tensor, positions: Tensor) -> Tensor:
        """FLOPs that `subset`, bool (num_tokens, num_units), costs each token: float64 (num_tokens,)."""
        return subset.sum(1) * self.unit_flops(index, positions)

    def compute(self, index: int, subset: Tensor, positions: Tensor) -> Tensor:
        """The same as a fraction of the native cost over all sites: float32 (num_tokens,)."""
        return (self.flops(index, subset, positions) / self.native_flops).float()


def native_shares(meter: ComputeMeter) -> Tensor:
    """Fraction of native compute that one unit of each site costs on average: float64 (num_sites,)."""
    positions = torch.arange(meter.seq_len)
    return torch.stack([meter.unit_flops(i, positions).mean() for i in range(len(meter.sites))]) / meter.native_flops

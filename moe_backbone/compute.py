"""FLOPs of a site, of a subset, of a run. Multiplications and additions are counted separately.

Only what is really skipped counts as saved: keys and values of a head are computed for every token, as later tokens
attend to them, so they belong to the fixed part. Under the head meaning `query_key_value` they are skipped, so they
belong to the unit, which then attends to no more keys than were kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_backbone.config import BackboneConfig
from moe_backbone.sites import HeadMeaning, RoutingSite


def transformer_sites(config: BackboneConfig, head_meaning: HeadMeaning = "query") -> tuple[RoutingSite, ...]:
    """The two sites of every layer, in running order."""
    drops_keys = head_meaning == "query_key_value"
    projections = 4 if drops_keys else 2  # query and output; then also key and value
    heads_flops = projections * 2 * config.hidden_size * config.head_size
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
                drops_keys=drops_keys,
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


def fixed_flops(config: BackboneConfig, head_meaning: HeadMeaning = "query") -> int:
    """FLOPs of one token that no routing can save: keys, values, native gates, shared expert, output head.

    Keys and values are not among them under `query_key_value`.

    As everywhere, products count and element-wise work does not: a gate vector adds the product of the mixing weights
    with its factors, `2 * num_experts * hidden_size` a layer, but not the division by it.
    """
    layer = 4 * config.hidden_size**2 * (head_meaning == "query") + 2 * config.hidden_size * config.num_experts
    layer += 2 * config.hidden_size * config.num_experts * (config.mixing == "gate_vector")
    layer += 6 * config.hidden_size * config.shared_intermediate_size
    layer += 2 * config.hidden_size * config.num_heads * config.head_gate
    return config.num_layers * layer + 2 * config.hidden_size * config.vocab_size


class ComputeMeter:
    """Turns subsets into FLOPs and into fractions of the native choice.

    The unit of compute is what native routing spends on an average token of a full sequence, so that the mean over
    the tokens of full sequences is exactly 1.0 under native routing.
    """

    def __init__(self, sites: Sequence[RoutingSite], seq_len: int, bytes_per_number: int = 4) -> None:
        """Precompute the native cost of a token in a sequence of `seq_len` tokens; keys and values are float32."""
        self.sites = tuple(sites)
        self.seq_len = seq_len
        self.bytes_per_number = bytes_per_number
        mean_keys = (seq_len + 1) / 2
        self.native_flops = sum(
            site.native_units * (site.unit_flops + site.unit_flops_per_key * mean_keys) for site in sites
        )
        """Routable FLOPs of one token under native routing, mean over a full sequence."""
        self.native_cache_bytes = bytes_per_number * sum(site.num_units * site.unit_cached_numbers for site in sites)
        """Bytes of keys and values of one token under native routing, over all sites."""

    def unit_flops(self, index: int, positions: Tensor) -> Tensor:
        """FLOPs of one unit of site `index` for tokens at `positions`, counted from 0: float64, same shape.

        Every earlier token is taken to be a key, which is the most that a unit costs where the site drops keys.
        """
        site = self.sites[index]
        return site.unit_flops + site.unit_flops_per_key * (positions.double() + 1)

    def flops(self, index: int, subset: Tensor, positions: Tensor, earlier: Tensor | None = None) -> Tensor:
        """FLOPs that a subset costs each token.

        Args:
            index: Which site.
            subset: Chosen units, bool (num_tokens, num_units), sequence after sequence.
            positions: Place of each token in its sequence, counted from 0 (num_tokens,), int64.
            earlier: Keys that the units keep of tokens before these (num_sequences, num_units), int64, where a cache
                holds them; see `RoutingState.earlier_keys`. Read where the site drops keys.

        Returns:
            float64 (num_tokens,).
        """
        site = self.sites[index]
        if not site.drops_keys:
            return subset.sum(1) * self.unit_flops(index, positions)
        keys = attended_keys(subset, positions, earlier)
        return (subset.sum(1) * site.unit_flops + keys.sum(1) * site.unit_flops_per_key).double()

    def compute(self, index: int, subset: Tensor, positions: Tensor, earlier: Tensor | None = None) -> Tensor:
        """The same as a fraction of the native cost over all sites: float32 (num_tokens,)."""
        return (self.flops(index, subset, positions, earlier) / self.native_flops).float()

    def expected_compute(self, index: int, chance: Tensor, positions: Tensor) -> Tensor:
        """Fraction of native compute that units cost which whole sequences use by independent chances.

        Where the site drops keys, a token that is likely to use a unit makes it dearer for the tokens behind it.

        Args:
            index: Which site.
            chance: Of each unit (num_tokens, num_units), float32, sequence after sequence.
            positions: Place of each token in its sequence, counted from 0 (num_tokens,), int64.

        Returns:
            float32 (num_tokens,), with the gradient of `chance`.
        """
        site = self.sites[index]
        if not site.drops_keys:
            return chance.sum(1) * (self.unit_flops(index, positions) / self.native_flops).float()
        flops = site.unit_flops + site.unit_flops_per_key * (1 + earlier_keys(chance, positions))
        return ((chance * flops).sum(1) / self.native_flops).float()

    def cache_bytes(self, index: int, subset: Tensor) -> Tensor:
        """Bytes of keys and values that each token leaves at site `index` for later ones: float32 (num_tokens,).

        Chances in place of a subset give the expected bytes.

        Over `native_cache_bytes`, and summed over the sites, this is a token's share of the native cache.
        """
        site = self.sites[index]
        kept = subset if site.drops_keys else torch.ones_like(subset)
        return kept.sum(1).float() * (site.unit_cached_numbers * self.bytes_per_number)


def attended_keys(subset: Tensor, positions: Tensor, earlier: Tensor | None = None) -> Tensor:
    """Keys that each token attends to where only tokens that use a head are keys there: its own and those before it.

    Args:
        subset: Chosen heads, bool (num_tokens, num_heads), sequence after sequence.
        positions: Place of each token in its sequence, without gaps (num_tokens,), int64.
        earlier: Keys kept of tokens before these (num_sequences, num_heads), int64.

    Returns:
        int64 (num_tokens, num_heads); zeros where `subset` is False.

    Example: a head used by the first and the third of three tokens gives 1, 0, 2.
    """
    return (earlier_keys(subset, positions, earlier) + 1) * subset


def earlier_keys(use: Tensor, positions: Tensor, earlier: Tensor | None = None) -> Tensor:
    """Keys that each token finds of the tokens before it, where only tokens that use a head are keys there.

    Args:
        use: Chosen heads, bool, or their chances, float (num_tokens, num_heads), sequence after sequence.
        positions: Place of each token in its sequence, without gaps (num_tokens,), int64.
        earlier: Keys kept of tokens before these (num_sequences, num_heads), int64.

    Returns:
        (num_tokens, num_heads): int64, or float64 expected numbers.

    Example: a head used by the first and the third of three tokens gives 0, 1, 1.
    """
    use = use.double() if use.is_floating_point() else use.long()
    before = use.cumsum(0) - use
    first = torch.arange(len(use), device=use.device) - (positions - positions[:1])
    keys = before - before.index_select(0, first)
    return keys if earlier is None else keys + earlier.repeat_interleave(len(use) // max(1, len(earlier)), 0)


def load_excess(use: Tensor, native_units: int) -> Tensor:
    """What each unit carries beyond an even share of the load: (num_units * share - 1) / native_units.

    Summed over a token's units, its mean over tokens is (mean units / native_units) * CV**2 of the loads.

    Args:
        use: Units that each token uses, bool or chances (num_tokens, num_units).
        native_units: Units that native routing uses.

    Returns:
        float32 (num_units,), without gradient; zeros where no token uses any unit.

    Example: loads 3 and 1 of four tokens, natively one unit a token, give 2 * .75 - 1 = .5 and 2 * .25 - 1 = -.5. The
    mean over these tokens, (3 * .5 - 1 * .5) / 4 = .25, is the CV squared: deviation 1 over mean 2, squared.
    """
    load = use.detach().float().mean(0)
    total = load.sum()
    excess = (len(load) * load / total.clamp_min(torch.finfo(load.dtype).tiny) - 1) / native_units
    return excess * (total > 0)


def native_shares(meter: ComputeMeter) -> Tensor:
    """Fraction of native compute that one unit of each site costs on average: float64 (num_sites,)."""
    positions = torch.arange(meter.seq_len)
    return torch.stack([meter.unit_flops(i, positions).mean() for i in range(len(meter.sites))]) / meter.native_flops

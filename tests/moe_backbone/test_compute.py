"""FLOPs by hand, native compute of exactly one, and counted rows equal to chosen units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_backbone import BackboneConfig, ComputeMeter, MoETransformer, NativeRouter, Router, fixed_flops, native_shares
from moe_backbone.kernels import count_rows

# hidden_size 32, head_size 8, intermediate_size 16; a multiplication and an addition for every weight
HEAD_FLOPS = 2 * 32 * 8 + 2 * 8 * 32
HEAD_FLOPS_PER_KEY = 2 * 8 + 2 * 8
EXPERT_FLOPS = 2 * 32 * 16 + 2 * 32 * 16 + 2 * 16 * 32


def _meter(backbone: MoETransformer) -> ComputeMeter:
    return ComputeMeter(backbone.sites, backbone.config.seq_len)


def test_sites_are_heads_then_experts_of_every_layer(tiny_backbone: MoETransformer) -> None:
    """Running order, sizes and FLOPs of a unit, worked out by hand."""
    assert [site.name for site in tiny_backbone.sites] == [
        "layer0.heads",
        "layer0.experts",
        "layer1.heads",
        "layer1.experts",
    ]
    heads, experts = tiny_backbone.sites[2:]
    assert (heads.num_units, heads.native_units) == (4, 4)
    assert (heads.unit_flops, heads.unit_flops_per_key) == (HEAD_FLOPS, HEAD_FLOPS_PER_KEY)
    assert (experts.num_units, experts.native_units) == (4, 2)
    assert (experts.unit_flops, experts.unit_flops_per_key) == (EXPERT_FLOPS, 0)


def test_fixed_flops_by_hand(tiny_config: BackboneConfig) -> None:
    """Keys and values, both gates, the shared expert and the output head."""
    plain = 2 * (2 * 32 * 64 + 2 * 32 * 4) + 2 * 32 * 256
    assert fixed_flops(tiny_config) == plain
    more = replace(tiny_config, shared_intermediate_size=8, head_gate=True)
    assert fixed_flops(more) == plain + 2 * (3 * 2 * 32 * 8 + 2 * 32 * 4)


@pytest.mark.parametrize("seq_len", [2, 15, 16], ids=["two tokens", "odd", "even"])
def test_native_compute_of_full_sequences_is_exactly_one(seq_len: int) -> None:
    """The mean over the tokens of full sequences is the unit of compute."""
    config = BackboneConfig(hidden_size=32, num_layers=2, num_heads=4, num_experts=4, seq_len=seq_len)
    backbone = MoETransformer(config).requires_grad_(False)
    meter = _meter(backbone)
    tokens = torch.zeros(3, seq_len, dtype=torch.int64)
    _, subsets = backbone.run(tokens, NativeRouter())
    positions = backbone.begin(tokens).positions
    flops = sum(meter.flops(index, subset, positions) for index, subset in enumerate(subsets))
    assert isinstance(flops, Tensor)
    assert flops.mean().item() == meter.native_flops
    compute = torch.stack([meter.compute(index, subset, positions) for index, subset in enumerate(subsets)])
    torch.testing.assert_close(compute.sum(0).mean(), torch.tensor(1.0))


def test_native_shares_are_shares_of_one(tiny_backbone: MoETransformer) -> None:
    """Times the native units of each site they add up to native compute."""
    shares = native_shares(_meter(tiny_backbone))
    units = torch.tensor([site.native_units for site in tiny_backbone.sites])
    torch.testing.assert_close((shares * units).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_head_costs_more_the_more_keys_it_sees_and_an_expert_never(tiny_backbone: MoETransformer) -> None:
    """The token at position p attends to p + 1 keys."""
    meter = _meter(tiny_backbone)
    positions = torch.tensor([0, 15])
    subset = torch.tensor([[True, False, True, True]] * 2)
    first, last = HEAD_FLOPS + HEAD_FLOPS_PER_KEY, HEAD_FLOPS + 16 * HEAD_FLOPS_PER_KEY
    assert meter.flops(0, subset, positions).tolist() == [3 * first, 3 * last]
    assert meter.flops(1, subset, positions).tolist() == [3 * EXPERT_FLOPS] * 2


def test_empty_subset_costs_nothing(tiny_backbone: MoETransformer) -> None:
    """No unit, no FLOPs, at either kind of site."""
    meter = _meter(tiny_backbone)
    subset, positions = torch.zeros(16, 4, dtype=torch.bool), torch.arange(16)
    assert meter.compute(0, subset, positions).eq(0).all()
    assert meter.compute(1, subset, positions).eq(0).all()


def test_counted_rows_equal_the_chosen_units(
    tiny_backbone: MoETransformer, tiny_tokens: Tensor, random_subsets: Router
) -> None:
    """What is charged is what the ops multiplied: one row for each chosen unit of each token."""
    tiny_backbone.backend = "compact"
    with count_rows() as rows:
        _, subsets = tiny_backbone.run(tiny_tokens, random_subsets)
    chosen = {"heads": 0, "experts": 0}
    for site, subset in zip(tiny_backbone.sites, subsets, strict=True):
        chosen[site.kind] += int(subset.sum())
    assert dict(rows) == chosen
    assert 0 < chosen["heads"] < 2 * tiny_tokens.numel() * 4

"""Weights as integers, the size of units, and bit-operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_backbone import MoETransformer, NativeRouter
from moe_backbone.compression import (
    bit_operations,
    input_dimensions,
    pack,
    plain_weights,
    quantize,
    unit_magnitudes,
    unpack,
)
from moe_backbone.saved import WEIGHTS, load_saved, save_backbone
from moe_backbone.sites import RoutingSite


def test_every_matrix_is_rounded_and_nothing_else(tiny_backbone: MoETransformer) -> None:
    """Norms stay to the bit; of a matrix no weight moves by more than half a step, and the original is left alone."""
    before, weights = tiny_backbone.sha256(), tiny_backbone.state_dict()
    quantized = quantize(tiny_backbone)
    rounded = quantized.dequantized().state_dict()
    assert tiny_backbone.sha256() == before
    assert set(quantized.plain) == {name for name in weights if name.startswith("norms")}
    for name, weight in weights.items():
        if name in quantized.codes:
            assert (rounded[name] - weight).abs().max() <= 0.5001 * quantized.scales[name].max()
            assert not torch.equal(rounded[name], weight)
        else:
            assert torch.equal(rounded[name], weight)


def test_one_scale_for_each_output_of_a_product(tiny_backbone: MoETransformer) -> None:
    """The outputs of a unit do not share a scale, its inputs do: the largest weight into each output is exact."""
    quantized, weights = quantize(tiny_backbone), tiny_backbone.state_dict()
    for name, dimension in input_dimensions(tiny_backbone).items():
        shape = list(weights[name].shape)
        shape[dimension] = 1
        assert list(quantized.scales[name].shape) == shape
        assert (quantized.codes[name].abs().amax(dimension) == 127).all()
    experts, width = tiny_backbone.config.num_experts, tiny_backbone.hidden_size
    assert quantized.scales["expert_layers.0.down"].shape == (experts, 1, width)


def test_example_of_four_bits(tiny_backbone: MoETransformer) -> None:
    """The docstring's numbers."""
    with torch.no_grad():
        tiny_backbone.output_head.weight[0, :3] = torch.tensor([0.55, -1.0, 0.26])
        tiny_backbone.output_head.weight[0, 3:] = 0
    quantized = quantize(tiny_backbone, 4)
    assert quantized.codes["output_head.weight"][0, :3].tolist() == [4, -7, 2]
    assert quantized.scales["output_head.weight"][0].item() == pytest.approx(1 / 7)


def test_packing_is_reversible() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    assert pack(codes).shape == (2, 4)
    assert torch.equal(unpack(pack(codes)), codes)
    assert pack(torch.tensor([4, -7], dtype=torch.int8)).item() == 0x94


@pytest.mark.parametrize(("bits", "share"), [(8, 0.3), (4, 0.2)])
def test_file_is_small_and_gives_the_same_backbone(
    bits: Any, share: float, tiny_backbone: MoETransformer, tmp_path: Path
) -> None:
    """To the bit, or a router would not know its backbone again."""
    quantized = quantize(tiny_backbone, bits)
    save_backbone(tiny_backbone, tmp_path / "full")
    save_backbone(quantized, tmp_path / "small")
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("small", "full")]
    header = 3000
    assert sizes[0] < share * sizes[1] + header
    assert quantized.num_bytes == pytest.approx(sizes[0], abs=header)
    assert load_saved(tmp_path / "small").sha256() == quantized.dequantized().sha256()


def test_fewer_bits_cost_more(tiny_backbone: MoETransformer, tiny_tokens: torch.Tensor) -> None:
    exact, _ = tiny_backbone.run(tiny_tokens, NativeRouter())
    errors = [
        (quantize(tiny_backbone, bits).dequantized().run(tiny_tokens, NativeRouter())[0] - exact).abs().mean()  # type: ignore[arg-type]
        for bits in (8, 4)
    ]
    assert 0 < 4 * errors[0] < errors[1]


def test_plain_file_is_read_as_it_is(tiny_backbone: MoETransformer) -> None:
    weights = tiny_backbone.state_dict()
    assert all(plain_weights(weights)[name] is weight for name, weight in weights.items())


def test_other_bits_are_refused(tiny_backbone: MoETransformer) -> None:
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 2"):
        quantize(tiny_backbone, 2)  # type: ignore[arg-type]


def test_magnitude_of_a_unit_counts_its_own_weights_only(tiny_backbone: MoETransformer) -> None:
    """Doubling all that belongs to one unit doubles its norm and no other."""
    before = unit_magnitudes(tiny_backbone)
    attention, experts = tiny_backbone.attentions[0], tiny_backbone.expert_layers[0]
    size = tiny_backbone.config.head_size
    with torch.no_grad():
        for weight in (attention.query, attention.output, experts.gate_up, experts.down):
            weight[1] *= 2
        attention.key_value.unflatten(1, (2, -1, size))[:, :, 1] *= 2
    for index, norms in unit_magnitudes(tiny_backbone).items():
        factors = torch.ones_like(norms)
        if index < 2:
            factors[1] = 2
        torch.testing.assert_close(norms, factors * before[index])


def test_bit_operations() -> None:
    """The docstring's numbers; in full precision every FLOP counts 512."""
    site = RoutingSite(kind="heads", layer=0, num_units=2, native_units=2, unit_flops=200, unit_flops_per_key=10)
    assert bit_operations((site,), (1.0,), 300.0, 0.0, weight_bits=8) == 76_800
    assert bit_operations((site,), (1.0,), 300.0, 60.0, 40.0) == 400 * 512
    assert bit_operations((site,), (1.0,), 300.0, 60.0, 40.0, 4) == (260 * 4 + 140 * 32) * 16

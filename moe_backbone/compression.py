"""Weight-only quantisation of a backbone, the size of its units, and compute counted in bit-operations.

Weights are rounded to integers with one scale for each output of a product, kept as integers on disk, and multiplied in
float32: the kernels take plain tensors with one matrix for each unit, so no integer product runs. That saves storage
and bit-operations as a machine with such products would count them; it saves no time here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe_backbone.attention import Attention
from moe_backbone.checks import require
from moe_backbone.config import BackboneConfig
from moe_backbone.experts import ExpertLayer
from moe_backbone.sites import HeadMeaning, RoutingSite
from moe_backbone.transformer import MoETransformer

Bits = Literal[4, 8]
FULL_BITS = 32
"""Of a float32 number: what every operand is that is not quantised."""
SCALE, PACKED = ".scale", ".int4"
"""How names end in a file: scales, and two 4-bit codes in a byte."""


@dataclass(frozen=True, kw_only=True)
class QuantizedWeights:
    """The weights of a backbone as integers and scales; what is no matrix stays as it is."""

    config: BackboneConfig
    head_meaning: HeadMeaning
    bits: Bits
    codes: Mapping[str, Tensor]
    """Whole numbers by the name of the weight, int8, its shape."""
    scales: Mapping[str, Tensor]
    """What one step is worth: float32, the weight's shape with 1 along the inputs of the product."""
    plain: Mapping[str, Tensor]
    """All other weights."""

    def dequantized(self) -> MoETransformer:
        """The backbone that these weights make: in evaluation mode, frozen, on the device of the codes."""
        backbone = MoETransformer(self.config)
        backbone.head_meaning = self.head_meaning
        backbone.load_state_dict(plain_weights(self.tensors()))
        device = next(iter(self.codes.values())).device
        return backbone.requires_grad_(False).eval().to(device)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: `plain_weights` reads it."""
        scales = {name + SCALE: scale for name, scale in self.scales.items()}
        if self.bits == 8:
            return {**self.plain, **self.codes, **scales}
        return {**self.plain, **{name + PACKED: pack(code) for name, code in self.codes.items()}, **scales}

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in a file."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def quantize(backbone: MoETransformer, bits: Bits = 8) -> QuantizedWeights:
    """Round every matrix of a backbone, the native gates among them; norms and gate vectors stay as they are.

    Symmetric, to the nearest, one scale for each output of the product (for each token of the embedding), so that its
    largest weight is the largest code.

    Args:
        backbone: Left as it is.
        bits: Of a weight.

    Raises:
        ValueError: If there is no such number of bits.

    Example: weights (.55, -1, .26) into one output at 4 bits have the scale 1/7 and the codes (4, -7, 2).
    """
    require(bits in (4, 8), f"bits must be 4 or 8, got {bits}")
    largest = 2 ** (bits - 1) - 1
    inputs, weights = input_dimensions(backbone), backbone.state_dict()
    codes, scales = {}, {}
    for name, dimension in inputs.items():
        weight = weights.pop(name).detach()
        scale = weight.abs().amax(dimension, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / largest
        codes[name] = (weight / scale).round().clamp(-largest, largest).to(torch.int8)
        scales[name] = scale
    return QuantizedWeights(
        config=backbone.config,
        head_meaning=backbone.head_meaning,
        bits=bits,
        codes=codes,
        scales=scales,
        plain={name: weight.detach().clone() for name, weight in weights.items()},
    )


def input_dimensions(backbone: MoETransformer) -> dict[str, int]:
    """Every matrix by name, and the dimension that a product with it sums over; of the embedding, a token's row."""
    dimensions = {}
    for path, module in backbone.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            dimensions[f"{path}.weight"] = -1
        elif isinstance(module, Attention):
            dimensions |= {f"{path}.{name}": -2 for name in ("query", "key_value", "output")}
        elif isinstance(module, ExpertLayer):
            dimensions |= {f"{path}.{name}": -2 for name in ("gate_up", "down")}
    return dimensions


def plain_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the backbone takes them, from a file that may hold codes and scales beside them."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        if name.endswith(PACKED):
            name, tensor = name.removesuffix(PACKED), unpack(tensor)
        scale = tensors.get(name + SCALE)
        weights[name] = tensor if scale is None else tensor * scale
    return weights


def pack(codes: Tensor) -> Tensor:
    """Codes in [-8, 7], int8 (..., even), two in a byte: uint8 (..., half).

    Example: (4, -7) becomes the byte 0x94: the first in the lower half.
    """
    low, high = codes.unflatten(-1, (-1, 2)).view(torch.uint8).unbind(-1)
    return (low & 15) | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`."""
    halves = torch.stack((packed << 4, packed & 240), dim=-1).view(torch.int8)
    return (halves >> 4).flatten(-2)  # of signed numbers: keeps the sign


def unit_magnitudes(backbone: MoETransformer) -> dict[int, Tensor]:
    """Norm of all weights of each unit, the simplest guess at what it matters.

    Returns:
        By index of the site, float64 (num_units,). Compare units of one kind: heads and experts differ in size.

    Source: magnitude pruning, arXiv:1506.02626, of whole units.
    """
    magnitudes = {}
    for layer, (attention, experts) in enumerate(zip(backbone.attentions, backbone.expert_layers, strict=True)):
        assert isinstance(attention, Attention)
        assert isinstance(experts, ExpertLayer)
        shared = attention.key_value.unflatten(1, (2, attention.num_heads, -1)).movedim(2, 0)
        magnitudes[2 * layer] = _norms(attention.query, attention.output, shared)
        magnitudes[2 * layer + 1] = _norms(experts.gate_up, experts.down)
    return magnitudes


def _norms(*weights: Tensor) -> Tensor:
    """Of weights with units along their first dimension (num_units,)."""
    return torch.cat([weight.detach().double().flatten(1) for weight in weights], dim=1).norm(dim=1)


def bit_operations(
    sites: Sequence[RoutingSite],
    units_per_token: Sequence[float],
    routed_flops: float,
    fixed_flops: float,
    router_flops: float = 0.0,
    weight_bits: int = FULL_BITS,
) -> float:
    """Bit-operations of one token, all its products included: what routing can save, what it cannot, and the router.

    A multiply-add of numbers of `a` and `b` bits counts `a * b`, so one of two float32 numbers counts 1024 (BOPs as in
    arXiv:2005.07093; arXiv:1804.10969 also adds the accumulator's bits). Products with weights have operands of
    `weight_bits` and 32 bits; those of two activations, the scores and the mixing of attention, of 32 and 32, and so
    have the router's.

    Args:
        sites: Of the backbone.
        units_per_token: Mean units of a token at each site.
        routed_flops: FLOPs of these units for one token, attention to keys included.
        fixed_flops: See `compute.fixed_flops`; all are products with weights.
        router_flops: The router's own.
        weight_bits: Of a weight of the backbone.

    Example: a unit of 200 FLOPs and 100 to attend, at 8 bits: 100 multiply-adds of 256 and 50 of 1024, so 76,800.
    """
    with_weights = sum(site.unit_flops * units for site, units in zip(sites, units_per_token, strict=True))
    of_activations = routed_flops - with_weights
    lowered = (with_weights + fixed_flops) * weight_bits
    return FULL_BITS * (lowered + (of_activations + router_flops) * FULL_BITS) / 2

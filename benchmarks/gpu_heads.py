"""The heads op on a GPU against dense attention of PyTorch, by share of the heads that a token uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_experts import TOLERANCES
from benchmarks.gpu_machine import Machine, relative_error
from benchmarks.mask import BARS
from benchmarks.measure import Row
from moe_backbone.kernels import head_attention, reference, rotate


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """Of one attention sublayer; the queries are the last of the keys."""

    num_sequences: int
    num_queries: int
    num_keys: int
    num_heads: int = 16
    head_size: int = 64
    hidden_size: int = 1024


class HeadInputs(NamedTuple):
    """Arguments of `head_attention`."""

    hidden: Tensor
    weights: Tensor
    subset: Tensor
    query_weight: Tensor
    keys: Tensor
    values: Tensor
    output_weight: Tensor
    rotation: Tensor


WORK = {
    "prefill": HeadSizes(num_sequences=8, num_queries=1024, num_keys=1024),
    "prefill-wide": HeadSizes(num_sequences=4, num_queries=2048, num_keys=2048, head_size=128, hidden_size=2048),
    "decode": HeadSizes(num_sequences=64, num_queries=1, num_keys=2048),
}
SHARES = {1.0: 1.0, **BARS}
"""Time of dense attention over ours, by share of the heads."""


def draw_heads(sizes: HeadSizes, device: torch.device, dtype: torch.dtype, *, share: float) -> HeadInputs:
    """Random inputs; each head is chosen with the chance `share`."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, heads, width = (sizes.num_sequences, sizes.num_queries), sizes.num_heads, sizes.head_size

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype) * scale

    angles = torch.rand(sizes.num_queries, width // 2, generator=generator, device=device)
    cached = (sizes.num_sequences, heads, sizes.num_keys, width)
    return HeadInputs(
        hidden=normal(*tokens, sizes.hidden_size),
        weights=torch.rand(*tokens, heads, generator=generator, device=device).to(dtype) + 0.1,
        subset=torch.rand(*tokens, heads, generator=generator, device=device) < share,
        query_weight=normal(heads, sizes.hidden_size, width, scale=sizes.hidden_size**-0.5),
        keys=normal(*cached),
        values=normal(*cached),
        output_weight=normal(heads, width, sizes.hidden_size, scale=(heads * width) ** -0.5),
        rotation=torch.stack((angles.cos(), angles.sin())).to(dtype),
    )


def heads(machine: Machine) -> Iterator[Row]:
    """Prefill and decode at every share."""
    for name, sizes in WORK.items():
        for share, bar in SHARES.items():
            yield _row(machine, f"heads/{name}-{share}", bar, sizes, share)
        machine.release()


def _row(machine: Machine, name: str, bar: float, sizes: HeadSizes, share: float) -> Row:
    inputs = draw_heads(sizes, machine.device, machine.dtype, share=share)
    ours, rival = partial(head_attention, *inputs, backend="triton"), dense(inputs)
    truth = reference.head_attention(*inputs)
    errors = [relative_error([run()], [truth]) for run in (ours, rival)]
    (own_run, own_captured), (other_run, other_captured) = machine.captured(ours), machine.captured(rival)
    own, other = machine.time([own_run, other_run])
    flops, num_bytes = work(sizes, inputs.subset, inputs.hidden.element_size())
    floor = machine.ceilings.floor(flops, num_bytes)
    figures = {
        "ours_us": own._asdict(),
        "dense_us": other._asdict(),
        "captured": [own_captured, other_captured],
        "floor_microseconds": floor,
        "fraction_of_floor": floor / own.median,
        "tflops": flops / own.median / 1e6,
        "launches": len(machine.trace(ours).kernels),
        "peak_mb": machine.peak_bytes(ours) / 1e6,
        "dense_peak_mb": machine.peak_bytes(rival) / 1e6,
        "relative_errors": errors,
        "sizes": asdict(sizes),
    }
    equal = max(errors) <= TOLERANCES[machine.dtype]
    return machine.row(name, other.median / own.median, bar, equal=equal, share=share, **figures)


def dense(inputs: HeadInputs) -> Callable[[], Tensor]:
    """Every head of every token by PyTorch's fused attention, then masked; weights are laid out before the clock."""
    num_heads, hidden_size, head_size = inputs.query_weight.shape
    num_queries, num_keys = inputs.hidden.shape[1], inputs.keys.shape[2]
    if num_queries not in (1, num_keys):
        raise ValueError(f"num_queries must be 1 or num_keys={num_keys}, got {num_queries}")
    widen = inputs.query_weight.transpose(0, 1).reshape(hidden_size, num_heads * head_size)
    narrow, mixing = inputs.output_weight.flatten(0, 1), (inputs.weights * inputs.subset).unsqueeze(3)

    def run() -> Tensor:
        query = (inputs.hidden @ widen).unflatten(2, (num_heads, head_size)).transpose(1, 2)
        query = rotate(query, inputs.rotation)
        mixed = F.scaled_dot_product_attention(query, inputs.keys, inputs.values, is_causal=num_queries > 1)
        return (mixed.transpose(1, 2) * mixing).flatten(2) @ narrow

    return run


def work(sizes: HeadSizes, subset: Tensor, element_size: int) -> tuple[float, float]:
    """FLOPs of the chosen heads, and bytes that must move: everything once, keys and values of unused heads never.

    Example: one query, two keys, one head of size 2, hidden_size 4: 4 * 4 * 2 + 4 * 2 * 2 = 48 FLOPs.
    """
    first = sizes.num_keys - sizes.num_queries + 1
    seen = torch.arange(first, sizes.num_keys + 1, device=subset.device)
    chosen = subset.sum(2)
    pairs, keys_seen = int(chosen.sum()), int((chosen * seen).sum())
    flops = 4.0 * sizes.head_size * (pairs * sizes.hidden_size + keys_seen)
    lists = int(subset.any(1).sum())
    elements = 2 * lists * sizes.num_keys * sizes.head_size + 2 * subset[..., 0].numel() * sizes.hidden_size
    elements += 2 * sizes.num_heads * sizes.hidden_size * sizes.head_size
    return flops, float(element_size * elements)

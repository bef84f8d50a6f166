"""Triton: attention for any subset of heads per token; heads that are not chosen are not computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_backbone.checks import require
from moe_backbone.kernels import reference
from moe_backbone.kernels.rows import record_rows, uncounted
from moe_backbone.kernels.tiles import MAX_HEAD_SIZE, MAX_HEADS
from moe_backbone.kernels.triton_heads_forward import forward
from moe_backbone.kernels.triton_plan import INTERPRETED


def head_attention(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
) -> Tensor:
    """Equal to `reference.head_attention`, in three launches whose work follows the subset.

    The host reads nothing back, so a CUDA graph can hold the call; equal bits every time. The backward pass has no
    kernel: it recomputes with the reference, every head of every token.

    Args:
        hidden: Token rows (num_sequences, num_queries, hidden_size); bfloat16 (on a GPU), float16 or float32.
        weights: Head weights (num_sequences, num_queries, num_heads); read where `subset` is True.
        subset: Chosen heads, bool (num_sequences, num_queries, num_heads); 1 to 64 heads.
        query_weight: Query projections (num_heads, hidden_size, head_size); head_size is even, at most 128.
        keys: Rotated keys (num_sequences, num_heads, num_keys, head_size); the queries are the last positions.
        values: (num_sequences, num_heads, num_keys, head_size).
        output_weight: Output projections (num_heads, head_size, hidden_size).
        rotation: Cosines and sines of the query positions (2, num_queries, head_size / 2).

    Returns:
        (num_sequences, num_queries, hidden_size); zeros for a token with an empty subset.

    Raises:
        ValueError: If shapes, types or devices disagree or are beyond these limits, or if a tensor on the CPU comes
            without Triton's interpreter.

    Example: two tokens, head 0 chosen for the second only, multiplies one query row by head 0's two keys.
    Source: online softmax, arXiv:2205.14135.
    """
    arguments = {
        "hidden": hidden,
        "weights": weights,
        "subset": subset,
        "query_weight": query_weight,
        "keys": keys,
        "values": values,
        "output_weight": output_weight,
        "rotation": rotation,
    }
    _require_backend(hidden)
    _require_shapes(arguments)
    _require_limits(subset, query_weight, keys)
    output, counts = _head_attention(*arguments.values())
    record_rows("heads", counts)
    return output


@torch.library.custom_op("routegym::head_attention", mutates_args=())
def _head_attention(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output, and the queries of each head of each sequence (num_sequences * num_heads,), int32."""
    if subset.numel() == 0:
        return hidden.new_zeros(hidden.shape), hidden.new_zeros(_num_lists(subset), dtype=torch.int32)
    hidden, weights, subset, query_weight, output_weight, rotation = (
        tensor.contiguous() for tensor in (hidden, weights, subset, query_weight, output_weight, rotation)
    )
    with torch.cuda.device_of(hidden):
        keys, values = _aligned(keys), _aligned(values)
        return forward(hidden, weights, subset, query_weight, keys, values, output_weight, rotation)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself if its heads lie whole and a whole number of heads apart, else a copy."""
    *outer, inner = tensor.stride()
    return tensor if inner == 1 and all(stride % tensor.shape[3] == 0 for stride in outer) else tensor.contiguous()


def _num_lists(subset: Tensor) -> int:
    return subset.shape[0] * subset.shape[2]


@_head_attention.register_fake
def _(hidden: Tensor, weights: Tensor, subset: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(_num_lists(subset), dtype=torch.int32)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


@once_differentiable
def _recompute(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    """Gradients of the reference, from the inputs alone."""
    wanted = ctx.needs_input_grad
    with torch.enable_grad(), uncounted():
        inputs = [saved.detach().requires_grad_(want) for saved, want in zip(ctx.saved_tensors, wanted, strict=True)]
        output = reference.head_attention(*inputs)
    gradients = iter(torch.autograd.grad(output, [tensor for tensor in inputs if tensor.requires_grad], gradient))
    return tuple(next(gradients) if want else None for want in wanted)


_head_attention.register_autograd(_recompute, setup_context=_save_inputs)


def _require_backend(hidden: Tensor) -> None:
    on_cpu = hidden.device.type == "cpu"
    require(INTERPRETED or not on_cpu, "hidden must be on a GPU unless TRITON_INTERPRET=1, got cpu")
    # the interpreter multiplies the bit patterns of bfloat16, without an error
    dtypes = (torch.float32, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
    require(hidden.dtype in dtypes, f"hidden must have a dtype of {dtypes}, got {hidden.dtype}")


def _require_shapes(arguments: dict[str, Tensor]) -> None:
    hidden = arguments["hidden"]
    for name, dimensions in (("hidden", 3), ("query_weight", 3), ("keys", 4)):
        shape = tuple(arguments[name].shape)
        require(len(shape) == dimensions, f"{name} must have {dimensions} dimensions, got shape {shape}")
    num_sequences, num_queries, hidden_size = hidden.shape
    num_heads, _, head_size = arguments["query_weight"].shape
    cached = (num_sequences, num_heads, arguments["keys"].shape[2], head_size)
    shapes = {
        "hidden": (num_sequences, num_queries, hidden_size),
        "weights": (num_sequences, num_queries, num_heads),
        "subset": (num_sequences, num_queries, num_heads),
        "query_weight": (num_heads, hidden_size, head_size),
        "keys": cached,
        "values": cached,
        "output_weight": (num_heads, head_size, hidden_size),
        "rotation": (2, num_queries, head_size // 2),
    }
    for name, tensor in arguments.items():
        require(
            tuple(tensor.shape) == shapes[name], f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}"
        )
        dtype = torch.bool if name == "subset" else hidden.dtype
        require(tensor.dtype == dtype, f"{name} must be {dtype}, got {tensor.dtype}")
        require(tensor.device == hidden.device, f"{name} must be on {hidden.device}, got {tensor.device}")


def _require_limits(subset: Tensor, query_weight: Tensor, keys: Tensor) -> None:
    num_queries, num_heads = subset.shape[1:]
    head_size, num_keys = query_weight.shape[2], keys.shape[2]
    require(1 <= num_heads <= MAX_HEADS, f"num_heads must lie in [1, {MAX_HEADS}], got {num_heads}")
    require(
        2 <= head_size <= MAX_HEAD_SIZE and head_size % 2 == 0,
        f"head_size must be even and lie in [2, {MAX_HEAD_SIZE}], got {head_size}",
    )
    require(num_keys >= num_queries, f"num_keys must be at least num_queries={num_queries}, got {num_keys}")
    require(subset.numel() < 2**31, f"subset must have fewer than 2**31 elements, got {subset.numel()}")

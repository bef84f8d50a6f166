"""One public op per job; `reference` is the definition, the other backends must equal it.

`reference` computes in plain PyTorch and has gradients, `compact` skips on a CPU what was not chosen, `triton` does on
CUDA, for all ops but `kept_head_attention`. `auto` takes `triton` for CUDA tensors of types and sizes that it has,
where Triton is installed, and otherwise `compact`, or `reference` where a gradient is wanted; it says in the log what
it took. On a CPU its `head_attention` computes heads that were not chosen where that takes less time than to skip them;
`compact` itself never does.

Under `torch.autocast` an op runs in autocast's type as a whole, and its outcome has the type of `hidden` again.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from moe_backbone.kernels import compact, reference
from moe_backbone.kernels.layouts import Derived, linear
from moe_backbone.kernels.reference import rotate
from moe_backbone.kernels.rows import count_rows
from moe_backbone.kernels.tiles import DTYPES, MAX_HEAD_SIZE, MAX_HEADS
from moe_backbone.precision import lowered

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "compact", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "compact", "triton")

__all__ = [
    "BACKENDS",
    "Backend",
    "Derived",
    "count_rows",
    "expert_mlp",
    "head_attention",
    "kept_head_attention",
    "linear",
    "rotate",
]


def expert_mlp(
    hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor, backend: Backend = "auto"
) -> Tensor:
    """Weighted sum of the chosen SwiGLU experts; see `reference.expert_mlp` for shapes.

    Raises:
        ValueError: If the backend is unknown, or cannot run here.
    """
    rows, weights, gate_up, down = tensors = lowered(hidden, weights, gate_up, down)
    run = _implementation("expert_mlp", backend, tensors)
    return run(rows, weights, subset, gate_up, down).to(hidden.dtype)


def head_attention(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention in which each token uses a subset of the heads; see `reference.head_attention` for shapes.

    Raises:
        ValueError: If the backend is unknown, or cannot run here.
    """
    tensors = lowered(hidden, weights, query_weight, keys, values, output_weight)
    run = _implementation("head_attention", backend, tensors)
    rows, weights, *rest = tensors
    return run(rows, weights, subset, *rest, rotation).to(hidden.dtype)


def kept_head_attention(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    projection: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
    past: Sequence[Tensor],
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention in which only tokens that use a head are keys there; see `reference.kept_head_attention`.

    Raises:
        ValueError: If the backend is unknown, or cannot run here; `triton` has no such op.
    """
    rows, weights, projection, output_weight, *past = tensors = lowered(
        hidden, weights, projection, output_weight, *past
    )
    run = _implementation("kept_head_attention", backend, tensors)
    update, kept = run(rows, weights, subset, projection, output_weight, rotation, past)
    return update.to(hidden.dtype), kept


def _implementation(op: str, backend: Backend, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if backend == "auto":
        backend = _choose(op, tensors[0].device.type, wants_gradient, _suits_triton(op, tensors))
        if (op, backend) == ("head_attention", "compact"):
            return compact.cheapest_head_attention
    if backend == "triton":
        return _triton(op)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "compact" and wants_gradient:
        raise ValueError("backend must be 'reference' or 'triton' where a gradient is wanted, got 'compact'")
    return getattr(reference if backend == "reference" else compact, op)


def _suits_triton(op: str, tensors: tuple[Tensor, ...]) -> bool:
    """Whether there are GPU kernels that take such dtypes and sizes."""
    if op == "kept_head_attention":
        return False
    if len({tensor.dtype for tensor in tensors}) > 1 or tensors[0].dtype not in DTYPES:
        return False
    if op == "expert_mlp":
        return True
    num_heads, _, head_size = tensors[2].shape
    return num_heads <= MAX_HEADS and head_size <= MAX_HEAD_SIZE and head_size % 2 == 0


@cache
def _choose(op: str, device: str, wants_gradient: bool, suits_triton: bool) -> Backend:
    """What `auto` means; cached, so each choice is logged once."""
    choice: Backend = "reference" if wants_gradient else "compact"
    if device == "cuda" and suits_triton and _has_triton():
        choice = "triton"
    logger.info("%s on %s%s: %s kernels", op, device, " with gradients" if wants_gradient else "", choice)
    return choice


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _triton(op: str) -> Callable[..., Tensor]:
    """Imported on first use: everything else works without Triton."""
    if op == "kept_head_attention":
        raise ValueError("backend must be 'auto', 'reference' or 'compact' for kept_head_attention, got 'triton'")
    if not _has_triton():
        raise ValueError("backend 'triton' must have Triton installed (pip install triton), got none")
    from moe_backbone.kernels import triton_experts, triton_heads

    ops: dict[str, Callable[..., Tensor]] = {
        "expert_mlp": triton_experts.expert_mlp,
        "head_attention": triton_heads.head_attention,
    }
    return ops[op]

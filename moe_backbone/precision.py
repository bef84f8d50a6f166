"""Autocast: products in 16 bits beside weights, optimiser, normalisation, gates and losses in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_backbone.checks import require

Precision = Literal["fp32", "bf16", "fp16"]
"""Type of the products of a forward pass, and of their gradients. Weights and the optimiser's state are float32 under
each. `fp16` also scales the loss, as its gradients would underflow (arXiv:1710.03740)."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def require_precision(precision: str) -> None:
    """Refuse an unknown precision.

    Raises:
        ValueError: If it is.
    """
    known = get_args(Precision)
    require(precision in known, f"precision must be one of {', '.join(known)}, got {precision!r}")


def autocast(precision: Precision, device: torch.device | str) -> AbstractContextManager[object]:
    """Run products in this precision meanwhile; nothing for `fp32`.

    No cast weights are kept: a weight is used once in a forward pass, may change before the next, and a CUDA graph
    must record the cast.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=DTYPES[precision], cache_enabled=False)


def loss_scaler(precision: Precision, device: torch.device | str) -> torch.amp.GradScaler:
    """Scales the loss under `fp16`, on a CPU too; passes everything through otherwise."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Suspend autocast meanwhile, where it is on: a gate's choice should not hang on 8 bits (arXiv:2101.03961, 2.4)."""
    return torch.autocast(device.type, enabled=False) if is_lowered(device) else nullcontext()


def is_lowered(device: torch.device) -> bool:
    """Whether products on `device` are to run in 16 bits now."""
    return torch.is_autocast_enabled(device.type)


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Operands in the type that autocast wants now; as they are where it is off. Gradients come back as they were."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)

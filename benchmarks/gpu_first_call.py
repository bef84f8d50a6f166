"""How long the first call takes, the import of Triton included: run in a process of its own."""

from __future__ import annotations

import time

import torch

from benchmarks.experts import Sizes
from benchmarks.gpu_rivals import draw
from moe_backbone.kernels import expert_mlp


def first_call(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the first forward in this process; the device has been woken before."""
    inputs = draw(sizes, device, dtype, any_subset=True)
    inputs.subset.sum().item()
    started = time.perf_counter()
    expert_mlp(*inputs, backend="triton").sum().item()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(first_call(Sizes(num_tokens=4096), torch.device("cuda"), torch.bfloat16))

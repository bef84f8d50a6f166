"""What the ahead-of-time compile gate builds of the head kernels and of combine: every launch shape of `head_tile`."""

from __future__ import annotations

import torch
from compile_gate import CompileCase, recorded_cases
from torch import Tensor

from moe_backbone.kernels.triton_heads_forward import forward, head_tile

HIDDEN_SIZE, NUM_KEYS = 768, 4096
SIZES = [
    # num_queries, num_heads, head_size, dtype; one query decodes, 24 is no power of two
    (1, 12, 128, torch.bfloat16),
    (32, 12, 64, torch.bfloat16),
    (64, 64, 128, torch.bfloat16),
    (64, 12, 64, torch.float16),
    (64, 1, 24, torch.bfloat16),
    (512, 12, 128, torch.bfloat16),
    (512, 32, 64, torch.bfloat16),
    (1, 12, 128, torch.float32),
    (64, 12, 128, torch.float32),
    (64, 12, 16, torch.float32),
]


def compile_cases() -> list[CompileCase]:
    """Every kernel of a forward pass, at sizes that between them use every tile."""
    return [case for sizes in SIZES for case in _forward_cases(*sizes)]


def _forward_cases(num_queries: int, num_heads: int, head_size: int, dtype: torch.dtype) -> list[CompileCase]:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    keys = meta(2, NUM_KEYS, num_heads, head_size).transpose(1, 2)
    wide = dtype != torch.float32 and head_tile(num_queries, dtype).block_rows >= 64
    return recorded_cases(
        f"heads {num_queries}x{num_heads}x{head_size} {dtype}",
        lambda: forward(
            meta(2, num_queries, HIDDEN_SIZE),
            meta(2, num_queries, num_heads),
            meta(2, num_queries, num_heads, dtype=torch.bool),
            meta(num_heads, HIDDEN_SIZE, head_size),
            keys,
            keys,
            meta(num_heads, head_size, HIDDEN_SIZE),
            meta(2, num_queries, head_size // 2),
        ),
        lambda kernel: wide and kernel == "_attention_kernel",
    )

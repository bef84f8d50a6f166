"""What the expert op launches, for the compile gate: forward and backward in every shape of tile."""

from __future__ import annotations

import torch
from compile_gate import CompileCase, recorded_cases
from torch import Tensor

from moe_backbone.kernels.tiles import tile_heights
from moe_backbone.kernels.triton_experts_backward import backward
from moe_backbone.kernels.triton_experts_forward import forward
from moe_backbone.kernels.triton_plan import plan_routing

NUM_TOKENS, NUM_EXPERTS = 4096, 16
EVEN_SIZES, ODD_SIZES = (1024, 512), (1000, 300)
MANY_EXPERTS = 256
MATRIX_KERNELS = {"_activate_kernel", "_project_kernel", "_inner_gradient_kernel", "_expert_gradient_kernel"}


def compile_cases() -> list[CompileCase]:
    """All tiles of bfloat16 at sizes that need no masks; the tallest of both types at sizes that do; many experts."""
    cases = []
    for block_rows in tile_heights(torch.bfloat16):
        cases += _cases(torch.bfloat16, block_rows, *EVEN_SIZES)
    for dtype in (torch.bfloat16, torch.float32):
        cases += _cases(dtype, tile_heights(dtype)[-1], *ODD_SIZES)
    subset = torch.empty(NUM_TOKENS, MANY_EXPERTS, dtype=torch.bool, device="meta")
    return cases + recorded_cases(f"{MANY_EXPERTS} units", lambda: plan_routing(subset, 64), lambda kernel: False)


def _cases(dtype: torch.dtype, block_rows: int, hidden_size: int, intermediate_size: int) -> list[CompileCase]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def launch() -> None:
        subset = empty(NUM_TOKENS, NUM_EXPERTS, dtype=torch.bool)
        plan = plan_routing(subset, block_rows)
        inputs = (
            empty(NUM_TOKENS, hidden_size),
            empty(NUM_TOKENS, NUM_EXPERTS),
            empty(NUM_EXPERTS, hidden_size, 2 * intermediate_size),
            empty(NUM_EXPERTS, intermediate_size, hidden_size),
        )
        forward(plan, *inputs, save=False)
        _, pre_activations = forward(plan, *inputs, save=True)
        backward(plan, inputs[0], pre_activations, subset, *inputs, train_experts=True)

    def wants_wgmma(kernel: str) -> bool:
        # the tiles of an expert's gradient are cut from the widths, not from the rows
        tall = block_rows >= 64 or kernel == "_expert_gradient_kernel"
        return dtype == torch.bfloat16 and tall and kernel in MATRIX_KERNELS

    name = f"{str(dtype).removeprefix('torch.')} {block_rows} rows {hidden_size}x{intermediate_size}"
    return recorded_cases(name, launch, wants_wgmma)

"""Experts for any subset on a GPU: the op that PyTorch sees, its checks and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from moe_backbone.kernels.rows import record_rows
from moe_backbone.kernels.tiles import DTYPES, RowsHint, choose_block_rows, tile_heights
from moe_backbone.kernels.triton_experts_backward import backward
from moe_backbone.kernels.triton_experts_forward import forward
from moe_backbone.kernels.triton_plan import INTERPRETED, plan_routing

MAX_CAPACITY = 2**31 - 1  # rows are numbered in int32


_hints = WeakTensorKeyDictionary()  # RowsHint of each layer, by its `gate_up`


def expert_mlp(
    hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor, *, rows_per_unit: int | None = None
) -> Tensor:
    """Equal to `reference.expert_mlp`, in five launches whose work follows the subset and no value read by the host.

    The same inputs and tiles give the same bits, in the output and in every gradient. Scratch memory is sized for the
    largest subset: num_tokens * num_experts rows. Capture it in a CUDA graph only after `warmup`.

    Args:
        hidden: Token rows (num_tokens, hidden_size), bfloat16, float16 or float32.
        weights: Mixing weights (num_tokens, num_experts); read where `subset` is True. Same dtype as `hidden`.
        subset: Chosen experts, bool (num_tokens, num_experts).
        gate_up: (num_experts, hidden_size, 2 * intermediate_size). Same dtype as `hidden`.
        down: (num_experts, intermediate_size, hidden_size). Same dtype as `hidden`.
        rows_per_unit: Rows that an expert is expected to get: chooses the tiles. None for what the same `gate_up` got
            in an earlier call (see `RowsHint`), at first two experts a token.

    Returns:
        (num_tokens, hidden_size); a token with an empty subset gets zeros.

    Raises:
        ValueError: If shapes, dtypes or devices disagree, or the tensors lie where Triton cannot run.

    Example: one token, experts 0 and 2 chosen with weights .25 and .75, gives .25 * f0(x) + .75 * f2(x).
    """
    _check_shapes(hidden, weights, subset, gate_up, down)
    _check_types(hidden, weights, subset, gate_up, down)
    hint = None
    if rows_per_unit is None:
        hint = RowsHint(min(1.0, 2 / gate_up.shape[0]))
        if not torch.compiler.is_compiling():
            hint = _hints.setdefault(gate_up, hint)
        rows_per_unit = hint.rows_per_unit(hidden.shape[0])
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, weights, gate_up, down))
    block_rows = choose_block_rows(rows_per_unit, hidden.dtype)
    output, tokens_per_expert, _ = _expert_mlp(hidden, weights, subset, gate_up, down, block_rows, save)
    if not torch.compiler.is_compiling():
        record_rows("experts", tokens_per_expert)
        if hint is not None:
            hint.update(tokens_per_expert)
    return output


def warmup(
    hidden_size: int, intermediate_size: int, num_experts: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Compile every variant of the kernels that these sizes can need, so that no later call has to.

    Args:
        hidden_size: Token width.
        intermediate_size: Inner width of one expert.
        num_experts: Number of experts; their weights are allocated while this runs.
        dtype: Type of the hidden rows and the weights.
        device: Where the calls will run.
    """
    hidden = torch.zeros(1, hidden_size, dtype=dtype, device=device)
    weights = torch.zeros(1, num_experts, dtype=dtype, device=device)
    subset = torch.ones(1, num_experts, dtype=torch.bool, device=device)
    gate_up = torch.zeros(num_experts, hidden_size, 2 * intermediate_size, dtype=dtype, device=device)
    down = torch.zeros(num_experts, intermediate_size, hidden_size, dtype=dtype, device=device)
    for block_rows in tile_heights(dtype):
        for save in (False, True):
            *_, pre_activations = _expert_mlp(hidden, weights, subset, gate_up, down, block_rows, save)
        _expert_mlp_backward(hidden, pre_activations, hidden, weights, subset, gate_up, down, block_rows, True)


def _check_shapes(hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape (num_tokens, hidden_size), got {tuple(hidden.shape)}")
    if down.dim() != 3 or 0 in down.shape:
        rule = "(num_experts, intermediate_size, hidden_size), each at least 1"
        raise ValueError(f"down must have shape {rule}, got {tuple(down.shape)}")
    num_tokens, hidden_size = hidden.shape
    num_experts, intermediate_size, _ = down.shape
    for name, tensor, expected in (
        ("weights", weights, (num_tokens, num_experts)),
        ("subset", subset, (num_tokens, num_experts)),
        ("gate_up", gate_up, (num_experts, hidden_size, 2 * intermediate_size)),
        ("down", down, (num_experts, intermediate_size, hidden_size)),
    ):
        if tensor.shape != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    if num_tokens * num_experts > MAX_CAPACITY:
        raise ValueError(f"num_tokens * num_experts must lie in [0, {MAX_CAPACITY}], got {num_tokens * num_experts}")


def _check_types(hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be bfloat16, float16 or float32, got {hidden.dtype}")
    if subset.dtype != torch.bool:
        raise ValueError(f"subset must be bool, got {subset.dtype}")
    for name, tensor in (("weights", weights), ("gate_up", gate_up), ("down", down)):
        if tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    for name, tensor in (("weights", weights), ("subset", subset), ("gate_up", gate_up), ("down", down)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must lie on the device of hidden, {hidden.device}, got {tensor.device}")
    if INTERPRETED and hidden.dtype == torch.bfloat16:
        raise ValueError("hidden must be float16 or float32 under TRITON_INTERPRET=1, got torch.bfloat16")
    if not INTERPRETED and not hidden.is_cuda:
        raise ValueError(f"hidden must lie on a CUDA device unless TRITON_INTERPRET=1 is set, got {hidden.device}")


@torch.library.custom_op("routegym::expert_mlp", mutates_args=())
def _expert_mlp(
    hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor, block_rows: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, rows of each expert, and pre-activations (none unless `save`)."""
    with torch.cuda.device_of(hidden):
        plan = plan_routing(subset.contiguous(), block_rows)
        inputs = [tensor.contiguous() for tensor in (hidden, weights, gate_up, down)]
        output, pre_activations = forward(plan, *inputs, save=save)
    return output, plan.tokens_per_unit, pre_activations


@_expert_mlp.register_fake
def _(
    hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor, block_rows: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    capacity = subset.shape[0] * subset.shape[1] if save else 0
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(down.shape[0], dtype=torch.int32),
        hidden.new_empty(capacity, gate_up.shape[2]),
    )


@torch.library.custom_op("routegym::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    grad_output: Tensor,
    pre_activations: Tensor,
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    gate_up: Tensor,
    down: Tensor,
    block_rows: int,
    train_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weights, gate_up and down; the last two are empty unless `train_experts`."""
    with torch.cuda.device_of(hidden):
        subset = subset.contiguous()
        # two launches cost less than keeping the plan's tensors of capacity between forward and backward
        plan = plan_routing(subset, block_rows)
        inputs = [tensor.contiguous() for tensor in (hidden, weights, gate_up, down)]
        return backward(plan, grad_output.contiguous(), pre_activations, subset, *inputs, train_experts=train_experts)


@_expert_mlp_backward.register_fake
def _(
    grad_output: Tensor,
    pre_activations: Tensor,
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    gate_up: Tensor,
    down: Tensor,
    block_rows: int,
    train_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts = (gate_up.shape, down.shape) if train_experts else ((0,), (0,))
    shapes = (hidden.shape, weights.shape, *experts)
    first, second, third, fourth = (hidden.new_empty(shape) for shape in shapes)
    return first, second, third, fourth


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weights, subset, gate_up, down, ctx.block_rows, _ = inputs
    _, tokens_per_expert, pre_activations = output
    ctx.mark_non_differentiable(tokens_per_expert, pre_activations)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pre_activations, hidden, weights, subset, gate_up, down)


def _differentiate(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    train_experts = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    hidden, weights, gate_up, down = _expert_mlp_backward(
        grad_output, *ctx.saved_tensors, ctx.block_rows, train_experts
    )
    experts = (gate_up, down) if train_experts else (None, None)
    return hidden, weights, None, *experts, None, None


_expert_mlp.register_autograd(_differentiate, setup_context=_keep_for_backward)

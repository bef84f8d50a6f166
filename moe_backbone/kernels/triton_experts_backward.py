"""Backward of the experts: every sum has a fixed order, so equal inputs give equal bits; no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_backbone.kernels.tiles import num_programs, padded, tile_heights, tile_shape
from moe_backbone.kernels.triton_combine import combine
from moe_backbone.kernels.triton_experts_forward import load_tile, locate_tile, project
from moe_backbone.kernels.triton_plan import RoutingPlan, load_mask, mask_tile

# Letters behind names: R rows (capacity), T tokens, U units, D hidden_size, F intermediate_size, C column tiles.


def backward(
    plan: RoutingPlan,
    grad_output: Tensor,
    pre_activations: Tensor,
    subset: Tensor,
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    train_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`; the inner rows are rebuilt from the pre-activations.

    Args:
        plan: The forward's rows; its tiles may differ.
        grad_output: (num_tokens, hidden_size), contiguous.
        pre_activations: gate|up (capacity, 2 * intermediate_size), from the forward.
        subset: As in `reference.expert_mlp`, like the arguments that follow it; all contiguous.
        hidden: (num_tokens, hidden_size).
        weights: (num_tokens, num_experts).
        gate_up: (num_experts, hidden_size, 2 * intermediate_size).
        down: (num_experts, intermediate_size, hidden_size).
        train_experts: Whether the gradients of `gate_up` and `down` are wanted; they are empty otherwise.

    Returns:
        Gradients of hidden, weights, gate_up and down; zero for weights and experts that were not chosen.
    """
    grad_pre, inner, grad_weights = _inner_gradient(plan, grad_output, pre_activations, subset, weights, down)
    grad_hidden = combine(project(plan, grad_pre, gate_up, transposed=True), plan.token_rows, plan.token_counts)
    if not train_experts:
        return grad_hidden, grad_weights, gate_up.new_empty(0), down.new_empty(0)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    _expert_gradient(plan, hidden, grad_pre, grad_gate_up, left_by_token=True)
    _expert_gradient(plan, inner, grad_output, grad_down, left_by_token=False)
    return grad_hidden, grad_weights, grad_gate_up, grad_down


def _inner_gradient(
    plan: RoutingPlan, grad_output: Tensor, pre_activations: Tensor, subset: Tensor, weights: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations, the inner rows themselves, gradients of the mixing weights."""
    num_units, intermediate_size, hidden_size = down.shape
    shape = tile_shape(plan.block_rows, hidden_size, intermediate_size, down.dtype, tiles_held=3)
    column_tiles = triton.cdiv(intermediate_size, shape.block_cols)
    grad_pre = torch.empty_like(pre_activations)
    inner = pre_activations.new_empty(pre_activations.shape[0], intermediate_size)
    partial_sums = inner.new_empty(inner.shape[0], column_tiles, dtype=torch.float32)
    programs = num_programs(plan.tile_units.shape[0] * column_tiles, shape.programs_per_sm, down.device)
    _inner_gradient_kernel[(programs,)](
        grad_output,
        weights,
        down,
        pre_activations,
        plan.row_tokens,
        plan.unit_offsets,
        plan.tile_units,
        plan.tile_starts,
        plan.num_tiles,
        grad_pre,
        inner,
        partial_sums,
        NUM_UNITS=num_units,
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE_SIZE=intermediate_size,
        **shape.launch_options,
    )
    grad_weights = torch.empty_like(weights)
    tile = mask_tile(num_units)
    _mixing_gradient_kernel[(triton.cdiv(len(weights), tile["TOKENS"]),)](
        subset.view(torch.uint8),
        plan.token_rows,
        partial_sums,
        grad_weights,
        len(weights),
        COLUMN_TILES=column_tiles,
        **tile,
    )
    return grad_pre, inner, grad_weights


def _expert_gradient(plan: RoutingPlan, left: Tensor, right: Tensor, output: Tensor, *, left_by_token: bool) -> None:
    """Write left^T @ right over the rows of each unit into `output` (num_units, left width, right width).

    Args:
        plan: Which rows belong to which unit.
        left: Rows (capacity, left width), or tokens (num_tokens, left width) if `left_by_token`.
        right: Tokens (num_tokens, right width), or rows (capacity, right width) if `left_by_token`.
        output: Written whole; zeros for a unit without rows.
        left_by_token: Which of the two lies in token order.
    """
    num_units, left_width, right_width = output.shape
    height = min(tile_heights(left.dtype)[-1], padded(left_width))
    shape = tile_shape(height, plan.block_rows, right_width, left.dtype)
    tiles = triton.cdiv(left_width, shape.block_rows) * triton.cdiv(right_width, shape.block_cols)
    _expert_gradient_kernel[(tiles, num_units)](
        left,
        right,
        plan.row_tokens,
        plan.unit_offsets,
        output,
        LEFT_WIDTH=left_width,
        RIGHT_WIDTH=right_width,
        LEFT_BY_TOKEN=left_by_token,
        **shape.launch_options,
    )


@triton.jit
def _inner_gradient_kernel(
    grad_output_TD: tl.tensor,
    weights_TU: tl.tensor,
    down_UFD: tl.tensor,
    pre_activations_RF: tl.tensor,
    row_tokens_R: tl.tensor,
    unit_offsets_U: tl.tensor,
    tile_units: tl.tensor,
    tile_starts: tl.tensor,
    num_tiles: tl.tensor,
    grad_pre_RF: tl.tensor,
    inner_RF: tl.tensor,
    partial_sums_RC: tl.tensor,
    NUM_UNITS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
) -> None:
    """Go back through the down projection and the activation.

    With s = sigmoid(gate), silu = gate * s and g = grad_output @ down^T: inner = weight * silu * up, its weight gets
    sum(g * silu * up), gate gets g * weight * up * (s + silu * (1 - s)) and up gets g * weight * silu.

    Example: gate 0, up 3, weight .5 and g 1 give inner 0, a sum of 0, .75 for gate and 0 for up.
    """
    WIDTH: tl.constexpr = 2 * INTERMEDIATE_SIZE
    COLUMN_TILES: tl.constexpr = (INTERMEDIATE_SIZE + BLOCK_COLS - 1) // BLOCK_COLS
    UNEVEN_DEPTH: tl.constexpr = HIDDEN_SIZE % BLOCK_DEPTH != 0
    UNEVEN_COLS: tl.constexpr = INTERMEDIATE_SIZE % BLOCK_COLS != 0
    dtype: tl.constexpr = inner_RF.dtype.element_ty
    for item in range(tl.program_id(0), tl.load(num_tiles) * COLUMN_TILES, tl.num_programs(0)):
        tile = item // COLUMN_TILES
        unit, first, row, owned = locate_tile(tile, unit_offsets_U, tile_units, tile_starts, BLOCK_ROWS)
        token = tl.load(row_tokens_R + first + row).to(tl.int64)
        column_tile = item % COLUMN_TILES
        col = column_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        matrix_DF = down_UFD + unit * INTERMEDIATE_SIZE * HIDDEN_SIZE + col[None, :] * HIDDEN_SIZE
        grad = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(0, HIDDEN_SIZE, BLOCK_DEPTH):
            depth = start + tl.arange(0, BLOCK_DEPTH)
            pointers = grad_output_TD + token[:, None] * HIDDEN_SIZE + depth[None, :]
            left = load_tile(pointers, (depth < HIDDEN_SIZE)[None, :], UNEVEN_DEPTH)
            inside = (depth < HIDDEN_SIZE)[:, None] & (col < INTERMEDIATE_SIZE)[None, :]
            right = load_tile(matrix_DF + depth[:, None], inside, UNEVEN_DEPTH or UNEVEN_COLS)
            grad = tl.dot(left, right, grad, input_precision="ieee")
        offsets = row[:, None] * WIDTH + col[None, :]
        gate_RF = pre_activations_RF + first * WIDTH
        grad_gate_RF = grad_pre_RF + first * WIDTH
        inside = (col < INTERMEDIATE_SIZE)[None, :]
        gate = load_tile(gate_RF + offsets, inside, UNEVEN_COLS).to(tl.float32)
        weight = tl.load(weights_TU + token * NUM_UNITS + unit).to(tl.float32)[:, None]
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        owned_inside = owned[:, None] & inside
        tl.store(grad_gate_RF + INTERMEDIATE_SIZE + offsets, (grad * weight * silu).to(dtype), mask=owned_inside)
        # loaded here and not beside gate: the largest tiles spill registers otherwise
        up = load_tile(gate_RF + INTERMEDIATE_SIZE + offsets, inside, UNEVEN_COLS).to(tl.float32)
        tl.store(partial_sums_RC + (first + row) * COLUMN_TILES + column_tile, tl.sum(grad * silu * up, 1), mask=owned)
        up *= weight
        pointers = inner_RF + first * INTERMEDIATE_SIZE + (row[:, None] * INTERMEDIATE_SIZE + col[None, :])
        tl.store(pointers, (silu * up).to(dtype), mask=owned_inside)
        grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_gate_RF + offsets, grad_gate.to(dtype), mask=owned_inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _mixing_gradient_kernel(
    mask_TU: tl.tensor,
    token_rows_TU: tl.tensor,
    partial_sums_RC: tl.tensor,
    grad_weights_TU: tl.tensor,
    num_tokens: tl.tensor,
    NUM_UNITS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Bring each row's sum to its place (token, unit); zeros where the unit was not chosen.

    Example: mask [[0, 1], [1, 1]], token_rows [[1], [0, 2]] and sums [5, 6, 7] of the rows give [[0, 6], [5, 7]].
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    listed = tl.zeros((TOKENS,), tl.int32)  # rows of each token in the units so far
    for first_unit in range(0, NUM_UNITS, UNITS):
        unit = first_unit + tl.arange(0, UNITS)
        chosen = load_mask(mask_TU, token, unit, num_tokens, NUM_UNITS)
        slot = listed[:, None] + tl.cumsum(chosen, 1) - chosen
        listed += tl.sum(chosen, 1)
        row = tl.load(token_rows_TU + token[:, None] * NUM_UNITS + slot, mask=chosen != 0, other=0).to(tl.int64)
        total = tl.zeros((TOKENS, UNITS), tl.float32)
        for column_tile in range(COLUMN_TILES):
            total += tl.load(partial_sums_RC + row * COLUMN_TILES + column_tile, mask=chosen != 0, other=0.0)
        inside = (token < num_tokens)[:, None] & (unit < NUM_UNITS)[None, :]
        pointers = grad_weights_TU + token[:, None] * NUM_UNITS + unit[None, :]
        tl.store(pointers, total.to(grad_weights_TU.dtype.element_ty), mask=inside)


@triton.jit
def _expert_gradient_kernel(
    left: tl.tensor,
    right: tl.tensor,
    row_tokens_R: tl.tensor,
    unit_offsets_U: tl.tensor,
    output_ULR: tl.tensor,
    LEFT_WIDTH: tl.constexpr,
    RIGHT_WIDTH: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
) -> None:
    """One tile of left^T @ right over the rows of one unit; zeros for a unit without rows.

    Example: rows 0 and 1 of a unit with left [[1], [2]] and right [[10], [100]] give [[210]].
    """
    COLUMN_TILES: tl.constexpr = (RIGHT_WIDTH + BLOCK_COLS - 1) // BLOCK_COLS
    unit = tl.program_id(1).to(tl.int64)
    left_col = tl.program_id(0) // COLUMN_TILES * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    right_col = tl.program_id(0) % COLUMN_TILES * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    left_inside, right_inside = (left_col < LEFT_WIDTH)[None, :], (right_col < RIGHT_WIDTH)[None, :]
    end = tl.load(unit_offsets_U + unit + 1)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(tl.load(unit_offsets_U + unit), end, BLOCK_DEPTH):
        slot = start + tl.arange(0, BLOCK_DEPTH)
        owned = (slot < end)[:, None]
        row = slot.to(tl.int64)  # row * width passes 2**31
        token = tl.load(row_tokens_R + slot, mask=slot < end, other=0).to(tl.int64)
        left_row = token if LEFT_BY_TOKEN else row
        right_row = row if LEFT_BY_TOKEN else token
        pointers = left + left_row[:, None] * LEFT_WIDTH + left_col[None, :]
        left_tile = tl.load(pointers, mask=owned & left_inside, other=0.0)
        pointers = right + right_row[:, None] * RIGHT_WIDTH + right_col[None, :]
        right_tile = tl.load(pointers, mask=owned & right_inside, other=0.0)
        total = tl.dot(tl.trans(left_tile), right_tile, total, input_precision="ieee")
    pointers = output_ULR + (unit * LEFT_WIDTH + left_col[:, None]) * RIGHT_WIDTH + right_col[None, :]
    inside = (left_col < LEFT_WIDTH)[:, None] & right_inside
    tl.store(pointers, total.to(output_ULR.dtype.element_ty), mask=inside)

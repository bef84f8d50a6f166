"""Forward of the experts: gather and both inner projections in one launch, the way back in another, then combine."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_backbone.kernels.tiles import num_programs, tile_shape
from moe_backbone.kernels.triton_combine import combine
from moe_backbone.kernels.triton_plan import RoutingPlan

# Letters behind names: R rows (capacity), T tokens, U units, D hidden_size, F intermediate_size.


def forward(
    plan: RoutingPlan, hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *, save: bool
) -> tuple[Tensor, Tensor]:
    """Run the experts that `plan` lists; arguments as in `reference.expert_mlp`, contiguous.

    Returns:
        Output (num_tokens, hidden_size), and the pre-activations (capacity, 2 * intermediate_size) that the backward
        needs, gate|up side by side, or no rows of them unless `save`.
    """
    num_units, intermediate_size, hidden_size = down.shape
    capacity = plan.row_tokens.shape[0]
    inner = hidden.new_empty(capacity, intermediate_size)
    pre_activations = hidden.new_empty(capacity if save else 0, 2 * intermediate_size)
    shape = tile_shape(plan.block_rows, hidden_size, intermediate_size, hidden.dtype, tiles_held=2)
    max_items = plan.tile_units.shape[0] * triton.cdiv(intermediate_size, shape.block_cols)
    _activate_kernel[(num_programs(max_items, shape.programs_per_sm, hidden.device),)](
        hidden,
        weights,
        gate_up,
        plan.row_tokens,
        plan.unit_offsets,
        plan.tile_units,
        plan.tile_starts,
        plan.num_tiles,
        inner,
        pre_activations,
        NUM_UNITS=num_units,
        HIDDEN_SIZE=hidden_size,
        INTERMEDIATE_SIZE=intermediate_size,
        SAVE=save,
        **shape.launch_options,
    )
    rows = project(plan, inner, down, transposed=False)
    return combine(rows, plan.token_rows, plan.token_counts), pre_activations


def project(plan: RoutingPlan, rows: Tensor, matrices: Tensor, *, transposed: bool) -> Tensor:
    """Multiply each row by its unit's matrix.

    Args:
        plan: Which rows belong to which unit.
        rows: (capacity, depth), contiguous.
        matrices: (num_units, depth, columns), contiguous; (num_units, columns, depth) if `transposed`.
        transposed: Whether the matrices lie transposed.

    Returns:
        (capacity, columns); what lies behind the last row is uninitialised.
    """
    columns, depth = matrices.shape[1:] if transposed else (matrices.shape[2], matrices.shape[1])
    shape = tile_shape(plan.block_rows, depth, columns, rows.dtype)
    output = rows.new_empty(rows.shape[0], columns)
    max_items = plan.tile_units.shape[0] * triton.cdiv(columns, shape.block_cols)
    _project_kernel[(num_programs(max_items, shape.programs_per_sm, rows.device),)](
        rows,
        matrices,
        plan.unit_offsets,
        plan.tile_units,
        plan.tile_starts,
        plan.num_tiles,
        output,
        DEPTH=depth,
        COLUMNS=columns,
        TRANSPOSED=transposed,
        **shape.launch_options,
    )
    return output


@triton.jit
def load_tile(pointers: tl.tensor, inside: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """Load a tile, with zeros outside; without a mask where the sizes leave nothing outside."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def locate_tile(
    tile: tl.tensor,
    unit_offsets_U: tl.tensor,
    tile_units: tl.tensor,
    tile_starts: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
) -> tl.tensor:
    """Unit and first row of a tile (int64: row * width passes 2**31), rows counted from there, and which are its own.

    Past the end of the unit the last row is repeated, so that every row read has been written; it is stored once.
    """
    unit = tl.load(tile_units + tile).to(tl.int64)
    first = tl.load(tile_starts + tile).to(tl.int64)
    length = (tl.load(unit_offsets_U + unit + 1) - first).to(tl.int32)
    row = tl.arange(0, BLOCK_ROWS)
    return unit, first, tl.minimum(row, length - 1), row < length


@triton.jit
def _activate_kernel(
    hidden_TD: tl.tensor,
    weights_TU: tl.tensor,
    gate_up_UDF: tl.tensor,
    row_tokens_R: tl.tensor,
    unit_offsets_U: tl.tensor,
    tile_units: tl.tensor,
    tile_starts: tl.tensor,
    num_tiles: tl.tensor,
    inner_RF: tl.tensor,
    pre_activations_RF: tl.tensor,
    NUM_UNITS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE_SIZE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
) -> None:
    """Compute inner = weight * silu(hidden @ gate) * (hidden @ up), one (row tile, column tile) after the other.

    Example: a row with gate 0 and up 3 gives inner 0; gate 10, up 3 and weight .5 give 15 (silu(10) is 9.9995).
    """
    WIDTH: tl.constexpr = 2 * INTERMEDIATE_SIZE
    COLUMN_TILES: tl.constexpr = (INTERMEDIATE_SIZE + BLOCK_COLS - 1) // BLOCK_COLS
    UNEVEN_DEPTH: tl.constexpr = HIDDEN_SIZE % BLOCK_DEPTH != 0
    UNEVEN: tl.constexpr = UNEVEN_DEPTH or INTERMEDIATE_SIZE % BLOCK_COLS != 0
    for item in range(tl.program_id(0), tl.load(num_tiles) * COLUMN_TILES, tl.num_programs(0)):
        tile = item // COLUMN_TILES
        unit, first, row, owned = locate_tile(tile, unit_offsets_U, tile_units, tile_starts, BLOCK_ROWS)
        token = tl.load(row_tokens_R + first + row).to(tl.int64)
        col = item % COLUMN_TILES * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        matrix_DF = gate_up_UDF + unit * HIDDEN_SIZE * WIDTH + col[None, :]
        gate = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        up = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(0, HIDDEN_SIZE, BLOCK_DEPTH):
            depth = start + tl.arange(0, BLOCK_DEPTH)
            inside = (depth < HIDDEN_SIZE)[:, None] & (col < INTERMEDIATE_SIZE)[None, :]
            pointers = hidden_TD + token[:, None] * HIDDEN_SIZE + depth[None, :]
            tokens = load_tile(pointers, (depth < HIDDEN_SIZE)[None, :], UNEVEN_DEPTH)
            pointers = matrix_DF + depth[:, None] * WIDTH
            gate = tl.dot(tokens, load_tile(pointers, inside, UNEVEN), gate, input_precision="ieee")
            up = tl.dot(tokens, load_tile(pointers + INTERMEDIATE_SIZE, inside, UNEVEN), up, input_precision="ieee")
        inside = owned[:, None] & (col < INTERMEDIATE_SIZE)[None, :]
        dtype: tl.constexpr = inner_RF.dtype.element_ty
        gate_RF = pre_activations_RF + first * WIDTH
        offsets = row[:, None] * WIDTH + col[None, :]
        weight = tl.load(weights_TU + token * NUM_UNITS + unit).to(tl.float32)
        if SAVE:
            tl.store(gate_RF + INTERMEDIATE_SIZE + offsets, up.to(dtype), mask=inside)
        up *= weight[:, None]  # between the stores: after both of them, the largest tiles spill registers
        if SAVE:
            tl.store(gate_RF + offsets, gate.to(dtype), mask=inside)
        inner = gate * tl.sigmoid(gate) * up
        pointers = inner_RF + first * INTERMEDIATE_SIZE + (row[:, None] * INTERMEDIATE_SIZE + col[None, :])
        tl.store(pointers, inner.to(dtype), mask=inside)


@triton.jit
def _project_kernel(
    rows_RF: tl.tensor,
    matrices_UFD: tl.tensor,
    unit_offsets_U: tl.tensor,
    tile_units: tl.tensor,
    tile_starts: tl.tensor,
    num_tiles: tl.tensor,
    output_RD: tl.tensor,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
) -> None:
    """Compute output = rows @ matrix of the rows' unit, one (row tile, column tile) after the other.

    Example: rows [[1], [2], [3]], the last of unit 1, and matrices [[[10]], [[100]]] give [[10], [20], [300]].
    """
    COLUMN_TILES: tl.constexpr = (COLUMNS + BLOCK_COLS - 1) // BLOCK_COLS
    UNEVEN_DEPTH: tl.constexpr = DEPTH % BLOCK_DEPTH != 0
    UNEVEN: tl.constexpr = UNEVEN_DEPTH or COLUMNS % BLOCK_COLS != 0
    DEPTH_STRIDE: tl.constexpr = 1 if TRANSPOSED else COLUMNS
    COLUMN_STRIDE: tl.constexpr = DEPTH if TRANSPOSED else 1
    for item in range(tl.program_id(0), tl.load(num_tiles) * COLUMN_TILES, tl.num_programs(0)):
        tile = item // COLUMN_TILES
        unit, first, row, owned = locate_tile(tile, unit_offsets_U, tile_units, tile_starts, BLOCK_ROWS)
        col = item % COLUMN_TILES * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        matrix_FD = matrices_UFD + unit * DEPTH * COLUMNS + col[None, :] * COLUMN_STRIDE
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(0, DEPTH, BLOCK_DEPTH):
            depth = start + tl.arange(0, BLOCK_DEPTH)
            pointers = rows_RF + first * DEPTH + (row[:, None] * DEPTH + depth[None, :])
            left = load_tile(pointers, (depth < DEPTH)[None, :], UNEVEN_DEPTH)
            inside = (depth < DEPTH)[:, None] & (col < COLUMNS)[None, :]
            right = load_tile(matrix_FD + depth[:, None] * DEPTH_STRIDE, inside, UNEVEN)
            total = tl.dot(left, right, total, input_precision="ieee")
        pointers = output_RD + first * COLUMNS + (row[:, None] * COLUMNS + col[None, :])
        inside = owned[:, None] & (col < COLUMNS)[None, :]
        tl.store(pointers, total.to(output_RD.dtype.element_ty), mask=inside)

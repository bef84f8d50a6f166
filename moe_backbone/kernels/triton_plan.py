"""Routing plan from a mask in two launches: no sort, no atomics, no value read by the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels were decorated for Triton's interpreter, which runs them on the CPU."""

TOKENS, MAX_UNITS = 128, 32  # the part of the mask that one program holds in registers
COUNTS_TILE_SIZE = 4096  # counts of earlier tiles in one load


@dataclass(frozen=True, kw_only=True)
class RoutingPlan:
    """Where each chosen (token, unit) pair has its row. All tensors int32; capacity = num_tokens * num_units.

    Rows are sorted by unit, inside a unit by token. What lies behind a count is uninitialised.
    """

    block_rows: int
    """Most rows of one tile."""

    tokens_per_unit: Tensor
    """Rows of each unit (num_units,)."""

    unit_offsets: Tensor
    """First row of each unit, then the number of rows (num_units + 1,)."""

    row_tokens: Tensor
    """Token of each row (capacity,); the first `unit_offsets[-1]` entries count."""

    token_rows: Tensor
    """Rows of each token by ascending unit (num_tokens, num_units); the first `token_counts[token]` entries count."""

    token_counts: Tensor
    """Number of units of each token (num_tokens,)."""

    tile_units: Tensor
    """Unit of each tile (max_tiles,); the first `num_tiles` entries count."""

    tile_starts: Tensor
    """First row of each tile (max_tiles,); it ends after `block_rows` rows or with its unit."""

    num_tiles: Tensor
    """Number of tiles (1,)."""


def plan_routing(subset: Tensor, block_rows: int) -> RoutingPlan:
    """Give every chosen (token, unit) pair a row, and cut each unit's rows into tiles.

    Args:
        subset: Chosen units, bool (num_tokens, num_units), contiguous.
        block_rows: Most rows of one tile.

    Example: subset [[1, 0], [1, 1], [0, 0]] in tiles of 16 rows gives tokens_per_unit [2, 1], unit_offsets [0, 2, 3],
        row_tokens [0, 1, 1], token_rows [[0], [1, 2], []], token_counts [1, 2, 0], tile_units [0, 1],
        tile_starts [0, 2] and num_tiles 2.
    """
    num_tokens, num_units = subset.shape
    tile = mask_tile(num_units)
    num_token_tiles = max(1, triton.cdiv(num_tokens, tile["TOKENS"]))
    max_tiles = num_units * triton.cdiv(num_tokens, block_rows)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=subset.device)

    plan = RoutingPlan(
        block_rows=block_rows,
        tokens_per_unit=empty(num_units),
        unit_offsets=empty(num_units + 1),
        row_tokens=empty(num_tokens * num_units),
        token_rows=empty(num_tokens, num_units),
        token_counts=empty(num_tokens),
        tile_units=empty(max_tiles),
        tile_starts=empty(max_tiles),
        num_tiles=empty(1),
    )
    mask, tile_counts = subset.view(torch.uint8), empty(num_token_tiles, num_units)
    _count_kernel[(num_token_tiles,)](mask, tile_counts, num_tokens, **tile)
    _fill_kernel[(num_token_tiles,)](
        mask,
        tile_counts,
        num_tokens,
        num_token_tiles,
        plan.tokens_per_unit,
        plan.unit_offsets,
        plan.row_tokens,
        plan.token_rows,
        plan.token_counts,
        plan.tile_units,
        plan.tile_starts,
        plan.num_tiles,
        BLOCK_ROWS=block_rows,
        TILES=COUNTS_TILE_SIZE // tile["UNITS"],
        **tile,
    )
    return plan


def mask_tile(num_units: int) -> dict[str, int]:
    """Launch constants of a kernel that walks over the units of a tile of tokens, a block of units at a time.

    Example: 5 units give one block of 8, 256 units give 8 blocks of 32.
    """
    units = min(MAX_UNITS, triton.next_power_of_2(num_units))
    return {"NUM_UNITS": num_units, "UNITS": units, "TOKENS": TOKENS, "num_warps": 8}


@triton.jit
def load_mask(
    mask: tl.tensor, token: tl.tensor, unit: tl.tensor, num_tokens: tl.tensor, NUM_UNITS: tl.constexpr
) -> tl.tensor:
    """Chosen units of a tile of tokens, int32 0 or 1 (TOKENS, UNITS); zeros outside the mask."""
    inside = (token < num_tokens)[:, None] & (unit < NUM_UNITS)[None, :]
    chosen = tl.load(mask + token[:, None] * NUM_UNITS + unit[None, :], mask=inside, other=0)
    return (chosen != 0).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens"])
def _count_kernel(
    mask: tl.tensor,
    tile_counts: tl.tensor,
    num_tokens: tl.tensor,
    NUM_UNITS: tl.constexpr,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Rows of each unit within one tile of tokens.

    Example: mask [[1, 0], [1, 1], [0, 0]] in one tile gives tile_counts [[2, 1]].
    """
    tile = tl.program_id(0)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    for first_unit in range(0, NUM_UNITS, UNITS):
        unit = first_unit + tl.arange(0, UNITS)
        chosen = load_mask(mask, token, unit, num_tokens, NUM_UNITS)
        tl.store(tile_counts + tile * NUM_UNITS + unit, tl.sum(chosen, 0), mask=unit < NUM_UNITS)


@triton.jit(do_not_specialize=["num_tokens", "num_token_tiles"])
def _fill_kernel(
    mask: tl.tensor,
    tile_counts: tl.tensor,
    num_tokens: tl.tensor,
    num_token_tiles: tl.tensor,
    tokens_per_unit: tl.tensor,
    unit_offsets: tl.tensor,
    row_tokens: tl.tensor,
    token_rows: tl.tensor,
    token_counts: tl.tensor,
    tile_units: tl.tensor,
    tile_starts: tl.tensor,
    num_tiles: tl.tensor,
    NUM_UNITS: tl.constexpr,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Entries of the plan that belong to one tile of tokens; the first program writes those of the units.

    Example: see `plan_routing`.
    """
    program = tl.program_id(0)
    token = program * TOKENS + tl.arange(0, TOKENS)
    listed = tl.zeros((TOKENS,), tl.int32)  # rows of each token in the units so far
    first_row = 0
    first_tile = 0
    for first_unit in range(0, NUM_UNITS, UNITS):
        unit = first_unit + tl.arange(0, UNITS)
        total = tl.zeros((UNITS,), tl.int32)
        before = tl.zeros((UNITS,), tl.int32)  # rows of the token tiles before this one
        for start in range(0, num_token_tiles, TILES):
            tile = start + tl.arange(0, TILES)
            inside = (tile < num_token_tiles)[:, None] & (unit < NUM_UNITS)[None, :]
            counts = tl.load(tile_counts + tile[:, None] * NUM_UNITS + unit[None, :], mask=inside, other=0)
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where((tile < program)[:, None], counts, 0), 0)
        unit_start = first_row + tl.cumsum(total, 0) - total
        tiles = (total + BLOCK_ROWS - 1) // BLOCK_ROWS
        unit_tile = first_tile + tl.cumsum(tiles, 0) - tiles
        if program == 0:
            tl.store(tokens_per_unit + unit, total, mask=unit < NUM_UNITS)
            tl.store(unit_offsets + unit, unit_start, mask=unit < NUM_UNITS)
        first_row += tl.sum(total, 0)
        first_tile += tl.sum(tiles, 0)

        chosen = load_mask(mask, token, unit, num_tokens, NUM_UNITS)
        rank = before[None, :] + tl.cumsum(chosen, 0) - chosen  # place of the row inside its unit
        row = unit_start[None, :] + rank
        tl.store(row_tokens + row, tl.broadcast_to(token[:, None], (TOKENS, UNITS)), mask=chosen != 0)
        slot = listed[:, None] + tl.cumsum(chosen, 1) - chosen
        listed += tl.sum(chosen, 1)
        tl.store(token_rows + token[:, None] * NUM_UNITS + slot, row, mask=chosen != 0)
        # every tile is announced by its first row
        opens_tile = (chosen != 0) & (rank % BLOCK_ROWS == 0)
        tile_slot = unit_tile[None, :] + rank // BLOCK_ROWS
        tl.store(tile_units + tile_slot, tl.broadcast_to(unit[None, :], (TOKENS, UNITS)), mask=opens_tile)
        tl.store(tile_starts + tile_slot, row, mask=opens_tile)
    tl.store(token_counts + token, listed, mask=token < num_tokens)
    if program == 0:
        tl.store(unit_offsets + NUM_UNITS, first_row)
        tl.store(num_tiles, first_tile)

"""Launch shapes from a plain function, and last step's row counts without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEADS = 64
MAX_HEAD_SIZE = 128
"""What the GPU kernels take."""


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """How one launch cuts its matrix product."""

    block_rows: int
    """Rows of the output that one program computes at a time."""

    block_cols: int
    """Columns of the output."""

    block_depth: int
    """Steps of the sum in one round of loads."""

    num_warps: int
    """Warps of one program, 32 threads each."""

    num_stages: int
    """Rounds of loads in flight."""

    programs_per_sm: int
    """Programs that one multiprocessor holds at once."""

    @property
    def launch_options(self) -> dict[str, int]:
        """The constants of a kernel and Triton's own options, by the names that a launch takes."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLS": self.block_cols,
            "BLOCK_DEPTH": self.block_depth,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# (block_rows, tiles_held) -> block_cols, block_depth, num_warps, num_stages, programs_per_sm on sm_90
_SHAPES_16_BIT = {
    (16, 1): (128, 64, 4, 4, 3),
    (32, 1): (128, 64, 4, 4, 3),
    (64, 1): (128, 64, 4, 4, 2),
    (128, 1): (128, 64, 8, 4, 1),
    (16, 2): (128, 64, 4, 4, 2),
    (32, 2): (128, 64, 4, 4, 2),
    (64, 2): (128, 64, 8, 4, 1),
    (128, 2): (128, 64, 8, 3, 1),
    (16, 3): (64, 64, 4, 4, 3),
    (32, 3): (64, 64, 4, 4, 3),
    (64, 3): (64, 64, 8, 4, 1),
    (128, 3): (64, 64, 8, 4, 1),
}
# without tensor cores, as full precision is promised
_SHAPES_32_BIT = {1: (64, 16, 4, 2, 3), 2: (32, 16, 4, 2, 3), 3: (32, 16, 4, 2, 3)}


def tile_heights(dtype: torch.dtype) -> tuple[int, ...]:
    """Rows that a tile can have, ascending; a tall tile in float32 has too few registers."""
    return (16, 32, 64) if dtype == torch.float32 else (16, 32, 64, 128)


def choose_block_rows(rows_per_unit: int, dtype: torch.dtype) -> int:
    """Rows of a tile: large tiles reuse weights more, small ones waste less of a unit's last tile.

    Args:
        rows_per_unit: Rows that a unit is expected to get.
        dtype: Type of the rows.

    Returns:
        One of `tile_heights`.

    Example: 20 rows a unit give 32, 200 give 64, 500 give 128.
    """
    fitting = 16 if rows_per_unit <= 16 else 32 if rows_per_unit <= 48 else 64 if rows_per_unit < 256 else 128
    return min(fitting, tile_heights(dtype)[-1])


def tile_shape(rows: int, depth: int, columns: int, dtype: torch.dtype, tiles_held: int = 1) -> TileShape:
    """Shape of one launch of a matrix product.

    Args:
        rows: Rows of a tile, one of `tile_heights`.
        depth: Length of the sum.
        columns: Width of the output.
        dtype: Type of both factors.
        tiles_held: Tiles of the output's size that a program holds in registers at once: 1, 2 or 3.

    Example: 64 rows, depth 20 and 300 columns in bfloat16 give tiles of 64 x 128 with a depth of 32.
    """
    shape = _SHAPES_32_BIT[tiles_held] if dtype == torch.float32 else _SHAPES_16_BIT[rows, tiles_held]
    block_cols, block_depth, num_warps, num_stages, programs_per_sm = shape
    return TileShape(
        block_rows=rows,
        block_cols=min(block_cols, padded(columns)),
        block_depth=min(block_depth, padded(depth)),
        num_warps=num_warps,
        num_stages=num_stages,
        programs_per_sm=programs_per_sm,
    )


def padded(length: int) -> int:
    """The least power of two from 16 up that holds `length`: the least side of a tensor core's tile is 16."""
    return max(16, 1 << (length - 1).bit_length())


def num_programs(max_items: int, programs_per_sm: int, device: torch.device) -> int:
    """Programs of a persistent launch: what the device holds at once, and no more than there can be items.

    Args:
        max_items: Host-known bound on the number of items; the device knows how many there are.
        programs_per_sm: See `TileShape`.
        device: Where the launch runs; anything but CUDA counts as one multiprocessor.
    """
    num_sms = _num_sms(device.index) if device.type == "cuda" else 1
    return max(1, min(max_items, num_sms * programs_per_sm))


@cache
def _num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


class RowsHint:
    """Rows of an active unit in an earlier step: what the next step's tiles are chosen by.

    The counts come over by an asynchronous copy, and nothing ever waits for it: until it has arrived, the older
    count stands. During the capture of a CUDA graph nothing is copied or asked.

    Args:
        default_fraction: Share of the tokens that a unit is expected to get, in (0, 1], until a count is known.
    """

    def __init__(self, default_fraction: float) -> None:
        if not 0 < default_fraction <= 1:
            raise ValueError(f"default_fraction must lie in (0, 1], got {default_fraction}")
        self.default_fraction = default_fraction
        self._known: int | None = None
        self._counts: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def update(self, tokens_per_unit: Tensor) -> None:
        """Start to bring the counts (num_units,), int32, to the host; does nothing while a copy is under way."""
        if not tokens_per_unit.is_cuda:
            self._known = _mean_of_active(tokens_per_unit)
            return
        if torch.cuda.is_current_stream_capturing():
            return
        self._receive()
        if self._arrived is not None:
            return
        if self._counts is None or self._counts.shape != tokens_per_unit.shape:
            self._counts = torch.empty(tokens_per_unit.shape, dtype=tokens_per_unit.dtype, pin_memory=True)
        self._counts.copy_(tokens_per_unit, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(tokens_per_unit.device))

    def rows_per_unit(self, num_tokens: int) -> int:
        """Mean rows of the units that had any, at least 1; the default share of `num_tokens` if nothing is known."""
        if self._arrived is not None and not torch.cuda.is_current_stream_capturing():
            self._receive()
        known = round(num_tokens * self.default_fraction) if self._known is None else self._known
        return max(1, known)

    def _receive(self) -> None:
        if self._counts is not None and self._arrived is not None and self._arrived.query():
            self._known, self._arrived = _mean_of_active(self._counts), None


def _mean_of_active(tokens_per_unit: Tensor) -> int:
    counts = [count for count in tokens_per_unit.tolist() if count]
    return round(sum(counts) / len(counts)) if counts else 0

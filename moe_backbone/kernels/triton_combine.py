"""Triton: sum of each token's own rows, the last step of every op that works in unit order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_COLS = 1024


def combine(rows: Tensor, token_rows: Tensor, token_counts: Tensor) -> Tensor:
    """Sum each token's rows in the listed order, in float32, without atomics: equal bits on every call.

    Args:
        rows: (capacity, hidden_size), bfloat16, float16 or float32; only listed rows are read.
        token_rows: Row numbers of each token (num_tokens, num_units), int32; read up to the token's count.
        token_counts: Rows of each token (num_tokens,), int32, in [0, num_units].

    Returns:
        (num_tokens, hidden_size) in the dtype of `rows`; zeros where the count is 0.

    Example: rows [[1, 2], [3, 4], [5, 6]], token_rows [[0, 2], [1, -], [-, -]] (- is never read) and token_counts
    [2, 1, 0] give [[6, 8], [3, 4], [0, 0]].
    """
    num_tokens, num_units = token_rows.shape
    hidden_size = rows.shape[1]
    output = rows.new_empty(num_tokens, hidden_size)
    if output.numel():
        block_cols = min(MAX_BLOCK_COLS, triton.next_power_of_2(hidden_size))
        grid = (num_tokens, triton.cdiv(hidden_size, block_cols))
        _combine_kernel[grid](
            rows.contiguous(),
            token_rows.contiguous(),
            token_counts.contiguous(),
            output,
            hidden_size,
            num_units,
            BLOCK_COLS=block_cols,
            num_warps=max(1, block_cols // 256),
        )
    return output


@triton.jit
def _combine_kernel(
    rows_RD: tl.tensor,
    token_rows_TU: tl.tensor,
    token_counts_T: tl.tensor,
    output_TD: tl.tensor,
    hidden_size: tl.tensor,
    num_units: tl.tensor,
    BLOCK_COLS: tl.constexpr,
) -> None:
    """Sum BLOCK_COLS columns of one token; R rows, D hidden, T tokens, U units."""
    token = tl.program_id(0).to(tl.int64)  # int64: num_tokens * hidden_size passes 2**31
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = cols < hidden_size
    total = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    for slot in range(tl.load(token_counts_T + token)):
        row = tl.load(token_rows_TU + token * num_units + slot).to(tl.int64)
        total += tl.load(rows_RD + row * hidden_size + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_TD + token * hidden_size + cols, total.to(output_TD.dtype.element_ty), mask=inside)

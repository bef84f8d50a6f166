"""Lists of chosen (query, head) pairs from a mask in one launch: no sort, no atomics, no value read by the host."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_backbone.kernels.triton_plan import load_mask

MASK_TILE_SIZE = 4096  # entries of the mask that one program holds in registers


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """Which queries each head runs. All tensors int32; what lies behind a count is uninitialised.

    Row (sequence * num_heads + head) * num_queries + rank belongs to that head's query number `rank`.
    """

    positions: Tensor
    """Chosen queries, ascending (num_sequences * num_heads, num_queries); the first `counts[...]` entries count."""

    counts: Tensor
    """Chosen queries of each head of each sequence (num_sequences * num_heads,)."""

    token_rows: Tensor
    """Rows of each token by ascending head (num_sequences * num_queries, num_heads), `token_counts[token]` of them."""

    token_counts: Tensor
    """Chosen heads of each token (num_sequences * num_queries,)."""


def plan_heads(subset: Tensor) -> HeadPlan:
    """List what is chosen, once by head and once by token.

    Args:
        subset: Chosen heads, bool (num_sequences, num_queries, num_heads), contiguous, not empty.

    Example: subset [[[0, 1], [1, 1], [0, 0]]] gives positions [[1], [0, 1]], counts [1, 2],
        token_rows [[3], [0, 4], []] and token_counts [1, 2, 0].
    """
    num_sequences, num_queries, num_heads = subset.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=subset.device)

    plan = HeadPlan(
        positions=empty(num_sequences * num_heads, num_queries),
        counts=empty(num_sequences * num_heads),
        token_rows=empty(num_sequences * num_queries, num_heads),
        token_counts=empty(num_sequences * num_queries),
    )
    heads = triton.next_power_of_2(num_heads)
    queries = min(MASK_TILE_SIZE // heads, max(16, triton.next_power_of_2(num_queries)))
    _list_kernel[(num_sequences * triton.cdiv(num_queries, queries),)](
        subset.view(torch.uint8),
        plan.positions,
        plan.counts,
        plan.token_rows,
        plan.token_counts,
        num_queries,
        NUM_HEADS=num_heads,
        HEADS=heads,
        QUERIES=queries,
        num_warps=8,
    )
    return plan


@triton.jit(do_not_specialize=["num_queries"])
def _list_kernel(
    subset_SQH: tl.tensor,
    positions_LQ: tl.tensor,
    counts_L: tl.tensor,
    token_rows_TH: tl.tensor,
    token_counts_T: tl.tensor,
    num_queries: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
) -> None:
    """Entries of one tile of queries; S sequences, Q queries, H heads, L = S * H lists, T = S * Q tokens.

    Example: see `plan_heads`.
    """
    num_tiles = tl.cdiv(num_queries, QUERIES)
    sequence = (tl.program_id(0) // num_tiles).to(tl.int64)  # int64: the mask may pass 2**31 entries
    tile = tl.program_id(0) % num_tiles
    subset_QH = subset_SQH + sequence * num_queries * NUM_HEADS
    head = tl.arange(0, HEADS)
    # every program counts the tiles before its own, which saves a launch
    counted = tl.zeros((QUERIES, HEADS), tl.int32)
    for other in range(tile):
        counted += load_mask(subset_QH, other * QUERIES + tl.arange(0, QUERIES), head, num_queries, NUM_HEADS)
    before = tl.sum(counted, 0)

    query = tile * QUERIES + tl.arange(0, QUERIES)
    chosen = load_mask(subset_QH, query, head, num_queries, NUM_HEADS)
    rank = before[None, :] + tl.cumsum(chosen, 0) - chosen
    row = (sequence * NUM_HEADS + head)[None, :] * num_queries + rank
    tl.store(positions_LQ + row, tl.broadcast_to(query[:, None], (QUERIES, HEADS)), mask=chosen != 0)
    token = sequence * num_queries + query
    slot = tl.cumsum(chosen, 1) - chosen
    tl.store(token_rows_TH + token[:, None] * NUM_HEADS + slot, row.to(tl.int32), mask=chosen != 0)
    tl.store(token_counts_T + token, tl.sum(chosen, 1), mask=query < num_queries)
    if tile == num_tiles - 1:
        tl.store(counts_L + sequence * NUM_HEADS + head, before + tl.sum(chosen, 0), mask=head < NUM_HEADS)

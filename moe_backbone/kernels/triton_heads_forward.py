"""Forward of the heads: list the chosen queries, attend and project in one launch, then combine."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_backbone.kernels.triton_combine import combine
from moe_backbone.kernels.triton_heads_plan import plan_heads

# Letters behind names: R rows (capacity), L lists (a head of a sequence), T tokens, Q queries, H heads,
# N keys, D hidden_size, C head_size.


@dataclass(frozen=True, kw_only=True)
class HeadTile:
    """How the attention launch cuts its work."""

    block_rows: int
    """Queries of one head that one program attends with."""

    block_keys: int
    """Keys in one round of loads."""

    block_hidden: int
    """Columns of the token rows in one round of loads or stores."""

    num_warps: int
    """Warps of one program, 32 threads each."""

    num_stages: int
    """Rounds of loads in flight."""


def head_tile(num_queries: int, dtype: torch.dtype) -> HeadTile:
    """Shape for lists of up to `num_queries` queries.

    Args:
        num_queries: Queries of one sequence.
        dtype: Type of the token rows.

    Example: 100 queries in bfloat16 give tiles of 64 queries, one query gives a tile of 16, the least there is.
    """
    rows = max(16, triton.next_power_of_2(num_queries))
    if dtype == torch.float32:  # without tensor cores, as full precision is promised
        return HeadTile(block_rows=min(rows, 32), block_keys=32, block_hidden=16, num_warps=8, num_stages=2)
    if rows < 512:
        return HeadTile(block_rows=min(rows, 64), block_keys=64, block_hidden=64, num_warps=4, num_stages=3)
    return HeadTile(block_rows=128, block_keys=64, block_hidden=64, num_warps=8, num_stages=3)


def forward(
    hidden: Tensor,
    weights: Tensor,
    subset: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    output_weight: Tensor,
    rotation: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the chosen heads: the output, and the queries of each head of each sequence (see `HeadPlan.counts`).

    Arguments as in `reference.head_attention`, `subset` not empty.
    Keys and values may be views, such as the filled part of a cache: their strides by sequence, head and key are
    whole numbers of `head_size`, so that the alignment of every load is known. Everything else is contiguous.
    """
    num_queries, hidden_size = hidden.shape[1:]
    head_size = query_weight.shape[2]
    plan = plan_heads(subset)
    rows = hidden.new_empty(plan.positions.numel(), hidden_size)
    tile = head_tile(num_queries, hidden.dtype)
    _attention_kernel[(plan.counts.numel() * triton.cdiv(num_queries, tile.block_rows),)](
        hidden,
        weights,
        plan.positions,
        plan.counts,
        query_weight,
        keys,
        values,
        output_weight,
        rotation,
        rows,
        num_queries,
        keys.shape[2],
        *(stride // head_size for stride in (*keys.stride()[:3], *values.stride()[:3])),
        NUM_HEADS=subset.shape[2],
        HIDDEN_SIZE=hidden_size,
        HEAD_SIZE=head_size,
        HALF=max(16, triton.next_power_of_2(head_size // 2)),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_KEYS=tile.block_keys,
        BLOCK_HIDDEN=tile.block_hidden,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return combine(rows, plan.token_rows, plan.token_counts).view(hidden.shape), plan.counts


LENGTHS = ["num_queries", "num_keys", "keys_sequence_stride", "keys_head_stride"]
LENGTHS += ["values_sequence_stride", "values_head_stride"]


@triton.jit(do_not_specialize=LENGTHS)  # they change from step to step, which must not compile again
def _attention_kernel(
    hidden_TD: tl.tensor,
    weights_TH: tl.tensor,
    positions_LQ: tl.tensor,
    counts_L: tl.tensor,
    query_weight_HDC: tl.tensor,
    keys_SHNC: tl.tensor,
    values_SHNC: tl.tensor,
    output_weight_HCD: tl.tensor,
    rotation_2QC: tl.tensor,
    rows_RD: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    keys_sequence_stride: tl.tensor,
    keys_head_stride: tl.tensor,
    key_stride: tl.tensor,
    values_sequence_stride: tl.tensor,
    values_head_stride: tl.tensor,
    value_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
) -> None:
    """Rows of one tile of one head's queries: project, rotate, attend, weight, project back.

    Example: a query that sees one key only gets weight * value @ output_weight, whatever the query is.
    """
    num_tiles = tl.cdiv(num_queries, BLOCK_ROWS)
    list_ = (tl.program_id(0) // num_tiles).to(tl.int64)  # int64, as all that follows: row * width passes 2**31
    sequence, head = list_ // NUM_HEADS, list_ % NUM_HEADS
    # late queries see most keys, so they start first
    start = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_ROWS
    count = tl.load(counts_L + list_)
    if start >= count:
        return
    # past the end of the list its last query is repeated, so that every position read has been written
    rank = start + tl.arange(0, BLOCK_ROWS)
    row = list_ * num_queries + tl.minimum(rank, count - 1)
    position = tl.load(positions_LQ + row)
    token = sequence * num_queries + position
    matrix_DC = query_weight_HDC + head * HIDDEN_SIZE * HEAD_SIZE
    first, second = _project(hidden_TD, matrix_DC, token, HIDDEN_SIZE, HEAD_SIZE, HALF, BLOCK_ROWS, BLOCK_HIDDEN)
    first, second = _rotate(first, second, rotation_2QC, position, num_queries, HEAD_SIZE)
    first, second = first.to(hidden_TD.dtype.element_ty), second.to(hidden_TD.dtype.element_ty)

    last_key = num_keys - num_queries + position
    keys_NC = keys_SHNC + (sequence * keys_sequence_stride + head * keys_head_stride) * HEAD_SIZE
    values_NC = values_SHNC + (sequence * values_sequence_stride + head * values_head_stride) * HEAD_SIZE
    mixed = _attend(first, second, keys_NC, values_NC, key_stride, value_stride, last_key, HEAD_SIZE, BLOCK_KEYS)
    weight = tl.load(weights_TH + token * NUM_HEADS + head).to(tl.float32)
    mixed = (mixed * weight[:, None]).to(hidden_TD.dtype.element_ty)
    matrix_CD = output_weight_HCD + head * HEAD_SIZE * HIDDEN_SIZE
    col = tl.arange(0, 2 * HALF)
    for start_hidden in range(0, HIDDEN_SIZE, BLOCK_HIDDEN):
        depth = start_hidden + tl.arange(0, BLOCK_HIDDEN)
        inside = (col < HEAD_SIZE)[:, None] & (depth < HIDDEN_SIZE)[None, :]
        matrix = tl.load(matrix_CD + col[:, None] * HIDDEN_SIZE + depth[None, :], mask=inside, other=0.0)
        update = tl.dot(mixed, matrix, input_precision="ieee").to(rows_RD.dtype.element_ty)
        inside = (rank < count)[:, None] & (depth < HIDDEN_SIZE)[None, :]
        tl.store(rows_RD + row[:, None] * HIDDEN_SIZE + depth[None, :], update, mask=inside)


@triton.jit
def _project(
    hidden_TD: tl.tensor,
    matrix_DC: tl.tensor,
    token: tl.tensor,
    HIDDEN_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
) -> tl.tensor:
    """First and second half of the queries, float32 (BLOCK_ROWS, HALF) each; columns past the half's end are zero.

    Example: token row [1, 2] and matrix [[1, 0], [0, 10]] give first [1] and second [20].
    """
    col = tl.arange(0, HALF)
    first = tl.zeros((BLOCK_ROWS, HALF), tl.float32)
    second = tl.zeros((BLOCK_ROWS, HALF), tl.float32)
    for start in range(0, HIDDEN_SIZE, BLOCK_HIDDEN):
        depth = start + tl.arange(0, BLOCK_HIDDEN)
        pointers = hidden_TD + token[:, None] * HIDDEN_SIZE + depth[None, :]
        tokens = tl.load(pointers, mask=(depth < HIDDEN_SIZE)[None, :], other=0.0)
        inside = (depth < HIDDEN_SIZE)[:, None] & (col < HEAD_SIZE // 2)[None, :]
        pointers = matrix_DC + depth[:, None] * HEAD_SIZE + col[None, :]
        first = tl.dot(tokens, tl.load(pointers, mask=inside, other=0.0), first, input_precision="ieee")
        right = tl.load(pointers + HEAD_SIZE // 2, mask=inside, other=0.0)
        second = tl.dot(tokens, right, second, input_precision="ieee")
    return first, second


@triton.jit
def _rotate(
    first: tl.tensor,
    second: tl.tensor,
    rotation_2QC: tl.tensor,
    position: tl.tensor,
    num_queries: tl.tensor,
    HEAD_SIZE: tl.constexpr,
) -> tl.tensor:
    """Turn each pair (first, second) by its position's angle, as `reference.rotate`, and scale it for the softmax.

    Example: head_size 2 at a quarter turn maps (1, 0) to (0, 1), times log2(e) / sqrt(2).
    """
    col = tl.arange(0, first.shape[1])
    inside = (col < HEAD_SIZE // 2)[None, :]
    pointers = rotation_2QC + position[:, None] * (HEAD_SIZE // 2) + col[None, :]
    cosine = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(pointers + num_queries * (HEAD_SIZE // 2), mask=inside, other=0.0).to(tl.float32)
    scale = 1.4426950408889634 * HEAD_SIZE**-0.5  # log2(e): the softmax takes powers of 2
    return (first * cosine - second * sine) * scale, (second * cosine + first * sine) * scale


@triton.jit
def _attend(
    first: tl.tensor,
    second: tl.tensor,
    keys_NC: tl.tensor,
    values_NC: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    last_key: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> tl.tensor:
    """Values of one head mixed by the softmax of the scores of the keys up to each query's last, float32.

    Example: scores 0 and 1 of values [8] and [2] give powers 1 and 2 of 2, hence (1 * 8 + 2 * 2) / 3 = [4].
    """
    BLOCK_ROWS: tl.constexpr = first.shape[0]
    HALF: tl.constexpr = first.shape[1]
    half_col, col = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    highest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    mixed = tl.zeros((BLOCK_ROWS, 2 * HALF), tl.float32)
    seen_by_any = tl.max(last_key) + 1
    unmasked = (tl.min(last_key) + 1) // BLOCK_KEYS * BLOCK_KEYS  # in whole blocks that every query sees
    for masked in tl.static_range(2):
        stop = seen_by_any if masked else unmasked
        for start in range(unmasked if masked else 0, stop, BLOCK_KEYS):
            key = start + tl.arange(0, BLOCK_KEYS)
            wide_key = key.to(tl.int64)[:, None]  # int64: num_keys * stride may pass 2**31
            inside = (key < stop)[:, None] & (half_col < HEAD_SIZE // 2)[None, :]
            pointers = keys_NC + wide_key * (key_stride * HEAD_SIZE) + half_col[None, :]
            scores = tl.dot(first, tl.load(pointers, mask=inside, other=0.0).T, input_precision="ieee")
            second_keys = tl.load(pointers + HEAD_SIZE // 2, mask=inside, other=0.0).T
            scores = tl.dot(second, second_keys, scores, input_precision="ieee")
            if masked:
                scores = tl.where(key[None, :] <= last_key[:, None], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            powers = tl.exp2(scores - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            highest = new_highest
            total = total * shrink + tl.sum(powers, 1)
            inside = (key < stop)[:, None] & (col < HEAD_SIZE)[None, :]
            pointers = values_NC + wide_key * (value_stride * HEAD_SIZE) + col[None, :]
            value = tl.load(pointers, mask=inside, other=0.0)
            mixed = tl.dot(powers.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")
    return mixed / total[:, None]

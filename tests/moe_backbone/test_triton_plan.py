"""The routing plan equals a loop over units and tokens, for any mask; tiles and hints are what they promise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_backbone.kernels import tiles, triton_plan

BLOCK_ROWS = 16
SIZES = [
    pytest.param(0, 3, 0.5, id="no tokens"),
    pytest.param(1, 1, 1.0, id="one token and one unit"),
    pytest.param(1, 5, 0.5, id="one token"),
    pytest.param(128, 4, 0.5, id="one whole tile of tokens"),
    pytest.param(129, 4, 0.5, id="one token more than a tile"),
    pytest.param(331, 3, 1.0, id="all units for all tokens"),
    pytest.param(331, 3, 0.0, id="empty mask"),
    pytest.param(257, 37, 0.3, id="units in two blocks"),
    pytest.param(131, 256, 0.02, id="many units"),
]


def _listed(values: Tensor, counts: Tensor) -> list[list[int]]:
    return [row[:count] for row, count in zip(values.tolist(), counts.tolist(), strict=True)]


def _assert_plan_of(subset: Tensor) -> None:
    """Every entry of the plan is what a loop over units, then tokens, gives."""
    plan = triton_plan.plan_routing(subset, BLOCK_ROWS)
    pairs = [(unit, token) for unit in range(subset.shape[1]) for token in subset[:, unit].nonzero().flatten().tolist()]
    counts = subset.sum(0).tolist()
    offsets = [sum(counts[:unit]) for unit in range(len(counts) + 1)]
    starts = [(u, row) for u, (a, b) in enumerate(pairwise(offsets)) for row in range(a, b, BLOCK_ROWS)]
    rows_of_token: list[list[int]] = [[] for _ in range(len(subset))]
    for row, (_, token) in enumerate(pairs):
        rows_of_token[token].append(row)
    num_tiles = plan.num_tiles.item()
    assert plan.tokens_per_unit.tolist() == counts
    assert plan.unit_offsets.tolist() == offsets
    assert plan.row_tokens[: len(pairs)].tolist() == [token for _, token in pairs]
    assert plan.token_counts.tolist() == subset.sum(1).tolist()
    assert _listed(plan.token_rows, plan.token_counts) == rows_of_token
    tiles_found = zip(plan.tile_units[:num_tiles].tolist(), plan.tile_starts[:num_tiles].tolist(), strict=True)
    assert list(tiles_found) == starts


@pytest.mark.parametrize(("num_tokens", "num_units", "share"), SIZES)
def test_plan_equals_a_loop(num_tokens: int, num_units: int, share: float) -> None:
    """Rows are sorted by unit, then token; each token lists its rows; the tiles cut each unit."""
    _assert_plan_of(torch.rand(num_tokens, num_units) < share)


def test_plan_adds_up_counts_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier tiles of tokens count, also when they do not fit in one load."""
    monkeypatch.setattr(triton_plan, "COUNTS_TILE_SIZE", 8)
    _assert_plan_of(torch.rand(700, 4) < 0.5)


def test_plan_of_the_docstring() -> None:
    """Three tokens, the last without units."""
    subset = torch.tensor([[True, False], [True, True], [False, False]])
    plan = triton_plan.plan_routing(subset, 16)
    assert plan.tokens_per_unit.tolist() == [2, 1]
    assert plan.unit_offsets.tolist() == [0, 2, 3]
    assert plan.row_tokens[:3].tolist() == [0, 1, 1]
    assert _listed(plan.token_rows, plan.token_counts) == [[0], [1, 2], []]
    assert plan.tile_units[:2].tolist() == [0, 1]
    assert plan.tile_starts[:2].tolist() == [0, 2]
    assert plan.num_tiles.tolist() == [2]


def test_unpermute_undoes_permute() -> None:
    """Each token's listed rows hold that token's own values."""
    subset = torch.rand(143, 5) < 0.4
    plan = triton_plan.plan_routing(subset, 16)
    tokens = torch.randn(143)
    rows = tokens[plan.row_tokens[: plan.unit_offsets[-1]].long()]
    for token, listed in enumerate(_listed(plan.token_rows, plan.token_counts)):
        assert rows[listed].tolist() == [tokens[token].item()] * len(listed)


def test_plan_buffers_are_bounded_by_what_the_host_knows() -> None:
    """All units for all tokens fill every buffer to its end, and not beyond."""
    plan = triton_plan.plan_routing(torch.ones(33, 3, dtype=torch.bool), 16)
    assert plan.unit_offsets[-1].item() == plan.row_tokens.numel() == 99
    assert plan.num_tiles.item() == plan.tile_units.numel() == plan.tile_starts.numel() == 9


@pytest.mark.parametrize(
    ("rows_per_unit", "dtype", "expected"),
    [
        pytest.param(0, torch.bfloat16, 16, id="no rows"),
        pytest.param(20, torch.bfloat16, 32, id="few rows"),
        pytest.param(200, torch.bfloat16, 64, id="more rows"),
        pytest.param(500, torch.float16, 128, id="many rows"),
        pytest.param(500, torch.float32, 64, id="many rows in full precision"),
    ],
)
def test_block_rows_follow_the_rows_of_a_unit(rows_per_unit: int, dtype: torch.dtype, expected: int) -> None:
    """The docstring's examples and the bounds."""
    assert tiles.choose_block_rows(rows_per_unit, dtype) == expected


@pytest.mark.parametrize("tiles_held", [1, 2, 3])
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tile_shapes_lie_within_limits(dtype: torch.dtype, rows: int, tiles_held: int) -> None:
    """Sides are powers of two from 16 up, no wider than the sizes need, and the buffers fit in shared memory."""
    for depth, columns in ((1, 1), (20, 300), (4096, 4096)):
        shape = tiles.tile_shape(rows, depth, columns, dtype, tiles_held)
        for side, length in ((shape.block_cols, columns), (shape.block_depth, depth)):
            assert side >= 16
            assert side.bit_count() == 1
            assert side < 2 * max(16, length)
        # two factors on the right at most: what a program holds beyond them are results
        elements = shape.block_depth * (shape.block_rows + min(2, tiles_held) * shape.block_cols)
        assert shape.num_stages * elements * dtype.itemsize <= 227 * 1024


def test_tile_shape_of_the_docstring() -> None:
    """Small sizes shrink the tile."""
    shape = tiles.tile_shape(64, 20, 300, torch.bfloat16)
    assert (shape.block_rows, shape.block_cols, shape.block_depth) == (64, 128, 32)


def test_persistent_launches_are_no_larger_than_their_work() -> None:
    """At least one program, at most one for each item."""
    cpu = torch.device("cpu")
    assert tiles.num_programs(0, 3, cpu) == 1
    assert tiles.num_programs(2, 3, cpu) == 2
    assert tiles.num_programs(100, 3, cpu) == 3


def test_rows_hint_is_the_mean_over_active_units() -> None:
    """A unit without rows does not make the tiles of the others smaller; at least one row is expected."""
    hint = tiles.RowsHint(default_fraction=0.25)
    assert hint.rows_per_unit(num_tokens=100) == 25
    hint.update(torch.tensor([0, 30, 0, 50], dtype=torch.int32))
    assert hint.rows_per_unit(num_tokens=100) == 40
    hint.update(torch.zeros(4, dtype=torch.int32))
    assert hint.rows_per_unit(num_tokens=100) == 1


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_rows_hint_refuses_a_share_outside_its_range(fraction: float) -> None:
    """Name, rule, actual."""
    with pytest.raises(ValueError, match=rf"default_fraction must lie in \(0, 1\], got {fraction}"):
        tiles.RowsHint(fraction)

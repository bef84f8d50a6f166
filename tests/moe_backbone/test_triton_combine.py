"""Each token gets the sum of its own rows, in the listed order, and nothing else is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_backbone.kernels.triton_combine import MAX_BLOCK_COLS, combine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter is wrong on bfloat16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
FAR = 2**31 - 1
"""A row number that no memory holds."""


def _rows(capacity: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(capacity, hidden_size, dtype=dtype, device=DEVICE)


def _lists(*lists: list[int], num_units: int) -> tuple[Tensor, Tensor]:
    """Token rows with an impossible number behind each token's count, and the counts."""
    padded = [rows + [FAR] * (num_units - len(rows)) for rows in lists]
    counts = [len(rows) for rows in lists]
    return (
        torch.tensor(padded, dtype=torch.int32, device=DEVICE).view(len(lists), num_units),
        torch.tensor(counts, dtype=torch.int32, device=DEVICE),
    )


def test_combine_by_hand() -> None:
    """The docstring's example."""
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=DEVICE)
    output = combine(rows, *_lists([0, 2], [1], [], num_units=2))
    assert output.tolist() == [[6, 8], [3, 4], [0, 0]]


@pytest.mark.parametrize("hidden_size", [1, 7, 64, MAX_BLOCK_COLS + 3], ids=lambda size: f"hidden_size {size}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_equals_a_sum_in_the_listed_order(dtype: torch.dtype, hidden_size: int) -> None:
    """Bit by bit the float32 sum in the listed order, rounded once; a row may serve several tokens."""
    rows = _rows(11, hidden_size, dtype)
    lists = [[10, 0, 3], [5], [], [7, 2, 9, 1, 0], [3, 3]]
    output = combine(rows, *_lists(*lists, num_units=5))
    for token, numbers in enumerate(lists):
        total = torch.zeros(hidden_size, device=DEVICE)
        for number in numbers:
            total = total + rows[number].float()
        assert torch.equal(output[token], total.to(dtype))


def test_combine_reads_only_listed_rows() -> None:
    """What no token lists may hold anything, NaN included, and so may the lists behind their counts."""
    rows = _rows(6, 5, torch.float32)
    rows[[0, 2, 5]] = torch.nan
    output = combine(rows, *_lists([1, 3], [], [4], num_units=4))
    torch.testing.assert_close(output[0], rows[1] + rows[3])
    assert output[1].eq(0).all()
    assert torch.equal(output[2], rows[4])


def test_combine_of_no_tokens_is_empty() -> None:
    """An empty batch gives an empty output, not an error."""
    assert combine(_rows(0, 5, torch.float32), *_lists(num_units=3)).shape == (0, 5)


def test_combine_of_empty_subsets_is_zero() -> None:
    """Zeros are written even where there is no row at all."""
    assert combine(_rows(0, 5, torch.float32), *_lists([], [], num_units=3)).eq(0).all()

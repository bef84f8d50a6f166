"""The Triton heads equal the reference for any subset, and touch nothing that was not chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_backbone.kernels import reference, triton_heads
from moe_backbone.kernels.triton_heads import head_attention
from moe_backbone.kernels.triton_heads_forward import head_tile
from moe_backbone.kernels.triton_heads_plan import MASK_TILE_SIZE, plan_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest absolute difference from the reference in float64, for outputs of about unit size."""
DTYPES = [dtype for dtype in TOLERANCES if dtype != torch.bfloat16 or DEVICE == "cuda"]
NUM_FLOATS = 7  # arguments of the op that are not the subset
HIDDEN_SIZE = 35  # more than one block of columns, and not a whole number of them

SIZES = [
    # num_sequences, num_queries, num_keys, num_heads, head_size
    pytest.param((2, 37, 37, 3, 8), id="prompt"),
    pytest.param((1, 1, 1, 2, 16), id="one token"),
    pytest.param((2, 5, 5, 1, 4), id="one head"),
    pytest.param((2, 35, 67, 2, 24), id="fewer queries than keys"),
    pytest.param((3, 1, 70, 2, 16), id="one token after a cache"),
    pytest.param((1, 3, 3, 17, 2), id="many small heads"),
]
SMALL = (2, 7, 9, 3, 4)

SUBSETS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda subset: subset,
    "all heads": torch.ones_like,
    "no head": torch.zeros_like,
    "one head only": lambda subset: _only(subset, 0),
    "last head unused": lambda subset: subset & ~_only(subset, -1),
    "one token without heads": lambda subset: subset.index_fill(1, torch.tensor([0], device=DEVICE), False),
}
"""What is done to a random subset (num_sequences, num_queries, num_heads)."""


def _only(subset: Tensor, head: int) -> Tensor:
    only = torch.zeros_like(subset)
    only[..., head] = True
    return only


def _arguments(
    sizes: tuple[int, int, int, int, int], pattern: str = "random", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    num_sequences, num_queries, num_keys, num_heads, head_size = sizes
    angles = torch.rand(num_queries, head_size // 2)
    cache = (num_sequences, num_heads, num_keys, head_size)
    floats = {
        "hidden": torch.randn(num_sequences, num_queries, HIDDEN_SIZE),
        "weights": torch.randn(num_sequences, num_queries, num_heads),
        "query_weight": torch.randn(num_heads, HIDDEN_SIZE, head_size) * HIDDEN_SIZE**-0.5,
        "keys": torch.randn(cache),
        "values": torch.randn(cache),
        "output_weight": torch.randn(num_heads, head_size, HIDDEN_SIZE) * (num_heads * head_size) ** -0.5,
        "rotation": torch.stack((angles.cos(), angles.sin())),
    }
    subset = SUBSETS[pattern]((torch.rand(num_sequences, num_queries, num_heads) < 0.5).to(DEVICE))
    return {"subset": subset} | {name: value.to(DEVICE, dtype) for name, value in floats.items()}


def _reference(arguments: dict[str, Tensor]) -> Tensor:
    """The definition in float64, which takes nothing from weights that were not chosen, be they NaN."""
    exact = {name: value if name == "subset" else value.double() for name, value in arguments.items()}
    return reference.head_attention(**exact)


def _assert_equal(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=TOLERANCES[output.dtype])


@pytest.mark.parametrize("pattern", SUBSETS)
@pytest.mark.parametrize("sizes", SIZES)
def test_heads_equal_the_reference(sizes: tuple[int, int, int, int, int], pattern: str) -> None:
    """Same output for every pattern of subsets and odd sizes."""
    arguments = _arguments(sizes, pattern)
    _assert_equal(head_attention(**arguments), _reference(arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 70, 130, 2, 24), (2, 1, 70, 3, 16), (1, 260, 260, 1, 6)], ids=str)
def test_heads_equal_the_reference_in_every_dtype(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """Every row tile, with blocks of keys that all, some and no queries see."""
    arguments = _arguments(sizes, dtype=dtype)
    output = head_attention(**arguments)
    assert output.dtype == dtype
    _assert_equal(output, _reference(arguments))


def test_one_visible_key_gives_its_value() -> None:
    """The kernel docstring's example: with one key the output is weight * value @ output_weight."""
    arguments = _arguments((1, 1, 1, 1, 4), "all heads")
    expected = arguments["weights"][0] * (arguments["values"][0, 0] @ arguments["output_weight"][0])
    torch.testing.assert_close(head_attention(**arguments)[0], expected)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda keys: keys.transpose(1, 2).contiguous().transpose(1, 2), id="heads inside positions"),
        pytest.param(lambda keys: torch.cat((keys, keys + torch.nan), dim=2)[:, :, : keys.shape[2]], id="cache"),
        pytest.param(lambda keys: torch.cat((keys, keys[..., :1]), dim=3)[..., :-1], id="heads apart"),
        pytest.param(lambda keys: keys.mT.contiguous().mT, id="transposed"),
    ],
)
def test_keys_and_values_may_be_views(view: Callable[[Tensor], Tensor]) -> None:
    """Only the numbers count, not how they lie; what lies behind a cache's last position is not read."""
    arguments = _arguments(SMALL)
    expected = head_attention(**arguments)
    views = {name: view(arguments[name]) for name in ("keys", "values")}
    assert not views["keys"].is_contiguous()
    assert torch.equal(head_attention(**arguments | views), expected)


def test_other_arguments_may_be_views() -> None:
    """Weights that are one for all heads arrive expanded, rotations as a slice of their table."""
    arguments = _arguments(SMALL)
    num_queries = arguments["hidden"].shape[1]
    table = torch.cat((arguments["rotation"], arguments["rotation"]), dim=1)
    arguments |= {
        "weights": torch.ones(1, 1, 1, device=DEVICE).expand_as(arguments["weights"]),
        "rotation": table[:, num_queries // 2 : num_queries // 2 + num_queries],
        "query_weight": arguments["query_weight"].mT.contiguous().mT,
    }
    _assert_equal(head_attention(**arguments), _reference(arguments))


def test_a_token_without_heads_gets_exact_zeros() -> None:
    """Zero to the bit, so that the residual stream really passes unchanged."""
    arguments = _arguments(SMALL, "all heads")
    arguments["subset"][1, 2] = False
    output = head_attention(**arguments)
    assert output[1, 2].eq(0).all()
    assert output[1, 3].ne(0).all()


def test_what_was_not_chosen_is_not_read() -> None:
    """NaN in token rows without heads, weights of heads not chosen, and all of a head that nobody uses."""
    arguments = _arguments((1, 7, 7, 3, 4), "last head unused")
    arguments["subset"][0, 2] = False
    expected = _reference(arguments)
    arguments["hidden"][0, 2] = torch.nan
    arguments["weights"][~arguments["subset"]] = torch.nan
    for name in ("query_weight", "output_weight"):
        arguments[name][-1] = torch.nan
    for name in ("keys", "values"):
        arguments[name][:, -1] = torch.nan
    _assert_equal(head_attention(**arguments), expected)


def test_later_keys_are_not_read() -> None:
    """A query never reads a block of keys that lies behind its own position."""
    arguments = _arguments((1, 70, 70, 1, 4), "no head")
    arguments["subset"][0, 3] = True
    expected = _reference(arguments)
    for name in ("keys", "values"):
        arguments[name][:, :, 4:] = torch.nan
    _assert_equal(head_attention(**arguments), expected)


@pytest.mark.parametrize("shape", [(0, 5, 5, 3, 4), (2, 0, 5, 3, 4)], ids=["no sequences", "no queries"])
def test_an_empty_batch_gives_an_empty_output(shape: tuple[int, int, int, int, int]) -> None:
    """Not an error, and nothing is launched on an empty grid."""
    assert head_attention(**_arguments(shape)).shape == (*shape[:2], HIDDEN_SIZE)


def test_calls_repeat_to_the_bit() -> None:
    """Sums have a fixed order: no atomics."""
    arguments = _arguments(SMALL)
    assert torch.equal(head_attention(**arguments), head_attention(**arguments))


@pytest.mark.parametrize("pattern", ["random", "no head"])
def test_gradients_equal_the_reference(pattern: str) -> None:
    """Every input that is not the subset has the gradient of the definition."""
    arguments = _arguments(SMALL, pattern)
    inputs = [value.requires_grad_() for name, value in arguments.items() if name != "subset"]
    direction = torch.randn_like(arguments["hidden"])
    gradients = torch.autograd.grad(head_attention(**arguments), inputs, direction)
    expected = torch.autograd.grad(reference.head_attention(**arguments), inputs, direction)
    assert len(gradients) == NUM_FLOATS
    torch.testing.assert_close(gradients, expected)


def test_frozen_inputs_get_no_gradient() -> None:
    """Only what asks for a gradient gets one."""
    arguments = _arguments(SMALL)
    arguments["values"].requires_grad_()
    head_attention(**arguments).sum().backward()
    assert arguments["values"].grad is not None
    assert arguments["keys"].grad is None


@pytest.mark.parametrize("wants_gradient", [False, True], ids=["inference", "training"])
def test_op_keeps_its_contract(wants_gradient: bool) -> None:
    """Schema, fake output and registered gradient are what torch.compile will rely on."""
    arguments = _arguments(SMALL)
    order = ("hidden", "weights", "subset", "query_weight", "keys", "values", "output_weight", "rotation")
    inputs = [arguments[name].requires_grad_(wants_gradient and name != "subset") for name in order]
    torch.library.opcheck(torch.ops.routegym.head_attention.default, tuple(inputs))


def _changed(**changes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    arguments = _arguments(SMALL)
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"hidden": lambda x: x[0]}, r"hidden must have 3 dimensions, got shape \(7, 35\)", id="dimensions"
        ),
        pytest.param(
            {"weights": lambda x: x[..., :2]}, r"weights must have shape \(2, 7, 3\), got \(2, 7, 2\)", id="shape"
        ),
        pytest.param({"subset": lambda x: x.int()}, r"subset must be torch.bool, got torch.int32", id="mask type"),
        pytest.param(
            {"values": lambda x: x.half()}, r"values must be torch.float32, got torch.float16", id="mixed types"
        ),
        pytest.param({"hidden": lambda x: x.double()}, r"hidden must have a dtype of .*, got torch.float64", id="type"),
        pytest.param(
            {"keys": lambda x: x[:, :, :6], "values": lambda x: x[:, :, :6]},
            r"num_keys must be at least num_queries=7, got 6",
            id="too few keys",
        ),
        pytest.param({"keys": lambda x: x.to("meta")}, r"keys must be on .*, got meta", id="device"),
    ],
)
def test_disagreeing_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    """One line with name, rule and actual."""
    with pytest.raises(ValueError, match=message):
        head_attention(**_changed(**changes))


@pytest.mark.parametrize(
    ("num_heads", "head_size", "message"),
    [
        pytest.param(65, 2, r"num_heads must lie in \[1, 64\], got 65", id="too many heads"),
        pytest.param(1, 130, r"head_size must be even and lie in \[2, 128\], got 130", id="too wide"),
        pytest.param(1, 5, r"head_size must be even and lie in \[2, 128\], got 5", id="odd"),
    ],
)
def test_sizes_beyond_the_limits_are_refused(num_heads: int, head_size: int, message: str) -> None:
    """The kernels would run out of registers, or could not turn half a pair."""
    with pytest.raises(ValueError, match=message):
        head_attention(**_arguments((1, 2, 2, num_heads, head_size)))


@pytest.mark.skipif(DEVICE == "cuda", reason="says what happens without a GPU")
def test_what_cannot_run_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bfloat16 would be silently wrong in the interpreter, and without it nothing runs."""
    with pytest.raises(ValueError, match=r"hidden must have a dtype of .*, got torch.bfloat16"):
        head_attention(**_arguments(SMALL, dtype=torch.bfloat16))
    monkeypatch.setattr(triton_heads, "INTERPRETED", False)
    with pytest.raises(ValueError, match="hidden must be on a GPU unless TRITON_INTERPRET=1, got cpu"):
        head_attention(**_arguments(SMALL))


def test_plan_by_hand() -> None:
    """The docstring's example; what lies behind a count is not looked at."""
    plan = plan_heads(torch.tensor([[[False, True], [True, True], [False, False]]], device=DEVICE))
    assert plan.counts.tolist() == [1, 2]
    assert [plan.positions[0, :1].tolist(), plan.positions[1, :2].tolist()] == [[1], [0, 1]]
    assert plan.token_counts.tolist() == [1, 2, 0]
    assert [plan.token_rows[0, :1].tolist(), plan.token_rows[1].tolist()] == [[3], [0, 4]]


def test_plan_lists_each_chosen_pair_once() -> None:
    """By head and by token the same pairs, over several tiles of queries, in ascending order."""
    num_sequences, num_heads = 2, 33
    num_queries = 2 * MASK_TILE_SIZE // 64 + 5  # three tiles, as 33 heads are padded to 64
    subset = torch.rand(num_sequences, num_queries, num_heads, device=DEVICE) < 0.3
    plan = plan_heads(subset)
    assert torch.equal(plan.counts.view(num_sequences, num_heads), subset.sum(1, dtype=torch.int32))
    assert torch.equal(plan.token_counts.view(num_sequences, num_queries), subset.sum(2, dtype=torch.int32))
    by_head = {
        number * num_queries + rank: (number, query)
        for number, (queries, count) in enumerate(zip(plan.positions.tolist(), plan.counts.tolist(), strict=True))
        for rank, query in enumerate(queries[:count])
    }
    by_token = {
        row: (token // num_queries * num_heads + head, token % num_queries)
        for token, (rows, heads) in enumerate(zip(plan.token_rows.tolist(), subset.flatten(0, 1), strict=True))
        for row, head in zip(rows, heads.nonzero().flatten().tolist(), strict=False)
    }
    assert by_head == by_token


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_tiles_fit_the_queries(dtype: torch.dtype) -> None:
    """At least 16 rows, which a tensor core needs, and never twice the queries or more beyond that."""
    for num_queries in (1, 16, 17, 64, 500, 512, 5000):
        rows = head_tile(num_queries, dtype).block_rows
        assert rows & (rows - 1) == 0
        assert 16 <= rows <= max(16, min(128, 2 * num_queries - 1))

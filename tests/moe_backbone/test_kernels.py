"""Ops equal a loop over tokens and units; compact equals reference; the row counter counts what ran."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_backbone.kernels import Backend, count_rows, expert_mlp, head_attention, rotate
from moe_backbone.kernels.rows import record_rows

HIDDEN_SIZE, HEAD_SIZE, INTERMEDIATE_SIZE = 6, 4, 5
DTYPE = torch.float64
BACKENDS: tuple[Backend, ...] = ("reference", "compact")
HEAD_BACKENDS: tuple[Backend, ...] = (*BACKENDS, "auto")

SUBSETS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda subset: subset,
    "all units": torch.ones_like,
    "no unit": torch.zeros_like,
    "all to one unit": lambda subset: _only(subset, 0),
    "last unit unused": lambda subset: subset & ~_only(subset, -1),
    "one token without units": lambda subset: subset.index_fill(-2, torch.tensor([0]), False),
}
"""What is done to a random subset (..., num_tokens, num_units)."""


def _only(subset: Tensor, unit: int) -> Tensor:
    only = torch.zeros_like(subset)
    only[..., unit] = True
    return only


def _subset(pattern: str, *shape: int) -> Tensor:
    return SUBSETS[pattern](torch.rand(shape) < 0.5)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, requires_grad=True)


def _gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of a random projection of the output; zeros for inputs that it does not depend on."""
    direction = torch.randn(output.shape, dtype=DTYPE, generator=torch.Generator().manual_seed(1))
    loss = (output * direction).sum() + sum(0 * tensor.sum() for tensor in inputs)
    return list(torch.autograd.grad(loss, inputs))


def _expert_inputs(num_tokens: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden rows, weights, gate_up and down."""
    return (
        _random(num_tokens, HIDDEN_SIZE),
        _random(num_tokens, num_experts),
        _random(num_experts, HIDDEN_SIZE, 2 * INTERMEDIATE_SIZE),
        _random(num_experts, INTERMEDIATE_SIZE, HIDDEN_SIZE),
    )


def _expert(row: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = row @ gate_up[:, :INTERMEDIATE_SIZE], row @ gate_up[:, INTERMEDIATE_SIZE:]
    return (gate * torch.sigmoid(gate) * up) @ down


def _looped_expert_mlp(hidden: Tensor, weights: Tensor, subset: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = []
    for token in range(len(hidden)):
        row = torch.zeros(HIDDEN_SIZE, dtype=DTYPE)
        for expert in range(len(gate_up)):
            if subset[token, expert]:
                row = row + weights[token, expert] * _expert(hidden[token], gate_up[expert], down[expert])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("pattern", SUBSETS)
@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_expert_mlp_equals_a_loop_over_tokens_and_experts(num_tokens: int, num_experts: int, pattern: str) -> None:
    """Output of each backend and every gradient are those of one token and one expert at a time."""
    hidden, weights, gate_up, down = inputs = _expert_inputs(num_tokens, num_experts)
    subset = _subset(pattern, num_tokens, num_experts)
    output = expert_mlp(hidden, weights, subset, gate_up, down)
    expected = _looped_expert_mlp(hidden, weights, subset, gate_up, down)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(_gradients(output, inputs), _gradients(expected, inputs))
    with torch.no_grad():
        torch.testing.assert_close(expert_mlp(hidden, weights, subset, gate_up, down, "compact"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expert_mlp_multiplies_only_chosen_rows(backend: Backend) -> None:
    """The docstring's example: expert 1 for the second of two tokens is one row, and no NaN of another expert leaks."""
    hidden, weights, gate_up, down = (tensor.detach() for tensor in _expert_inputs(2, 3))
    hidden[0], weights[0], gate_up[[0, 2]], down[[0, 2]] = math.nan, math.nan, math.nan, math.nan
    subset = torch.tensor([[False, False, False], [False, True, False]])
    with count_rows() as rows:
        output = expert_mlp(hidden, weights, subset, gate_up, down, backend)
    assert rows["experts"] == 1
    assert output[0].eq(0).all()
    torch.testing.assert_close(output[1], weights[1, 1] * _expert(hidden[1], gate_up[1], down[1]))


def test_expert_mlp_mixes_the_chosen_experts() -> None:
    """The docstring's example: weights .25 and .75 on experts 0 and 2, and no other."""
    hidden, _, gate_up, down = _expert_inputs(1, 3)
    weights = torch.tensor([[0.25, 9.0, 0.75]], dtype=DTYPE)
    output = expert_mlp(hidden, weights, torch.tensor([[True, False, True]]), gate_up, down)
    first, last = (_expert(hidden[0], gate_up[expert], down[expert]) for expert in (0, 2))
    torch.testing.assert_close(output[0], 0.25 * first + 0.75 * last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expert_mlp_gives_exact_zeros_to_a_token_without_experts(backend: Backend) -> None:
    """Zero to the bit, so that the residual stream really passes unchanged."""
    hidden, weights, gate_up, down = _expert_inputs(5, 3)
    subset = torch.ones(5, 3, dtype=torch.bool)
    subset[2] = False
    with torch.no_grad():
        output = expert_mlp(hidden, weights, subset, gate_up, down, backend)
    assert output[2].eq(0).all()
    assert output[[0, 1, 3, 4]].ne(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expert_mlp_of_no_tokens_is_empty(backend: Backend) -> None:
    """An empty batch gives an empty output, not an error."""
    hidden, weights, gate_up, down = _expert_inputs(0, 3)
    with torch.no_grad():
        output = expert_mlp(hidden, weights, torch.zeros(0, 3, dtype=torch.bool), gate_up, down, backend)
    assert output.shape == (0, HIDDEN_SIZE)


def test_rotate_by_a_quarter_turn() -> None:
    """The docstring's example: (1, 0) becomes (0, 1)."""
    rotation = torch.tensor([[[0.0]], [[1.0]]])
    torch.testing.assert_close(rotate(torch.tensor([[1.0, 0.0]]), rotation), torch.tensor([[0.0, 1.0]]))


def test_rotated_products_depend_on_the_distance_only() -> None:
    """Moving query and key by the same number of positions leaves their product unchanged."""
    angles = torch.outer(torch.arange(9, dtype=DTYPE), torch.tensor([1.0, 0.1], dtype=DTYPE))
    rotation = torch.stack((angles.cos(), angles.sin()))
    query, key = torch.randn(2, 1, HEAD_SIZE, dtype=DTYPE)

    def product(query_position: int, key_position: int) -> Tensor:
        turned = rotate(query, rotation[:, query_position, None]), rotate(key, rotation[:, key_position, None])
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(5, 2), product(8, 5))
    assert not torch.isclose(product(5, 2), product(5, 3))


def _attention_inputs(num_sequences: int, num_queries: int, num_keys: int, num_heads: int) -> tuple[Tensor, ...]:
    """Every argument of the op but the subset: hidden, weights, query, keys, values, output, rotation."""
    angles = torch.rand(num_queries, HEAD_SIZE // 2, dtype=DTYPE)
    return (
        _random(num_sequences, num_queries, HIDDEN_SIZE),
        _random(num_sequences, num_queries, num_heads),
        _random(num_heads, HIDDEN_SIZE, HEAD_SIZE),
        _random(num_sequences, num_heads, num_keys, HEAD_SIZE),
        _random(num_sequences, num_heads, num_keys, HEAD_SIZE),
        _random(num_heads, HEAD_SIZE, HIDDEN_SIZE),
        torch.stack((angles.cos(), angles.sin())),
    )


def _attend(backend: Backend, subset: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    hidden, weights, *rest = inputs
    with torch.set_grad_enabled(backend == "reference"):
        return head_attention(hidden, weights, subset, *rest, backend=backend)


def _turn(vector: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of one vector as a complex product."""
    half = len(vector) // 2
    turned = torch.complex(vector[:half], vector[half:]) * torch.complex(cosine, sine)
    return torch.cat((turned.real, turned.imag))


def _looped_head_attention(subset: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    hidden, weights, query_weight, keys, values, output_weight, rotation = inputs
    earlier_keys = keys.shape[2] - hidden.shape[1]
    rows = []
    for sequence, token in torch.cartesian_prod(torch.arange(len(hidden)), torch.arange(hidden.shape[1])).tolist():
        row = torch.zeros(HIDDEN_SIZE, dtype=DTYPE)
        for head in subset[sequence, token].nonzero().flatten().tolist():
            seen = earlier_keys + token + 1
            query = _turn(hidden[sequence, token] @ query_weight[head], *rotation[:, token])
            attention = (keys[sequence, head, :seen] @ query / math.sqrt(HEAD_SIZE)).softmax(0)
            update = (attention @ values[sequence, head, :seen]) @ output_weight[head]
            row = row + weights[sequence, token, head] * update
        rows.append(row)
    return torch.stack(rows).view_as(hidden)


ATTENTION_SIZES = [
    pytest.param((2, 5, 5, 3), id="prompt"),
    pytest.param((1, 1, 1, 2), id="one token"),
    pytest.param((2, 4, 4, 1), id="one head"),
    pytest.param((2, 3, 7, 3), id="fewer queries than keys"),
    pytest.param((3, 1, 6, 2), id="one token after a cache"),
]


@pytest.mark.parametrize("pattern", SUBSETS)
@pytest.mark.parametrize("sizes", ATTENTION_SIZES)
@pytest.mark.parametrize("backend", HEAD_BACKENDS)
def test_head_attention_equals_a_loop_over_tokens_and_heads(
    backend: Backend, sizes: tuple[int, int, int, int], pattern: str
) -> None:
    """Each backend gives what one token and one head at a time give."""
    inputs = _attention_inputs(*sizes)
    subset = _subset(pattern, sizes[0], sizes[1], sizes[3])
    torch.testing.assert_close(_attend(backend, subset, inputs), _looped_head_attention(subset, inputs))


@pytest.mark.parametrize("sizes", ATTENTION_SIZES)
def test_reference_attention_has_the_gradients_of_the_loop(sizes: tuple[int, int, int, int]) -> None:
    """Pretraining follows the gradients of the definition, for every input."""
    inputs = _attention_inputs(*sizes)
    subset = _subset("random", sizes[0], sizes[1], sizes[3])
    expected = _gradients(_looped_head_attention(subset, inputs), inputs[:-1])
    torch.testing.assert_close(_gradients(_attend("reference", subset, inputs), inputs[:-1]), expected)


@pytest.mark.parametrize("backend", ["compact", "auto"])
@pytest.mark.parametrize("seed_", range(8))
def test_attention_equals_reference_over_random_subsets(seed_: int, backend: Backend) -> None:
    """Skipping heads gives what masking them gives, from almost none chosen to almost all."""
    torch.manual_seed(seed_)
    inputs = _attention_inputs(3, 11, 13, 5)
    subset = torch.rand(3, 11, 5) < (seed_ + 0.5) / 8
    torch.testing.assert_close(_attend(backend, subset, inputs), _attend("reference", subset, inputs))


@pytest.mark.parametrize(("share", "skips"), [(0.02, True), (0.9, False)], ids=["few heads", "most heads"])
def test_auto_skips_heads_where_that_pays(share: float, skips: bool) -> None:
    """Few chosen heads run alone; where most are chosen all of them run in one product."""
    inputs = _attention_inputs(2, 32, 32, 4)
    subset = torch.rand(2, 32, 4) < share
    with count_rows() as rows:
        _attend("auto", subset, inputs)
    assert rows["heads"] == (subset.sum() if skips else subset.numel())


@pytest.mark.parametrize("backend", HEAD_BACKENDS)
def test_head_attention_gives_exact_zeros_to_a_token_without_heads(backend: Backend) -> None:
    """Zero to the bit, so that the residual stream really passes unchanged."""
    subset = torch.ones(2, 5, 3, dtype=torch.bool)
    subset[1, 2] = False
    output = _attend(backend, subset, _attention_inputs(2, 5, 5, 3))
    assert output[1, 2].eq(0).all()
    assert output[1, 3].ne(0).all()


@pytest.mark.parametrize("backend", HEAD_BACKENDS)
def test_head_attention_of_no_sequences_is_empty(backend: Backend) -> None:
    """An empty batch gives an empty output, not an error."""
    output = _attend(backend, torch.zeros(0, 5, 3, dtype=torch.bool), _attention_inputs(0, 5, 5, 3))
    assert output.shape == (0, 5, HIDDEN_SIZE)


def test_compact_attention_multiplies_only_chosen_rows() -> None:
    """The docstring's example: head 0 for the second of two tokens is one row; the reference runs all four."""
    inputs = _attention_inputs(1, 2, 2, 2)
    subset = torch.tensor([[[False, False], [True, False]]])
    rows = {}
    for backend in BACKENDS:
        with count_rows() as counter:
            _attend(backend, subset, inputs)
        rows[backend] = counter["heads"]
    assert rows == {"reference": 4, "compact": 1}


def test_row_counters_nest() -> None:
    """An inner counter takes nothing from the outer one and stops when it closes, though their counts are equal."""
    with count_rows() as outer:
        with count_rows() as inner:
            record_rows("experts", 2)
        record_rows("experts", 3)
    record_rows("experts", 4)
    assert (inner["experts"], outer["experts"]) == (2, 5)

"""The Triton experts equal the reference in output and gradients, for any subset, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_backbone.kernels import (
    count_rows,
    reference,
    tiles,
    triton_experts,
    triton_experts_backward,
    triton_experts_forward,
    triton_plan,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (5e-2, 5e-2),
}
"""Largest relative and absolute difference from the reference in float32."""
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    pytest.param(
        torch.bfloat16,
        id="bfloat16",
        marks=pytest.mark.skipif(triton_plan.INTERPRETED, reason="Triton's interpreter is wrong on bfloat16"),
    ),
]


class Case(NamedTuple):
    """Sizes, share of chosen pairs, what is done to the random subset, expected rows of an expert."""

    num_tokens: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    share: float = 0.4
    change: Callable[[Tensor], Tensor] = torch.clone
    rows_per_unit: int = 8


def _without(token_or_expert: int, dim: int) -> Callable[[Tensor], Tensor]:
    return lambda subset: subset.index_fill(dim, torch.tensor([token_or_expert], device=subset.device), False)


def _all_to_one(subset: Tensor) -> Tensor:
    return torch.zeros_like(subset).index_fill(1, torch.tensor([1], device=subset.device), True)


CASES = [
    pytest.param(Case(37, 5, 29, 23), id="primes"),
    pytest.param(Case(41, 3, 70, 67), id="several tiles in each direction"),
    pytest.param(Case(24, 4, 32, 16), id="sizes without a rest"),
    pytest.param(Case(53, 2, 31, 17, rows_per_unit=30), id="tiles of 32 rows"),
    pytest.param(Case(71, 2, 31, 17, 0.95, rows_per_unit=70), id="tiles of 64 rows"),
    pytest.param(Case(135, 2, 19, 17, 0.98, rows_per_unit=300), id="tiles of 128 rows"),
    pytest.param(Case(1, 3, 17, 19, 1.0), id="one token"),
    pytest.param(Case(1, 1, 1, 1, 1.0), id="one of everything"),
    pytest.param(Case(0, 3, 17, 19), id="empty batch"),
    pytest.param(Case(9, 3, 17, 19, 0.0), id="empty mask"),
    pytest.param(Case(19, 4, 17, 19, change=_without(2, 1)), id="an expert without tokens"),
    pytest.param(Case(19, 4, 17, 19, change=_without(3, 0)), id="a token without experts"),
    pytest.param(Case(35, 3, 17, 19, change=_all_to_one), id="all to one expert"),
    pytest.param(Case(19, 3, 17, 19, 1.0), id="all experts for all tokens"),
    pytest.param(Case(13, 41, 17, 11, 0.1), id="more experts than one block"),
]


class Inputs(NamedTuple):
    """Arguments of the op."""

    hidden: Tensor
    weights: Tensor
    subset: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def trained(self) -> list[Tensor]:
        """What has a gradient."""
        return [self.hidden, self.weights, self.gate_up, self.down]


def _inputs(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()

    num_tokens, num_experts, hidden_size, intermediate_size, share, change, _ = case
    return Inputs(
        hidden=random(num_tokens, hidden_size),
        weights=random(num_tokens, num_experts),
        subset=change(torch.rand(num_tokens, num_experts, device=DEVICE) < share),
        gate_up=random(num_experts, hidden_size, 2 * intermediate_size, scale=hidden_size**-0.5),
        down=random(num_experts, intermediate_size, hidden_size, scale=intermediate_size**-0.5),
    )


def _expected(inputs: Inputs, grad_output: Tensor) -> list[Tensor]:
    """Output and gradients of the reference in float32."""
    exact = Inputs(*(tensor.detach().float() for tensor in inputs))._replace(subset=inputs.subset)
    for tensor in exact.trained:
        tensor.requires_grad_()
    output = reference.expert_mlp(*exact)
    output = output + 0 * sum(tensor.sum() for tensor in exact.trained)  # an empty mask leaves no way back
    return [output, *torch.autograd.grad(output, exact.trained, grad_output.float())]


def _results(inputs: Inputs, grad_output: Tensor, rows_per_unit: int = 8) -> list[Tensor]:
    output = triton_experts.expert_mlp(*inputs, rows_per_unit=rows_per_unit)
    return [output, *torch.autograd.grad(output, inputs.trained, grad_output)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    """Whatever the sizes and the subset; scratch memory holds NaN before it is written."""
    inputs = _inputs(case, dtype)
    grad_output = torch.randn_like(inputs.hidden)
    results = _results(inputs, grad_output, case.rows_per_unit)
    rtol, atol = TOLERANCES[dtype]
    names = ("output", "hidden", "weights", "gate_up", "down")
    for name, result, expected in zip(names, results, _expected(inputs, grad_output), strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


def test_scratch_memory_is_poisoned() -> None:
    """What the other tests rely on: empty tensors come filled with NaN."""
    assert torch.empty(3).isnan().all()


def test_what_was_not_chosen_does_not_leak() -> None:
    """NaN in weights, tokens and experts that no one chose: zeros to the bit, and no NaN anywhere."""
    inputs = _inputs(Case(19, 4, 17, 19, change=lambda subset: _without(3, 0)(_without(2, 1)(subset))))
    with torch.no_grad():
        inputs.weights[~inputs.subset] = torch.nan
        inputs.hidden[3], inputs.gate_up[2], inputs.down[2] = torch.nan, torch.nan, torch.nan
    output, hidden, weights, gate_up, down = _results(inputs, torch.randn_like(inputs.hidden))
    assert output[3].eq(0).all()
    assert hidden[3].eq(0).all()
    assert weights[~inputs.subset].eq(0).all()
    assert gate_up[2].eq(0).all()
    assert down[2].eq(0).all()
    for tensor in (output, hidden, weights, gate_up, down):
        assert tensor.isfinite().all()


def test_equal_inputs_give_equal_bits() -> None:
    """Twice the same call, output and gradients."""
    inputs = _inputs(Case(37, 5, 29, 23))
    grad_output = torch.randn_like(inputs.hidden)
    for first, second in zip(_results(inputs, grad_output), _results(inputs, grad_output), strict=True):
        assert torch.equal(first, second)


def test_noncontiguous_arguments() -> None:
    """Views are copied where a kernel needs them whole; an expanded gradient too."""
    inputs = _inputs(Case(19, 3, 17, 13))
    views = Inputs(*(tensor.detach().mT.contiguous().mT for tensor in inputs))._replace(
        subset=inputs.subset.mT.clone().mT
    )
    for tensor in views.trained:
        tensor.requires_grad_()
    grad_output = torch.ones((), device=DEVICE).expand(19, 17)
    rtol, atol = TOLERANCES[torch.float32]
    for result, expected in zip(_results(views, grad_output), _expected(inputs, grad_output), strict=True):
        torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)


def test_frozen_experts_get_no_gradient() -> None:
    """A router can be trained through experts that are not, and its gradients stay the same."""
    inputs = _inputs(Case(19, 3, 17, 13))
    grad_output = torch.randn_like(inputs.hidden)
    expected = _results(inputs, grad_output)[1:3]
    inputs.gate_up.requires_grad_(False)
    inputs.down.requires_grad_(False)
    output = triton_experts.expert_mlp(*inputs, rows_per_unit=8)
    for result, equal in zip(torch.autograd.grad(output, inputs.trained[:2], grad_output), expected, strict=True):
        assert torch.equal(result, equal)


def test_rows_of_a_call_are_counted_and_expected_by_the_next() -> None:
    """The rows that ran reach the counters and the layer's hint; other tiles change the result by rounding only."""
    inputs = _inputs(Case(37, 5, 29, 23))
    with torch.no_grad(), count_rows() as rows:
        output = triton_experts.expert_mlp(*inputs)
        torch.testing.assert_close(output, triton_experts.expert_mlp(*inputs, rows_per_unit=300))
    chosen = inputs.subset.sum(0)
    assert rows["experts"] == 2 * chosen.sum()
    if DEVICE == "cpu":  # on a GPU the copy may still be under way
        mean = chosen[chosen > 0].float().mean().item()
        assert triton_experts._hints[inputs.gate_up].rows_per_unit(37) == round(mean)


def test_gradient_of_the_mixing_weights_of_the_docstring() -> None:
    """Sums [5, 6, 7] of the rows of mask [[0, 1], [1, 1]] go to [[0, 6], [5, 7]]: by unit, then by token."""
    subset = torch.tensor([[False, True], [True, True]], device=DEVICE)
    plan = triton_plan.plan_routing(subset, 16)
    sums = torch.tensor([[5.0], [6.0], [7.0], [torch.nan]], device=DEVICE)
    result = torch.empty(2, 2, device=DEVICE)
    triton_experts_backward._mixing_gradient_kernel[(1,)](
        subset.view(torch.uint8), plan.token_rows, sums, result, 2, COLUMN_TILES=1, **triton_plan.mask_tile(2)
    )
    assert result.tolist() == [[0, 6], [5, 7]]


def _two_units(rows_of_first: int, rows_of_second: int) -> triton_plan.RoutingPlan:
    """Plan of two units with these many tokens each, no token in both."""
    num_tokens = rows_of_first + rows_of_second
    first = torch.arange(num_tokens, device=DEVICE) < rows_of_first
    return triton_plan.plan_routing(torch.stack((first, ~first), dim=1), 16)


def test_project_of_the_docstring() -> None:
    """Rows [[1], [2], [3]], the last of unit 1, times [[[10]], [[100]]]."""
    rows = torch.tensor([[1.0], [2.0], [3.0]], device=DEVICE)
    matrices = torch.tensor([[[10.0]], [[100.0]]], device=DEVICE)
    assert triton_experts_forward.project(_two_units(2, 1), rows, matrices, transposed=False).tolist() == [
        [10],
        [20],
        [300],
    ]


def test_activation_of_the_docstring() -> None:
    """Gate 0 and up 3 give 0; gate 10, up 3 and weight .5 give 15: one token of each of two experts."""
    hidden, weights = torch.ones(2, 1, device=DEVICE), torch.full((2, 2), 0.5, device=DEVICE)
    gate_up = torch.tensor([[[0.0, 3.0]], [[10.0, 3.0]]], device=DEVICE)
    down = torch.ones(2, 1, 1, device=DEVICE)
    output, pre_activations = triton_experts_forward.forward(
        _two_units(1, 1), hidden, weights, gate_up, down, save=True
    )
    torch.testing.assert_close(output.cpu(), torch.tensor([[0.0], [15.0]]), rtol=0, atol=1e-3)
    assert pre_activations[:2].tolist() == [[0, 3], [10, 3]]


def test_gradients_of_the_docstrings() -> None:
    """One token with gate 0, up 3, weight .5 and gradient 1; left [[1], [2]] and right [[10], [100]] give 210."""
    inputs = Inputs(
        hidden=torch.ones(1, 1, device=DEVICE),
        weights=torch.full((1, 1), 0.5, device=DEVICE),
        subset=torch.ones(1, 1, dtype=torch.bool, device=DEVICE),
        gate_up=torch.tensor([[[0.0, 3.0]]], device=DEVICE),
        down=torch.ones(1, 1, 1, device=DEVICE),
    )
    for tensor in inputs.trained:
        tensor.requires_grad_()
    _, _, weights, gate_up, down = _results(inputs, torch.ones(1, 1, device=DEVICE))
    assert (weights.item(), gate_up.flatten().tolist(), down.item()) == (0, [0.75, 0], 0)

    left, right = torch.tensor([[1.0], [2.0]], device=DEVICE), torch.tensor([[10.0], [100.0]], device=DEVICE)
    result = torch.empty(2, 1, 1, device=DEVICE)
    triton_experts_backward._expert_gradient(_two_units(2, 0), left, right, result, left_by_token=True)
    assert result.flatten().tolist() == [210, 0]


def test_rows_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row that starts at element 2**31 is found; only pages that are touched take memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    width = 1024
    last = 2**31 // width
    plan = _two_units(1, 0)
    plan.tile_starts[0] = last
    plan.unit_offsets[:2] = torch.tensor([last, last + 1])
    rows = torch.empty(last + 1, width, dtype=torch.float16, device=DEVICE)
    rows[last] = 0.5
    matrices = torch.ones(2, width, 1, dtype=torch.float16, device=DEVICE)
    assert triton_experts_forward.project(plan, rows, matrices, transposed=False)[last].item() == width / 2


def test_ops_keep_the_contract_of_custom_ops() -> None:
    """Schema, fake tensors with dynamic shapes, autograd; all units are chosen, as an unused row is never written."""
    inputs = _inputs(Case(7, 2, 9, 5, 1.0))
    torch.library.opcheck(triton_experts._expert_mlp, (*inputs, 16, True))
    torch.library.opcheck(triton_experts._expert_mlp, (*(tensor.detach() for tensor in inputs), 16, False))
    hidden, weights, subset, gate_up, down = (tensor.detach() for tensor in inputs)
    pre_activations = torch.randn(14, 10, device=DEVICE)
    for train_experts in (True, False):
        arguments = (hidden, pre_activations, hidden, weights, subset, gate_up, down, 16, train_experts)
        torch.library.opcheck(triton_experts._expert_mlp_backward, arguments)


def test_warmup_compiles_forward_and_backward_of_each_height(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later calls find every variant: with gradients, without them and backward, at each number of rows."""
    seen = []

    def spy(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(plan: triton_plan.RoutingPlan, *args: object, **kwargs: object) -> object:
            seen.append((name, plan.block_rows, kwargs.get("save")))
            return function(plan, *args, **kwargs)

        return call

    monkeypatch.setattr(triton_experts, "forward", spy("forward", triton_experts.forward))
    monkeypatch.setattr(triton_experts, "backward", spy("backward", triton_experts.backward))
    triton_experts.warmup(16, 16, 2, torch.float16, torch.device(DEVICE))
    heights = tiles.tile_heights(torch.float16)
    expected = {("forward", rows, save) for rows in heights for save in (True, False)}
    assert set(seen) == expected | {("backward", rows, None) for rows in heights}


WRONG = [
    pytest.param(
        "hidden", lambda t: t[0], r"hidden must have shape \(num_tokens, hidden_size\), got \(9,\)", id="vector"
    ),
    pytest.param("down", lambda t: t[0], r"down must have shape \(num_experts, .*got \(5, 9\)", id="one expert"),
    pytest.param("weights", lambda t: t[:, :1], r"weights must have shape \(7, 2\), got \(7, 1\)", id="weights"),
    pytest.param("subset", lambda t: t[:3], r"subset must have shape \(7, 2\), got \(3, 2\)", id="subset"),
    pytest.param(
        "gate_up", lambda t: t[..., 1:], r"gate_up must have shape \(2, 9, 10\), got \(2, 9, 9\)", id="gate_up"
    ),
    pytest.param("subset", lambda t: t.int(), r"subset must be bool, got torch.int32", id="mask of integers"),
    pytest.param("hidden", lambda t: t.double(), r"hidden must be bfloat16, float16 or float32", id="double"),
    pytest.param(
        "down", lambda t: t.half(), r"down must have the dtype of hidden, torch.float32, got", id="two dtypes"
    ),
    pytest.param(
        "down", lambda t: t.to("meta"), r"down must lie on the device of hidden, .*got meta", id="two devices"
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_wrong_arguments_are_refused(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    """Name, rule, actual."""
    inputs = _inputs(Case(7, 2, 9, 5))
    with pytest.raises(ValueError, match=message):
        triton_experts.expert_mlp(*inputs._replace(**{name: change(getattr(inputs, name))}))


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """No silent fallback."""
    inputs = Inputs(*(tensor.detach().cpu() for tensor in _inputs(Case(7, 2, 9, 5))))
    monkeypatch.setattr(triton_experts, "INTERPRETED", False)
    with pytest.raises(ValueError, match="hidden must lie on a CUDA device unless TRITON_INTERPRET=1 is set, got cpu"):
        triton_experts.expert_mlp(*inputs)


def test_the_interpreter_refuses_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be wrong without an error."""
    monkeypatch.setattr(triton_experts, "INTERPRETED", True)
    with pytest.raises(ValueError, match="hidden must be float16 or float32 under TRITON_INTERPRET=1, got"):
        triton_experts.expert_mlp(*_inputs(Case(7, 2, 9, 5), torch.bfloat16))

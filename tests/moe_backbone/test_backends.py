"""Which kernels run, and weights that are laid out once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moe_backbone import MoETransformer, NativeRouter
from moe_backbone import kernels as ops
from moe_backbone.attention import KeyValueCache
from moe_backbone.kernels import layouts

ROWS, INPUTS, OUTPUTS = 32, 128, 192  # large enough to be packed


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Layouts are for inference; a test that wants gradients says so."""
    with torch.no_grad():
        yield


@pytest.fixture
def weight(seed: int) -> Tensor:
    """Three matrices (3, INPUTS, OUTPUTS), frozen."""
    return torch.randn(3, INPUTS, OUTPUTS)


@pytest.fixture
def rows(seed: int) -> Tensor:
    """Rows to multiply (ROWS, INPUTS)."""
    return torch.randn(ROWS, INPUTS)


def _expert_arguments() -> tuple[Tensor, ...]:
    return torch.randn(3, 4), torch.rand(3, 2), torch.rand(3, 2) < 0.5, torch.randn(2, 4, 6), torch.randn(2, 3, 4)


def test_auto_says_once_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    """One line an op, and another only when gradients change the choice."""
    ops._choose.cache_clear()
    arguments = _expert_arguments()
    with caplog.at_level(logging.INFO, logger="moe_backbone.kernels"):
        for _ in range(3):
            ops.expert_mlp(*arguments)
        arguments[0].requires_grad_()
        with torch.enable_grad():
            ops.expert_mlp(*arguments).sum().backward()
    assert caplog.messages == [
        "expert_mlp on cpu: compact kernels",
        "expert_mlp on cpu with gradients: reference kernels",
    ]


def test_unknown_backend_is_refused() -> None:
    """One line with name, rule and actual."""
    with pytest.raises(ValueError, match="backend must be one of auto, reference, compact, triton, got 'cuda'"):
        ops.expert_mlp(*_expert_arguments(), backend="cuda")  # type: ignore[arg-type]


def test_compact_refuses_gradients() -> None:
    """It has none, and says which backends do."""
    arguments = _expert_arguments()
    refusal = pytest.raises(ValueError, match="backend must be 'reference' or 'triton' where a gradient is wanted")
    with refusal, torch.enable_grad():
        ops.expert_mlp(arguments[0].requires_grad_(), *arguments[1:], backend="compact")


def test_triton_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for Triton without it is an error that says what to install, never another backend."""
    ops._triton.cache_clear()
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="backend 'triton' must have Triton installed"):
        ops.expert_mlp(*_expert_arguments(), backend="triton")


def test_products_equal_matrix_products(weight: Tensor, rows: Tensor) -> None:
    """Packed for many rows, plain for one."""
    for matrix, product in zip(weight, layouts.products(weight), strict=True):
        torch.testing.assert_close(product(rows), rows @ matrix, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(product(rows[:1]), rows[:1] @ matrix)


@pytest.mark.parametrize("part", [slice(None), 1], ids=["all", "one matrix"])
def test_a_changed_weight_is_laid_out_again(weight: Tensor, rows: Tensor, part: slice | int) -> None:
    """A layout never outlives the numbers it was made from."""
    layouts.products(weight)
    weight[part] *= 2
    torch.testing.assert_close(layouts.products(weight)[1](rows), rows @ weight[1], rtol=1e-4, atol=1e-4)


def test_a_weight_changed_behind_its_version_is_laid_out_again(weight: Tensor, rows: Tensor) -> None:
    """Averaging of weights edits `.data`, and a fused optimiser's steps leave no version either."""
    layouts.products(weight)
    weight.data.mul_(0.5)
    torch.testing.assert_close(layouts.products(weight)[1](rows), rows @ weight[1], rtol=1e-4, atol=1e-4)
    parameter = torch.nn.Parameter(weight)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    for learns in (False, True, False):
        parameter.requires_grad_(learns)
        expected = rows @ parameter[1]
        torch.testing.assert_close(layouts.products(parameter)[1](rows), expected, rtol=1e-4, atol=1e-4)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def test_weights_made_in_inference_mode_work(rows: Tensor) -> None:
    """They have no version."""
    with torch.inference_mode():
        weight = torch.randn(1, INPUTS, OUTPUTS)
        torch.testing.assert_close(layouts.products(weight)[0](rows), rows @ weight[0], rtol=1e-4, atol=1e-4)
        weight.zero_()
        assert layouts.products(weight)[0](rows).eq(0).all()


@pytest.mark.parametrize(
    ("rows", "length"), [(0, 0), (1, 1), (16, 16), (17, 18), (100, 104), (1000, 1024), (1025, 1152)]
)
def test_numbers_of_rows_are_few(rows: int, length: int) -> None:
    """The docstring's examples: never below, at most an eighth above."""
    assert layouts.common_length(rows) == length


def test_a_layout_is_made_once(weight: Tensor) -> None:
    """Laid out at the first use only."""
    before = len(layouts._layouts)
    first, second = layouts.products(weight)[0], layouts.products(weight)[0]
    if first.packed is None:
        pytest.skip("this build of torch cannot lay out weights")
    assert first.packed is second.packed
    assert len(layouts._layouts) == before + 1


def test_a_turned_weight_is_recognised_without_a_copy(weight: Tensor) -> None:
    """What is looked at to see a change lies in the weight's own memory, also where that is a view."""
    turned = weight.transpose(1, 2)
    stamp = layouts._Stamp.of(turned)
    assert stamp.sample.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    kept = stamp.kept()
    assert kept.fits(turned)
    weight.data += 1
    assert not kept.fits(turned)


def test_a_layout_dies_with_its_weight() -> None:
    """No memory stays behind."""
    gc.collect()  # what earlier tests left
    before = len(layouts._layouts)
    layouts.products(torch.randn(1, INPUTS, OUTPUTS))
    gc.collect()
    assert len(layouts._layouts) == before


def test_gradients_flow_through_a_frozen_linear(rows: Tensor) -> None:
    """The library's product has no gradient, so it is not taken where one is wanted."""
    matrix = torch.randn(OUTPUTS, INPUTS)
    rows.requires_grad_()
    with torch.enable_grad():
        layouts.linear(rows, matrix).sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, matrix.sum(0).expand_as(rows), rtol=1e-4, atol=1e-4)


def test_weights_that_learn_are_not_laid_out(weight: Tensor) -> None:
    """They change at each step."""
    assert layouts.products(weight.requires_grad_())[0].packed is None


@pytest.mark.parametrize("changed", [0, 1])
def test_derived_weights_are_made_once_for_each_state_of_the_weights(weight: Tensor, changed: int) -> None:
    """The same tensor as long as nothing changes, so that its layout stays, and a new one after any change."""
    weights = (weight, torch.randn(3, 1, OUTPUTS))
    product = layouts.Derived(lambda one, other: (one * other,))
    first = product(*weights)[0]
    assert product(*weights)[0] is first
    weights[changed].data.mul_(2)
    torch.testing.assert_close(product(*weights)[0], 2 * first)
    assert product(*weights)[0] is product(*weights)[0]


def test_derived_weights_pass_gradients_on_and_are_not_kept_meanwhile(weight: Tensor) -> None:
    """An optimiser's steps may leave no trace."""
    double = layouts.Derived(lambda weight: (2 * weight,))
    weight.requires_grad_()
    with torch.enable_grad():
        assert double(weight)[0] is not double(weight)[0]
        double(weight)[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.eq(2).all()


def test_derived_weights_made_in_inference_mode_serve_gradients(rows: Tensor, weight: Tensor) -> None:
    """Evaluation may come before the training of something that reads a frozen backbone."""
    double = layouts.Derived(lambda weight: (2 * weight,))
    with torch.inference_mode():
        made = double(weight)[0]
    with torch.enable_grad():
        (rows.requires_grad_() @ double(weight)[0][0]).sum().backward()
    assert double(weight)[0] is made
    assert rows.grad is not None


def test_cache_returns_what_was_written() -> None:
    """Positions come back in order, and writing at the same length again replaces them."""
    cache = KeyValueCache(num_layers=1, capacity=5)
    first, second, other = torch.randn(3, 2, 3, 2, 4)
    cache.extend(0, first, -first)
    cache.length = 2
    cache.extend(0, other, -other)
    keys, values = cache.extend(0, second, -second)
    torch.testing.assert_close(keys, torch.cat((first, second), dim=2))
    torch.testing.assert_close(values, -keys)


def test_cache_refuses_other_sequences() -> None:
    """One sequence would be broadcast over the others' past."""
    cache = KeyValueCache(num_layers=1, capacity=5)
    cache.extend(0, torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 4))
    with pytest.raises(ValueError, match="cache must get the same 3 sequences again, got 1"):
        cache.extend(0, torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad], ids=["inference mode", "gradients"])
def test_a_prompt_in_another_mode_can_be_decoded(
    tiny_backbone: MoETransformer, tiny_tokens: Tensor, mode: type[torch.enable_grad]
) -> None:
    """A cache filled in inference mode or under gradients goes on without them."""
    expected, _ = tiny_backbone.run(tiny_tokens[:, :6], NativeRouter())
    cache = tiny_backbone.new_cache()
    with mode():
        tiny_backbone.requires_grad_(mode is torch.enable_grad).run(tiny_tokens[:, :4], NativeRouter(), cache=cache)
    steps = [tiny_backbone.run(tiny_tokens[:, [i]], NativeRouter(), cache=cache)[0] for i in (4, 5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected[:, 4:], rtol=1e-4, atol=1e-5)


def test_sizes_beyond_the_gpu_kernels_are_known() -> None:
    """`auto` must not take kernels that would refuse."""
    half, single = torch.zeros(1, 1, 256).half(), torch.zeros(1, 1, 256)
    heads = torch.zeros(2, 256, 128)
    assert ops._suits_triton("head_attention", (single, single, heads))
    assert not ops._suits_triton("head_attention", (single, single, torch.zeros(2, 512, 256)))
    assert not ops._suits_triton("head_attention", (single, single, torch.zeros(65, 256, 2)))
    assert not ops._suits_triton("expert_mlp", (half, single))
    assert not ops._suits_triton("expert_mlp", (single.double(), single.double()))


def test_a_backbone_that_learns_and_a_frozen_one_agree(tiny_backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """Reference kernels with gradients and compact kernels without give the same logits."""
    frozen, _ = tiny_backbone.run(tiny_tokens, NativeRouter())
    with torch.enable_grad():
        learning, _ = tiny_backbone.requires_grad_().run(tiny_tokens, NativeRouter())
    assert learning.requires_grad
    torch.testing.assert_close(frozen, learning.detach(), rtol=1e-4, atol=1e-5)

"""Frozen weights laid out once for the CPU's matrix library, which otherwise repacks them at every product."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SMALLEST_PACKED = 500_000
"""Multiply-adds of one product below which calling the library costs more than its layout saves."""


class Weight(NamedTuple):
    """A matrix, and what the library made of it."""

    plain: Tensor
    """(inputs, outputs)."""
    packed: Tensor | None
    """In the library's own layout; None where there is none."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (num_rows, inputs) times the matrix: (num_rows, outputs)."""
        if self.packed is None or rows.requires_grad or rows.shape[0] * self.plain.numel() < SMALLEST_PACKED:
            return rows @ self.plain
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, None, "none", [], "")


class _Layout(NamedTuple):
    version: int
    place: int
    packed: list[Tensor]


_layouts = WeakTensorKeyDictionary()


def products(weight: Tensor) -> list[Weight]:
    """One `Weight` for each matrix of `weight` (num_units, inputs, outputs), packed where that pays.

    A packed copy lives as long as `weight` itself (not a view of it) and is made again when `weight` was changed in
    place. Weights that require gradients change too often and are never packed.

    Example: `products(down)[3](rows)` is `rows @ down[3]`.
    """
    return _laid_out(weight, lambda: list(weight.unbind(0)), "units")


def joint_product(weight: Tensor, units_in: bool) -> Weight:
    """All matrices of `weight` side by side as one, laid out under the same rules.

    Args:
        weight: (num_units, inputs, outputs).
        units_in: Whether units lie along the inputs (num_units * inputs, outputs), or along the outputs
            (inputs, num_units * outputs).
    """

    def join() -> list[Tensor]:
        return [weight.flatten(0, 1) if units_in else weight.transpose(0, 1).flatten(1)]

    return _laid_out(weight, join, "joint")[0]


def linear(hidden: Tensor, weight: Tensor, *, outputs_first: bool = True) -> Tensor:
    """Product with one matrix.

    Args:
        hidden: (..., inputs).
        weight: (outputs, inputs) as in `nn.Linear`, or (inputs, outputs).
        outputs_first: Which of the two.

    Returns:
        (..., outputs).
    """
    product = _laid_out(weight, lambda: [weight.t() if outputs_first else weight], "matrix")[0]
    return product(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])


def _laid_out(weight: Tensor, matrices: Callable[[], list[Tensor]], form: str) -> list[Weight]:
    plain = matrices()
    if not _can_pack(weight):
        return [Weight(matrix, None) for matrix in plain]
    layout = _layouts.setdefault(weight, {}).get(form)
    if layout is None or (layout.version, layout.place) != (weight._version, weight.data_ptr()):
        reorder = torch.ops.mkldnn._reorder_linear_weight
        packed = [reorder(matrix.t().contiguous()) for matrix in plain]
        layout = _layouts[weight][form] = _Layout(weight._version, weight.data_ptr(), packed)
    return [Weight(matrix, packed) for matrix, packed in zip(plain, layout.packed, strict=True)]


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not weight.requires_grad
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )

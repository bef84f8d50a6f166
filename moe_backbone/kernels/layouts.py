"""Frozen weights laid out once for the CPU's matrix library, which otherwise repacks them at every product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from moe_backbone.precision import is_lowered

SMALLEST_PACKED = 500_000
"""Multiply-adds of one product below which calling the library costs more than its layout saves."""
SAMPLE = 16
"""Numbers of a weight that are compared at each use."""


def common_length(num_rows: int) -> int:
    """The next of a few lengths, at most an eighth above.

    The library compiles a product for every new number of rows, which takes longer than the product itself, so numbers
    that change with every subset must be few.

    Example: up to 16 rows stay as they are, 17 become 18, 100 become 104, 1000 become 1024.
    """
    step = 1 << max(0, (num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


class Weight(NamedTuple):
    """A matrix, and what the library made of it."""

    plain: Tensor
    """(inputs, outputs)."""
    packed: Tensor | None
    """In the library's own layout; None where there is none."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (num_rows, inputs) times the matrix: (num_rows, outputs)."""
        num_rows = rows.shape[0]
        if self.packed is None or num_rows * self.plain.numel() < SMALLEST_PACKED:
            return rows @ self.plain
        if num_rows != common_length(num_rows):
            rows = F.pad(rows, (0, 0, 0, common_length(num_rows) - num_rows))
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, None, "none", [], "")[:num_rows]


class _Stamp(NamedTuple):
    """What tells whether a weight has changed."""

    state: tuple[int, int]
    sample: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> _Stamp:
        version = 0 if weight.is_inference() else weight._version
        as_stored = sorted(range(weight.dim()), key=weight.stride, reverse=True)  # else to flatten would copy a view
        numbers = weight.detach().permute(as_stored).flatten()
        return cls((version, weight.data_ptr()), numbers[:: max(1, weight.numel() // SAMPLE)])

    def fits(self, weight: Tensor) -> bool:
        now = _Stamp.of(weight)
        return self.state == now.state and torch.equal(self.sample, now.sample)

    def kept(self) -> _Stamp:
        """A copy whose sample does not change with the weight."""
        return self._replace(sample=self.sample.clone())


class _Layout(NamedTuple):
    stamp: _Stamp
    weights: list[Weight]


_layouts = WeakTensorKeyDictionary()
_HAS_LAYOUTS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def products(weight: Tensor) -> list[Weight]:
    """One `Weight` for each matrix of `weight` (num_units, inputs, outputs), packed where that pays.

    A packed copy lives as long as `weight` itself (not a view of it) and is made again when `weight` has changed, which
    its version, its place in memory or a sample of its numbers tells: fused optimisers and edits of `.data` leave no
    other trace. It is used where no gradient is wanted (`torch.no_grad`), and weights that learn have none.

    Example: `products(down)[3](rows)` is `rows @ down[3]`.
    """
    return _laid_out(weight, "units", lambda weight: weight.unbind(0))


def joint_product(weight: Tensor, units_in: bool) -> Weight:
    """All matrices of `weight` side by side as one, laid out under the same rules.

    Args:
        weight: (num_units, inputs, outputs).
        units_in: Whether units lie along the inputs (num_units * inputs, outputs), or along the outputs
            (inputs, num_units * outputs).
    """
    if units_in:
        return _laid_out(weight, "joint inputs", lambda weight: (weight.flatten(0, 1),))[0]
    return _laid_out(weight, "joint outputs", lambda weight: (weight.transpose(0, 1).flatten(1),))[0]


def linear(hidden: Tensor, weight: Tensor, *, outputs_first: bool = True) -> Tensor:
    """Product with one matrix.

    Args:
        hidden: (..., inputs).
        weight: (outputs, inputs) as in `nn.Linear`, or (inputs, outputs).
        outputs_first: Which of the two.

    Returns:
        (..., outputs).
    """
    product = _laid_out(weight, "matrix", lambda weight: (weight.t() if outputs_first else weight,))[0]
    return product(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])


def _laid_out(weight: Tensor, form: str, matrices: Callable[[Tensor], Sequence[Tensor]]) -> list[Weight]:
    if weight.requires_grad:
        _layouts.pop(weight, None)
    if torch.is_grad_enabled() or weight.requires_grad or not _can_pack(weight):
        return [Weight(matrix, None) for matrix in matrices(weight)]
    forms = _layouts.setdefault(weight, {})
    layout = forms.get(form)
    if layout is None or not layout.stamp.fits(weight):
        # detached: a view of the weight itself would keep it alive
        packed = [Weight(matrix, _pack(matrix)) for matrix in matrices(weight.detach())]
        layout = forms[form] = _Layout(_Stamp.of(weight).kept(), packed)
    return layout.weights


class Derived:
    """Tensors made from weights, such as products of two of them, which the ops then take as weights.

    On a CPU they are made once and kept until a weight changes, so that they can be laid out; where a weight learns
    they are made at each call, and also on a GPU, which would have to be waited for to see a change.

    Args:
        make: Takes the weights, returns the tensors.
    """

    def __init__(self, make: Callable[..., tuple[Tensor, ...]]) -> None:
        self._make = make
        self._stamps: tuple[_Stamp, ...] = ()
        self._made: tuple[Tensor, ...] = ()

    def __call__(self, *weights: Tensor) -> tuple[Tensor, ...]:
        """What `make` makes of `weights`."""
        if any(weight.requires_grad or weight.device.type != "cpu" for weight in weights):
            self._stamps, self._made = (), ()
            return self._make(*weights)
        if not self._stamps or not all(map(_Stamp.fits, self._stamps, weights)):
            with torch.inference_mode(False), torch.no_grad():  # whoever comes next may want gradients of its inputs
                self._made = self._make(*weights)
            self._stamps = tuple(_Stamp.of(weight).kept() for weight in weights)
        return self._made


def _pack(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix.t().contiguous())


def _can_pack(weight: Tensor) -> bool:
    if not _HAS_LAYOUTS or weight.device.type != "cpu" or is_lowered(weight.device):
        return False
    return weight.dtype == torch.float32 and weight.numel() > 0

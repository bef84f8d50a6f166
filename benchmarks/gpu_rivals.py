"""Expert layers of others, from the same inputs: what they want in another form is made before the clock starts."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.experts import Inputs, Sizes, plain_loop, transformers_layer
from benchmarks.experts import draw as draw_batches

VARIABLE = "ROUTEGYM_RIVALS"
"""Names a folder with a file `rivals.py`, whose function `rivals() -> dict[str, Prepare]` brings further rivals."""


class Slots(NamedTuple):
    """A subset in the form that most others take."""

    ids: Tensor
    """Experts of each token, int64 (num_tokens, num_slots); `num_experts` in a slot that holds none."""
    weights: Tensor
    """Mixing weights (num_tokens, num_slots); zero in a slot that holds none."""


Prepare = Callable[[Inputs, Slots], Callable[[], Tensor]]
"""Lays inputs out, and returns what runs the layer: output (num_tokens, hidden_size)."""


def draw(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, *, any_subset: bool, shares: Tensor | None = None
) -> Inputs:
    """One batch on the device; arguments as in `benchmarks.experts.draw`."""
    return draw_batches(sizes, any_subset=any_subset, batches=1, device=device, dtype=dtype, shares=shares)[0]


def slots(inputs: Inputs, *, any_subset: bool) -> Slots:
    """One slot for each expert where any subset may come, else as many as every token has experts.

    Example: subset [[0, 1, 1]] gives ids [[3, 1, 2]] where any subset may come, else [[1, 2]].
    """
    num_tokens, num_experts = inputs.subset.shape
    if any_subset:
        ids = torch.arange(num_experts, device=inputs.subset.device).where(inputs.subset, num_experts)
        return Slots(ids, inputs.weights * inputs.subset)
    ids = inputs.subset.nonzero()[:, 1].view(num_tokens, -1)
    return Slots(ids, inputs.weights.gather(1, ids))


def _transformers(name: str, inputs: Inputs, given: Slots) -> Callable[[], Tensor]:
    """A function of transformers, told of empty slots only where there are some: its masks for them cost time."""
    from transformers.integrations import moe

    layer = transformers_layer(inputs, masks_empty=bool((given.ids == len(inputs.down)).any()))
    return partial(getattr(moe, f"{name}_experts_forward"), layer, inputs.hidden, *given)


def _loop(inputs: Inputs, given: Slots) -> Callable[[], Tensor]:
    return partial(plain_loop, *inputs)


def _liger(inputs: Inputs, given: Slots) -> Callable[[], Tensor]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # type: ignore[import-not-found, unused-ignore]

    matrices = (inputs.gate_up.mT.contiguous(), inputs.down.mT.contiguous())
    return partial(LigerFusedMoEFunction.apply, inputs.hidden, *matrices, given.ids.int(), given.weights)


RIVALS: Mapping[str, Prepare] = {
    "grouped_mm": partial(_transformers, "grouped_mm"),
    "batched_mm": partial(_transformers, "batched_mm"),
    "eager": _loop,
    "liger": _liger,
}
_NEEDS = {"grouped_mm": "transformers", "batched_mm": "transformers", "liger": "liger_kernel"}


def installed(names: Mapping[str, float]) -> dict[str, Prepare]:
    """Those of `names` whose library is here."""
    here = [name for name in names if name not in _NEEDS or importlib.util.find_spec(_NEEDS[name])]
    return {name: RIVALS[name] for name in here}


@cache
def external() -> Mapping[str, Prepare]:
    """Rivals from outside; one that fails at every use if their file cannot be read."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return {}
    sys.path.insert(0, folder)
    try:
        return dict(importlib.import_module("rivals").rivals())
    except Exception as error:  # foreign code
        return {"rivals.py": partial(_broken, f"{VARIABLE}={folder}: {error}")}


def _broken(reason: str, inputs: Inputs, given: Slots) -> Callable[[], Tensor]:
    raise RuntimeError(reason)

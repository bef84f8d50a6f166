"""Experts under switches that have gradients: routing can then be trained by back-propagation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_backbone.compensation import ExpertCompensation

if TYPE_CHECKING:
    from moe_backbone.experts import ExpertLayer


def switch_experts(
    layer: ExpertLayer,
    rows: Tensor,
    scores: Tensor,
    subset: Tensor,
    update: Tensor,
    switch: Tensor,
    compensation: ExpertCompensation | None = None,
) -> Tensor:
    """Zeros whose gradient by a switch is what turning that expert round would change, all others staying.

    Not the derivative of the mixture: of a lone expert, whose weight is 1 however far it is switched on, that is zero.

    Args:
        layer: Weights and mixing rule; gets no gradient from here.
        rows: Normalised input (num_tokens, hidden_size).
        scores: Native gate, log-softmax (num_tokens, num_experts).
        subset: Experts that run, bool, same shape.
        update: Their mixture (num_tokens, hidden_size), not yet compensated.
        switch: Float, same shape as `subset`; only its gradient is used.
        compensation: What is done to mixtures of few experts.

    Returns:
        (num_tokens, hidden_size).

    Example: expert outputs 2 and 6 of equal gate probability, the first one on: switching the second on changes 2 to
    4, switching the first off 2 to 0, so the gradients are 2 and 2.
    """
    return _Turn.apply(switch, update.detach(), layer, rows.detach(), scores.detach(), subset, compensation)


class _Turn(torch.autograd.Function):
    """Nothing forward; backward what each switch changes along the pull, without making the changes themselves."""

    @staticmethod
    def forward(ctx: Any, switch: Tensor, update: Tensor, *parts: Any) -> Tensor:
        """Zeros of the update's shape; arguments as `switch_experts` names them."""
        ctx.parts = update, *parts
        return torch.zeros_like(update)

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the switch (num_tokens, num_experts)."""
        update, layer, rows, scores, subset, compensation = ctx.parts
        before = (pull * update).sum(1, keepdim=True)
        after = _turned(layer, rows, scores, subset, before, update, pull)
        return (effect_of_turning(before, after, subset, pull, compensation), *(None for _ in ctx.parts))


def effect_of_turning(
    before: Tensor, after: Tensor, subset: Tensor, pull: Tensor, compensation: ExpertCompensation | None
) -> Tensor:
    """Gradient of each expert's switch (num_tokens, num_experts).

    Args:
        before: The mixture along the pull (num_tokens, 1).
        after: The same with each expert turned round (num_tokens, num_experts).
        subset: Experts that run, bool, same shape.
        pull: Gradient of the update (num_tokens, hidden_size).
        compensation: What is done to mixtures of few experts.
    """
    sign = 1 - 2 * subset.to(pull.dtype)
    if compensation is not None:
        count = subset.sum(1, keepdim=True)
        after = compensation.along(after, count + sign.long(), pull)
        before = compensation.along(before, count, pull)
    return sign * (after - before)


def _turned(
    layer: ExpertLayer, rows: Tensor, scores: Tensor, subset: Tensor, before: Tensor, update: Tensor, pull: Tensor
) -> Tensor:
    """Along `pull`, the mixture with each expert turned round (num_tokens, num_experts); `before` that with none."""
    hidden, potentials = _hidden(layer, rows), _potentials(layer, scores)
    lone = _along(layer, hidden, pull.expand(len(hidden), *pull.shape))
    sign = 1 - 2 * subset.to(update.dtype).unsqueeze(2)
    if layer.mixing == "keep":
        return before + (sign * potentials).squeeze(2) * lone
    total = (potentials * subset.unsqueeze(2)).sum(1, keepdim=True)
    rest = (total + sign * potentials).clamp_min(torch.finfo(scores.dtype).tiny)
    share = sign * potentials / rest  # of the expert in the mixture then, negative where it goes
    if layer.vector is None:
        moved = share.squeeze(2) * (lone - before)
    else:  # another share in each dimension
        pulls = pull.unsqueeze(1) * share
        moved = _along(layer, hidden, pulls.transpose(0, 1)) - (pulls * update.unsqueeze(1)).sum(2)
    alone = subset.sum(1, keepdim=True) == subset.long()
    return torch.where(alone, lone * ~subset, before + moved)


def _along(layer: ExpertLayer, hidden: Tensor, pulls: Tensor) -> Tensor:
    """Output of every expert along its pull (num_experts, num_tokens, hidden_size): (num_tokens, num_experts)."""
    return (hidden * torch.bmm(pulls, layer.down.transpose(1, 2))).sum(2).t()


def mix_partly(layer: ExpertLayer, rows: Tensor, scores: Tensor, switch: Tensor) -> Tensor:
    """Mixture of experts that are switched on to some degree; equal to a subset's where all switches are 0 or 1.

    A renormalised mixture also counts only to the degree that any expert is on, or it would jump where the last one
    goes.

    Args:
        layer: Weights and mixing rule.
        rows: Normalised input (num_tokens, hidden_size).
        scores: Native gate, log-softmax (num_tokens, num_experts).
        switch: Degrees in [0, 1], same shape.

    Returns:
        (num_tokens, hidden_size).

    Example: expert outputs 2 and 6 of equal gate probability with degrees 1 and .5 give (2 + 3) / 1.5 = 3.33.
    """
    outputs = torch.bmm(_hidden(layer, rows), layer.down).transpose(0, 1)
    potentials = _potentials(layer, scores)
    weights = switch.unsqueeze(2) * potentials
    mixture = (weights * outputs).sum(1)
    if layer.mixing == "keep":
        return mixture
    anything = 1 - (1 - switch).prod(1, keepdim=True)
    return anything * mixture / weights.sum(1).clamp_min(torch.finfo(scores.dtype).tiny)


def _hidden(layer: ExpertLayer, rows: Tensor) -> Tensor:
    """What every expert's down projection gets (num_experts, num_tokens, intermediate_size)."""
    gate, up = torch.bmm(rows.expand(len(layer.gate_up), *rows.shape), layer.gate_up).chunk(2, dim=2)
    return F.silu(gate) * up


def _potentials(layer: ExpertLayer, scores: Tensor) -> Tensor:
    """What every expert weighs before renormalisation (num_tokens, num_experts, hidden_size or 1)."""
    potentials = scores.exp().unsqueeze(2)
    return potentials if layer.vector is None else potentials * layer.vector.exp()

"""Experts under switches that have gradients: routing can then be trained by back-propagation."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    with torch.no_grad():
        on = subset.unsqueeze(2)
        sign = 1 - 2 * on.to(update.dtype)  # of turning an expert round
        turned = _turned(layer, rows, scores, on, sign, update.unsqueeze(1))
        if compensation is not None:
            count = subset.sum(1, keepdim=True)
            turned = compensation(turned, count + sign.squeeze(2).long())
            update = compensation(update, count.squeeze(1))
        change = sign * (turned - update.unsqueeze(1))
    return torch.einsum("ij,ijk->ik", switch - switch.detach(), change)


def _turned(layer: ExpertLayer, rows: Tensor, scores: Tensor, on: Tensor, sign: Tensor, update: Tensor) -> Tensor:
    """The mixture with each expert turned round (num_tokens, num_experts, hidden_size); `update` that with none."""
    outputs, potentials = _all_experts(layer, rows, scores)
    if layer.mixing == "keep":
        return update + sign * potentials * outputs
    total = (potentials * on).sum(1, keepdim=True)
    alone = on.sum(1, keepdim=True) == on.long()
    rest = (total + sign * potentials).clamp_min(torch.finfo(scores.dtype).tiny)
    turned = update + sign * potentials / rest * (outputs - update)
    return torch.where(alone, outputs * ~on, turned)


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
    outputs, potentials = _all_experts(layer, rows, scores)
    weights = switch.unsqueeze(2) * potentials
    mixture = (weights * outputs).sum(1)
    if layer.mixing == "keep":
        return mixture
    anything = 1 - (1 - switch).prod(1, keepdim=True)
    return anything * mixture / weights.sum(1).clamp_min(torch.finfo(scores.dtype).tiny)


def _all_experts(layer: ExpertLayer, rows: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Output of every expert, and what it weighs before renormalisation (num_tokens, num_experts, hidden_size or 1)."""
    gate, up = torch.matmul(rows, layer.gate_up).chunk(2, dim=2)
    outputs = torch.bmm(F.silu(gate) * up, layer.down).transpose(0, 1)
    potentials = scores.exp().unsqueeze(2)
    return outputs, potentials if layer.vector is None else potentials * layer.vector.exp()

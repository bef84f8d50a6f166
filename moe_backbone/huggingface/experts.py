"""One expert layer of a checkpoint: what its gate would choose, and any subset of its experts really skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_backbone.compensation import ExpertCompensation
from moe_backbone.kernels import expert_mlp
from moe_backbone.kernels.rows import record_rows, uncounted
from moe_backbone.relaxed import effect_of_turning
from moe_backbone.sites import best_units

Link = Literal["exp", "sigmoid", "sqrtsoftplus", "identity"]
LINKS: dict[Link, Callable[[Tensor], Tensor]] = {
    "exp": lambda logits: logits.log_softmax(1),
    "sigmoid": F.logsigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).log() / 2,
    "identity": lambda logits: logits.clamp_min(torch.finfo(logits.dtype).tiny).log(),
}
"""From what a gate returns as logits to the log of what its mixing weights are proportional to."""
CANDIDATES = 2
"""See `switch_experts`."""
LEAST_SCORE = 1e-6
"""Stands in for the gate probability of an expert that the gate says nothing about."""
WORST_FIT = 0.02
"""Mean error of log mixing weights, nats, up to which they follow a link; rounding to bfloat16 makes 0.002."""
LARGEST_LAID_OUT = 2**31
"""Bytes of a layer's expert weights above which no second copy is laid out."""


class GateReading(NamedTuple):
    """What the checkpoint's own gate says of every token and expert; all (num_tokens, num_experts)."""

    native: Tensor
    """Experts that it chose, bool."""
    potentials: Tensor
    """Mixing weights: its own of the chosen experts, of the others what it would give in the same proportion."""
    scores: Tensor
    """Log of its probabilities, float32; the chosen experts come first."""


class ExpertSite:
    """One module of the shared experts contract of transformers 5, and its gate.

    Args:
        module: Experts: takes rows, indices (num_tokens, top_k) and weights of the same shape.

    Attributes:
        num_experts: Routed experts.
        link: How the gate's logits and mixing weights belong together, see `LINKS`.
        renormalised: Whether the weights of the chosen experts always add up to the same, so that those of any subset
            shall too.
        logits: What the gate returned last, before its choice (num_tokens, num_experts), or None.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.num_experts = int(module.num_experts)
        self.link: Link = "exp"
        self.renormalised = True
        self.logits: Tensor | None = None
        self._layout: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    @property
    def weight_names(self) -> tuple[str, str]:
        """Names of the module's projections, up (with or without gate) and down."""
        return ("gate_up_proj" if self.module.has_gate else "up_proj"), "down_proj"

    @property
    def unit_flops(self) -> int:
        """FLOPs of one expert for one token."""
        return 2 * sum(getattr(self.module, name)[0].numel() for name in self.weight_names)

    def learn_rule(self, indices: Tensor, weights: Tensor) -> None:
        """Find out how logits and weights belong together, from what the gate did with a few tokens.

        Args:
            indices: Chosen experts (num_tokens, top_k), int64.
            weights: Their mixing weights, same shape.
        """
        totals = weights.float().sum(1)
        self.renormalised = bool((totals - totals.mean()).abs().max() < 0.01 * totals.mean().abs())
        logits = self._logits_of(weights)
        if weights.shape[1] < 2:
            return
        if bool(((weights.float() - 1).abs() < 0.01).all()):  # whole weight for each, as SparseMixer gives: no shares
            self.renormalised = False
            return
        if logits is None:
            return
        spreads = {}
        for name, link in LINKS.items():
            if name == "identity" and (logits < 0).any():
                continue
            known = weights.float().clamp_min(torch.finfo(torch.float32).tiny).log()
            gap = known - link(logits).gather(1, indices)
            spreads[name] = float((gap - gap.mean(1, keepdim=True)).abs().mean())
        best = min(spreads, key=lambda name: spreads[name])
        self.link = best if spreads[best] <= WORST_FIT else "exp"

    def read(self, indices: Tensor, weights: Tensor) -> GateReading:
        """What the gate chose, and what it thinks of the experts that it did not choose.

        Args:
            indices: Chosen experts (num_tokens, top_k), int64.
            weights: Their mixing weights, same shape.
        """
        shape = (len(indices), self.num_experts)
        native = torch.zeros(shape, dtype=torch.bool, device=indices.device).scatter(1, indices, True)
        nothing = torch.zeros(shape, device=indices.device)
        given = nothing.scatter_add(1, indices, weights.float())  # an expert may stand twice
        logits = self._logits_of(weights)
        if logits is None:
            scores = (given / given.sum(1, keepdim=True).clamp_min(LEAST_SCORE)).clamp_min(LEAST_SCORE).log()
            return GateReading(native, given, _native_first(scores, native))
        levels = LINKS[self.link](logits)
        strongest, place = weights.float().max(1, keepdim=True)
        ratio = (levels - levels.gather(1, indices.gather(1, place))).exp()
        potentials = torch.where(native, given, strongest * ratio)
        return GateReading(native, potentials, _native_first(levels.log_softmax(1), native))

    def _logits_of(self, weights: Tensor) -> Tensor | None:
        """The gate's logits if they are of these tokens."""
        if self.logits is None or self.logits.numel() != len(weights) * self.num_experts:
            return None
        return self.logits.reshape(-1, self.num_experts).float()

    def weights(self, gate: GateReading, subset: Tensor) -> Tensor:
        """Mixing weights of a subset under the checkpoint's own rule (num_tokens, num_experts), float32.

        Example: weights .4 and .2 of two chosen experts, always .6 in all, and only the second one runs: it gets .6 if
        they are renormalised, else it keeps .2.
        """
        chosen = gate.potentials * subset
        if not self.renormalised:
            return chosen
        total = chosen.sum(1, keepdim=True)
        native_total = (gate.potentials * gate.native).sum(1, keepdim=True)
        return chosen * (native_total / total.masked_fill(total == 0, 1))

    def run(self, hidden: Tensor, weights: Tensor, subset: Tensor) -> Tensor:
        """Weighted sum of the chosen experts (num_tokens, hidden_size), in the dtype of `hidden`."""
        if self._suits_kernels(hidden):
            return expert_mlp(hidden, weights.to(hidden.dtype), subset, *self._laid_out())
        update = torch.zeros_like(hidden)
        for expert in subset.any(0).nonzero().squeeze(1).tolist():
            rows = subset[:, expert].nonzero().squeeze(1)
            output = self.expert(expert, hidden.index_select(0, rows))
            record_rows("experts", len(output))
            scaled = output * weights[rows, expert].unsqueeze(1).to(output.dtype)
            update = update.index_add(0, rows, scaled.to(update.dtype))
        return update

    def expert(self, expert: int, rows: Tensor) -> Tensor:
        """One expert's output for rows (num_rows, hidden_size)."""
        module, (up, down) = self.module, self.weight_names
        inner = self._project(up, expert, rows)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        output = self._project(down, expert, inner)
        return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output

    def _project(self, name: str, expert: int, rows: Tensor) -> Tensor:
        weight = getattr(self.module, name)[expert]
        product = rows.to(weight.dtype) @ (weight if self.module.is_transposed else weight.t())
        return product + getattr(self.module, f"{name}_bias")[expert] if self.module.has_bias else product

    def _suits_kernels(self, hidden: Tensor) -> bool:
        """Whether the ops compute the same: plain SwiGLU experts without biases, no gradient wanted."""
        module = self.module
        if torch.is_grad_enabled() or not self._is_swiglu or hidden.dtype != module.down_proj.dtype:
            return False
        size = module.down_proj.nbytes + module.gate_up_proj.nbytes
        return size <= LARGEST_LAID_OUT and hidden.device.type in ("cpu", "cuda")

    @property
    def _is_swiglu(self) -> bool:
        module = self.module
        plain = module.has_gate and module.is_concatenated and not module.has_bias
        plain = plain and not getattr(module, "has_post_expert_norm", False)
        gate = getattr(type(module), "_apply_gate", None)
        stock = getattr(gate, "__qualname__", "") == "_default_apply_gate"
        act = getattr(module, "act_fn", None)
        return plain and stock and (isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation")

    def _laid_out(self) -> tuple[Tensor, Tensor]:
        """Both projections as the ops take them, kept as the ops keep what they make of them: views, on CUDA a copy."""
        up, down = self.module.gate_up_proj.detach(), self.module.down_proj.detach()
        place = (up.data_ptr(), down.data_ptr())
        if self._layout is None or self._layout[0] != place:
            turned = (up, down) if self.module.is_transposed else (up.transpose(1, 2), down.transpose(1, 2))
            if up.is_cuda:  # its kernels read rows, and would copy at each call
                turned = turned[0].contiguous(), turned[1].contiguous()
            self._layout = place, turned
        return self._layout[1]


def _native_first(scores: Tensor, native: Tensor) -> Tensor:
    """Scores in which the chosen experts come before all others, whatever else than its logits a gate chose by."""
    lowest = scores.masked_fill(~native, torch.inf).amin(1, keepdim=True)
    below = torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))
    return torch.where(native, scores, torch.minimum(scores, below))


def switch_experts(
    site: ExpertSite,
    rows: Tensor,
    gate: GateReading,
    subset: Tensor,
    switch: Tensor,
    compensation: ExpertCompensation | None,
) -> Tensor:
    """Zeros whose gradient by a switch is what turning that expert round would change; see `relaxed.switch_experts`.

    Of experts that are off only the best have a gradient, by gate score, in all `CANDIDATES` times as many as run
    natively: with dozens of experts to compute all of them would cost more than the whole model.
    """
    tried = best_units(gate.scores, CANDIDATES * int(gate.native.sum(1).amax())) | subset
    return _Turn.apply(switch, rows.detach(), site, gate, subset, tried, compensation)


class _Turn(torch.autograd.Function):
    """Nothing forward; backward what each switch changes along the pull."""

    @staticmethod
    def forward(ctx: Any, switch: Tensor, rows: Tensor, *parts: Any) -> Tensor:
        """Zeros of the update's shape; arguments as `switch_experts` names them."""
        ctx.parts = rows, *parts
        return torch.zeros_like(rows)

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the switch (num_tokens, num_experts)."""
        rows, site, gate, subset, tried, compensation = ctx.parts
        with uncounted():
            lone = _lone(site, rows, tried, pull)
        before, after = _mixtures(site, gate, subset, lone)
        effect = effect_of_turning(before, after, subset, pull.float(), compensation)
        return (effect * tried, *(None for _ in ctx.parts))


def _lone(site: ExpertSite, rows: Tensor, tried: Tensor, pull: Tensor) -> Tensor:
    """Output of each expert that is tried along the pull, zeros elsewhere (num_tokens, num_experts), float32."""
    lone = torch.zeros(tried.shape, device=rows.device)
    for expert in tried.any(0).nonzero().squeeze(1).tolist():
        own = tried[:, expert].nonzero().squeeze(1)
        output = site.expert(expert, rows.index_select(0, own))
        lone[own, expert] = (output.float() * pull.index_select(0, own)).sum(1)
    return lone


def _mixtures(site: ExpertSite, gate: GateReading, subset: Tensor, lone: Tensor) -> tuple[Tensor, Tensor]:
    """Along the pull, the mixture (num_tokens, 1), and the one with each expert turned round (num_tokens, num_experts).

    `lone` is every expert's output along the pull (num_tokens, num_experts).
    """
    potentials, sign = gate.potentials, 1 - 2 * subset.float()
    part = (potentials * subset * lone).sum(1, keepdim=True)
    turned = part + sign * potentials * lone
    if not site.renormalised:
        return part, turned
    native = (potentials * gate.native).sum(1, keepdim=True)
    total = (potentials * subset).sum(1, keepdim=True)
    rest = total + sign * potentials
    tiny = torch.finfo(total.dtype).tiny
    empty = subset.sum(1, keepdim=True) + sign.long() == 0
    return native * part / total.clamp_min(tiny), (native * turned / rest.clamp_min(tiny)).masked_fill(empty, 0)

"""Expert sublayer: SwiGLU experts, a native gate, an optional shared expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_backbone.compensation import ExpertCompensation
from moe_backbone.config import BackboneConfig
from moe_backbone.kernels import Backend, Derived, expert_mlp, linear
from moe_backbone.precision import full_precision
from moe_backbone.relaxed import mix_partly, switch_experts


class ExpertLayer(nn.Module):
    """Weighted sum of the chosen experts of each token.

    Args:
        config: `mixing` says how they are weighted. Under `gate_vector` dimension d of the update is the sum over the
            chosen experts e of softmax_e(logit_e + vector[e, d]) * f_e(x)[d]; the vector starts at zero, where this
            is `renormalize`.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.mixing = config.mixing
        depth = (2 * config.num_layers) ** -0.5
        self.gate = nn.Linear(width, config.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(config.num_experts, width, 2 * inner) * width**-0.5)
        self.down = nn.Parameter(torch.randn(config.num_experts, inner, width) * (depth * inner**-0.5))
        self.vector: nn.Parameter | None = None
        if config.mixing == "gate_vector":
            self.vector = nn.Parameter(torch.zeros(config.num_experts, width))
        self._scaled = Derived(scaled_by_vector)
        self.run_experts: Callable[..., Tensor] = expert_mlp
        """What computes the weighted sum; another where experts are spread over ranks."""
        self.shared: nn.ModuleList | None = None
        if config.shared_intermediate_size:
            shared = config.shared_intermediate_size
            self.shared = nn.ModuleList(
                (nn.Linear(width, 2 * shared, bias=False), nn.Linear(shared, width, bias=False))
            )

    def scores(self, features: Tensor) -> Tensor:
        """Log-softmax of the native gate (num_tokens, num_experts)."""
        with full_precision(features.device):
            return linear(features, self.gate.weight).log_softmax(1)

    def forward(
        self,
        features: Tensor,
        scores: Tensor,
        subset: Tensor | None,
        backend: Backend = "auto",
        switch: Tensor | None = None,
        compensation: ExpertCompensation | None = None,
    ) -> Tensor:
        """Update of the residual stream (num_sequences, seq_len, hidden_size).

        Args:
            features: Normalised input (num_sequences, seq_len, hidden_size).
            scores: Native gate (num_tokens, num_experts).
            subset: Chosen experts, bool (num_tokens, num_experts); None to run all to the degree of `switch`.
            backend: Which kernels run.
            switch: For gradients, see `MoETransformer.advance`.
            compensation: Constants in place of skipped experts.
        """
        rows = features.flatten(0, 1)
        if subset is None:
            assert switch is not None
            update = mix_partly(self, rows, scores, switch)
        else:
            mixture = update = self._mix(rows, scores, subset, backend)
            if compensation is not None:
                update = compensation(mixture, subset.sum(1))
            if switch is not None:
                update = update + switch_experts(self, rows, scores, subset, mixture, switch, compensation)
        update = update.view_as(features)
        if self.shared is not None:
            gate, up = self.shared[0](features).chunk(2, dim=-1)
            update = update + self.shared[1](F.silu(gate) * up)
        return update

    def _mix(self, rows: Tensor, scores: Tensor, subset: Tensor, backend: Backend) -> Tensor:
        """Weighted sum of the chosen experts (num_tokens, hidden_size)."""
        weights = mixing_weights(scores, subset, self.mixing)
        if self.vector is None:
            return self.run_experts(rows, weights, subset, self.gate_up, self.down, backend)
        down, factors = self._scaled(self.down, self.vector)
        total = weights @ factors
        update = expert_mlp(rows, weights, subset, self.gate_up, down, backend)
        return update / total.masked_fill(total == 0, 1)  # an empty subset has no weight: its update stays zero


def mixing_weights(scores: Tensor, subset: Tensor, rule: str) -> Tensor:
    """Weights of the chosen experts.

    Args:
        scores: Log-softmax gate scores (num_tokens, num_experts).
        subset: bool, same shape.
        rule: `keep` leaves the gate's probabilities; any other makes each non-empty row sum to 1.

    Returns:
        Same shape as `scores`; zeros where `subset` is False.

    Example: probabilities (.5, .3, .2), experts 0 and 1 chosen: (.625, .375, 0) renormalised, (.5, .3, 0) kept.
    """
    if rule == "keep":
        return scores.exp() * subset
    # a softmax over the subset, as probabilities may underflow; the lowest number keeps an empty row finite
    return scores.masked_fill(~subset, torch.finfo(scores.dtype).min).softmax(1) * subset


def scaled_by_vector(down: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """What the gate vector makes of the down projections, so that the ops need not know of it.

    softmax_e(s_e + v_e) is w_e * exp(v_e) over its own sum, where w is the softmax of s alone, and v counts only up to
    what is added to all experts alike. So the largest entry of each dimension becomes 0, and nothing overflows.

    Args:
        down: (num_experts, intermediate_size, hidden_size).
        vector: (num_experts, hidden_size), nats.

    Returns:
        `down` times the factors, and the factors exp(v) (num_experts, hidden_size), in (0, 1].

    Example: vector entries (0, log 4) of two experts in one dimension give the factors (.25, 1).
    """
    factors = (vector - vector.detach().amax(0)).exp()
    return down * factors.unsqueeze(1), factors

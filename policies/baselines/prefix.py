"""Loss and compute of a router on fixed text, recomputing only what follows the changed site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_backbone.compute import ComputeMeter
from moe_backbone.quality import mean_scored, token_log_likelihood
from moe_backbone.sites import Backbone, Router, SiteView


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a router gives on the text."""

    loss: float
    """Mean loss of the next token, nats a token."""
    compute: float
    """Fraction of native compute, mean over the tokens."""


class PrefixCache:
    """States before every site under the router followed last.

    Args:
        backbone: What computes.
        tokens: Text, full sequences (num_sequences, seq_len), int64.
        targets: Next tokens, same shape.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor, targets: Tensor) -> None:
        self.backbone, self.targets = backbone, targets
        self.meter = ComputeMeter(backbone.sites, tokens.shape[1])
        self._positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0])
        with torch.no_grad():
            self._states: list[Any] = [backbone.begin(tokens)]
        self._computes: list[float] = []

    def follow(self, router: Router, first: int = 0) -> Outcome:
        """Remember the states under `router`, which equals the one followed before at all sites before `first`."""
        del self._states[first + 1 :], self._computes[first:]
        return self._walk(router, first, self._states, self._computes)

    def measure(self, router: Router, first: int) -> Outcome:
        """Outcome of `router`, which equals the followed one at all sites before `first`; remembers nothing."""
        return self._walk(router, first, self._states[: first + 1], self._computes[:first])

    def view(self, index: int) -> SiteView:
        """What a router sees of site `index` under the followed router."""
        return self.backbone.observe(self._states[index])

    def logits(self, router: Router, first: int) -> Tensor:
        """Logits (num_sequences, seq_len, vocab_size) of a router as in `measure`; remembers nothing."""
        return self._run(router, first, self._states[: first + 1], self._computes[:first])

    def _walk(self, router: Router, first: int, states: list[Any], computes: list[float]) -> Outcome:
        logits = self._run(router, first, states, computes)
        loss = -mean_scored(token_log_likelihood(logits, self.targets), self.targets)
        return Outcome(loss=loss.item(), compute=sum(computes))

    @torch.no_grad()
    def _run(self, router: Router, first: int, states: list[Any], computes: list[float]) -> Tensor:
        for index in range(first, len(self.backbone.sites)):
            subset = router.select(self.backbone.observe(states[index]))
            flops = self.meter.flops(index, subset, self._positions).mean().item()
            computes.append(flops / self.meter.native_flops)
            states.append(self.backbone.advance(states[index], subset))
        return self.backbone.finish(states[-1])

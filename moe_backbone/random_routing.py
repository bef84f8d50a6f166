"""Random routing as training: random heads, random experts, random depth of top-k, and agreement between two routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_backbone.quality import token_divergence
from moe_backbone.sites import NativeRouter, SiteView, best_units

RandomUnits = Literal["heads", "sequence_heads", "experts", "depth"]
"""What is drawn in a random sequence. `heads`: a share of the heads for the sequence, uniform from 0 to 1, and each
token its own heads at that rate. `sequence_heads`: the same share, and one choice of heads for all tokens of the
sequence. `depth`: for each token how many experts run, uniform from 0 to one above the native number, best gate scores
first. `experts`: for each token which experts run, any with equal chance, as many as natively or as `depth` says
(arXiv:2110.04260)."""


class RandomRouting:
    """Native routing for some sequences, random subsets for the rest.

    Args:
        native_share: Chance of a sequence to stay native.
        generator: Of all draws.
        units: What is drawn; a site whose units are not named stays native.
    """

    def __init__(
        self, native_share: float, generator: torch.Generator, units: Sequence[RandomUnits] = ("heads", "depth")
    ) -> None:
        self.native_share, self.generator, self.units = native_share, generator, frozenset(units)

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        native = NativeRouter().select(view)
        num_sequences, seq_len = view.tokens.shape
        if view.index == 0:
            self._native_rows = self._uniform(view, num_sequences).lt(self.native_share).repeat_interleave(seq_len)
        chosen = self._heads(view) if view.site.kind == "heads" else self._experts(view)
        return native if chosen is None else torch.where(self._native_rows.unsqueeze(1), native, chosen)

    def _heads(self, view: SiteView) -> Tensor | None:
        num_sequences, seq_len = view.tokens.shape
        if self.units.isdisjoint({"heads", "sequence_heads"}):
            return None
        rate = self._uniform(view, num_sequences)
        if "heads" in self.units:
            return self._uniform(view, *view.scores.shape) < rate.repeat_interleave(seq_len).unsqueeze(1)
        drawn = self._uniform(view, num_sequences, view.site.num_units) < rate.unsqueeze(1)
        return drawn.repeat_interleave(seq_len, dim=0)

    def _experts(self, view: SiteView) -> Tensor | None:
        if self.units.isdisjoint({"experts", "depth"}):
            return None
        count: int | Tensor = view.site.native_units
        if "depth" in self.units:
            most = min(view.site.native_units + 1, view.site.num_units)
            count = (self._uniform(view, len(view.scores)) * (most + 1)).long()
        return best_units(self._uniform(view, *view.scores.shape) if "experts" in self.units else view.scores, count)

    def _uniform(self, view: SiteView, *shape: int) -> Tensor:
        """Drawn on the generator's device: the same numbers wherever the backbone runs."""
        return torch.rand(*shape, generator=self.generator).to(view.scores.device)


def disagreement(logits: Tensor) -> Tensor:
    """How far two routes of the same tokens are apart: half the sum of KL(p || q) and KL(q || p), mean over tokens.

    Args:
        logits: (2 * num_sequences, seq_len, vocab_size), float32; the second half runs the tokens of the first again.

    Returns:
        Nats, a scalar; the regularisation of arXiv:2110.04260.
    """
    first, second = logits.chunk(2)
    return 0.5 * (token_divergence(first, second) + token_divergence(second, first)).mean()

"""Where each part of an observation lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_backbone import SiteView

OBSERVATION_BOUND = 1e4
"""Every entry lies within plus and minus this; normalised features and log-probabilities stay far below."""


@dataclass(frozen=True, kw_only=True)
class ObservationLayout:
    """Slices of a flat observation, so that a policy finds its parts by name.

    Order: token features, unit scores, one-hot of the site, log price. Behind the last site scores and one-hot are
    zero and the features are the output head's input.
    """

    hidden_size: int
    max_units: int
    num_sites: int

    @property
    def size(self) -> int:
        """Length of an observation."""
        return self.hidden_size + self.max_units + self.num_sites + 1

    @property
    def features(self) -> slice:
        """The sublayer's normalised input."""
        return slice(0, self.hidden_size)

    @property
    def scores(self) -> slice:
        """Log-softmax of the native gate, padded with zeros to `max_units`."""
        return slice(self.hidden_size, self.hidden_size + self.max_units)

    @property
    def site(self) -> slice:
        """One-hot of the site."""
        return slice(self.hidden_size + self.max_units, self.size - 1)

    @property
    def log_price(self) -> slice:
        """Natural logarithm of the price."""
        return slice(self.size - 1, self.size)

    def pack(self, view: SiteView) -> Tensor:
        """Observation of every token (num_tokens, size), float32."""
        observation = view.features.new_zeros(len(view.features), self.size)
        observation[:, self.features] = view.features
        observation[:, self.scores.start : self.scores.start + view.site.num_units] = view.scores
        observation[:, self.site.start + view.index] = 1.0
        observation[:, self.log_price] = view.price.log().unsqueeze(1)
        return observation

    def pack_terminal(self, features: Tensor, price: Tensor) -> Tensor:
        """Observation behind the last site (num_tokens, size), float32."""
        observation = torch.zeros(len(features), self.size, device=features.device)
        observation[:, self.features] = features
        observation[:, self.log_price] = price.log().unsqueeze(1)
        return observation

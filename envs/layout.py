"""Where each part of an observation lies."""

from __future__ import annotations

from dataclasses import dataclass

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

    def fill(self, observation: Tensor, view: SiteView) -> None:
        """Write the observation of every token into zeros (num_tokens, size), float32."""
        observation[:, self.features] = view.features
        observation[:, self.scores.start : self.scores.start + view.site.num_units] = view.scores
        observation[:, self.site.start + view.index].fill_(1.0)
        observation[:, self.log_price] = view.price.log().unsqueeze(1)

    def fill_terminal(self, observation: Tensor, features: Tensor, price: Tensor) -> None:
        """Write the observation behind the last site into zeros (num_tokens, size), float32.

        Args:
            observation: Zeros (num_tokens, size), float32.
            features: Input of the output head (num_tokens, hidden_size), float32.
            price: Nats per native compute (num_tokens,), float32.
        """
        observation[:, self.features] = features
        observation[:, self.log_price] = price.log().unsqueeze(1)

"""How much better any router could be: the oracle's subsets on sampled tokens of held-out text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.intervals import FloatArray, Interval, ratio_interval
from moe_backbone import Backbone, ranks, token_correct, token_divergence, token_log_likelihood
from moe_backbone.checks import require, require_at_least
from moe_backbone.corpus import Split
from policies.baselines.oracle import OracleChoice, OracleQuality, OracleSearch

PRICES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Nats per native compute."""


@dataclass(frozen=True, kw_only=True)
class HeadroomConfig:
    """What the oracle looks at.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    num_tokens: int = 192
    """Sampled tokens, one a window; fewer where the text has fewer windows."""
    prices: tuple[float, ...] = PRICES
    """Nats per native compute."""
    qualities: tuple[OracleQuality, ...] = ("divergence", "log_likelihood")
    """What is maximised."""
    batch_tokens: int = 16
    """Tokens searched at once; all of a batch stand at one position of their window."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_tokens", "batch_tokens")
        require(min(self.prices, default=0) >= 0, f"prices must be at least 0, got {self.prices}")


@dataclass(frozen=True, kw_only=True)
class HeadroomPoint:
    """The oracle at one price, on the sampled tokens; differences are paired with native routing of the same tokens."""

    quality: OracleQuality
    """What was maximised."""
    price: float
    """Nats per native compute."""
    compute: float
    """Fraction of what native routing spends on the same tokens."""
    divergence: float
    """KL(native || routed), mean, nats."""
    delta_log_likelihood: Interval
    """Nats a token."""
    delta_accuracy: Interval
    """As a fraction of the tokens."""
    num_tokens: int
    num_documents: int

    @property
    def knows_label(self) -> bool:
        """Whether the next token was shown to the oracle: then no router can reach it."""
        return self.quality == "log_likelihood"

    def to_json(self) -> dict[str, Any]:
        """One entry of `oracle` in `evaluation.json`."""
        return asdict(self) | {"knows_label": self.knows_label}


def oracle_headroom(
    backbone: Backbone,
    split: Split,
    config: HeadroomConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[HeadroomPoint]:
    """Search the best subsets of single tokens, each after a native past.

    Windows are spread over the text and positions over the window. A router in use routes the past too, so that its
    keys and values are worse than here: this is a bound on what choice alone can gain, not a forecast.

    Args:
        backbone: What computes; must be on `device`.
        split: Held-out text.
        config: What is searched.
        device: Where the tokens go.
        progress: Whether to show a progress bar.

    Returns:
        One point a quality and price.
    """
    config = config or HeadroomConfig()
    seq_len = backbone.config.seq_len
    windows = split.windows(seq_len, config.num_tokens * seq_len)
    num_batches = -(-len(windows[0]) // config.batch_tokens)
    totals: dict[tuple[OracleQuality, float], list[FloatArray]] = {}
    for batch in ranks.bar(range(num_batches), desc="oracle", unit="batch", disable=not progress):
        position = round((batch + 0.5) * seq_len / num_batches - 0.5)
        tokens, targets, documents = (part[batch::num_batches].to(device) for part in windows)
        for quality in config.qualities:
            search = OracleSearch(
                backbone, tokens[:, : position + 1], targets[:, position], seq_len=seq_len, quality=quality
            )
            choice = None
            for price in sorted(config.prices, reverse=True):
                choice = search.best(price, choice)
                rows = _score(search, choice, targets[:, position], documents[:, position])
                totals.setdefault((quality, price), []).append(rows)
    return [_point(*key, np.concatenate(totals[key])) for key in sorted(totals)]


def _score(search: OracleSearch, choice: OracleChoice, targets: Tensor, documents: Tensor) -> FloatArray:
    """A row for each token (num_tokens, 6), float64.

    Columns: document, compute, native compute, divergence, gain in log-likelihood, gain in accuracy.
    """
    native, routed = search.native_logits, choice.logits
    columns = (
        documents,
        choice.compute,
        search.native_compute,
        token_divergence(native, routed),
        token_log_likelihood(routed, targets) - token_log_likelihood(native, targets),
        token_correct(routed, targets) - token_correct(native, targets),
    )
    return torch.stack([column.double() for column in columns], dim=1).cpu().numpy()


def _point(quality: OracleQuality, price: float, rows: FloatArray) -> HeadroomPoint:
    documents, place = np.unique(rows[:, 0], return_inverse=True)
    tokens = _sums(place, np.ones(len(rows)))
    return HeadroomPoint(
        quality=quality,
        price=price,
        compute=float(rows[:, 1].sum() / rows[:, 2].sum()),
        divergence=float(rows[:, 3].mean()),
        delta_log_likelihood=ratio_interval(_sums(place, rows[:, 4]), tokens),
        delta_accuracy=ratio_interval(_sums(place, rows[:, 5]), tokens),
        num_tokens=len(rows),
        num_documents=len(documents),
    )


def _sums(place: NDArray[np.intp], values: FloatArray) -> FloatArray:
    """Sum of the values (num_tokens,) at each place (num_places,), float64."""
    return np.bincount(place, values).astype(np.float64)

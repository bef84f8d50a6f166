"""Per-document sums, and paired bootstrap intervals over documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
"""Bootstrap resamples of an interval."""
COVERAGE = 0.95
"""Share of the resamples that an interval holds."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its 95 % interval, all in the unit of the estimate."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Keys `mean`, `low` and `high`; None for an end out of reach, which is infinite here."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentSums:
    """What one router scored on each held-out document; two routers on the same windows can be paired.

    Attributes:
        tokens: Tokens scored (num_documents,), float64.
        log_likelihood: Sum of log-likelihoods in nats (num_documents,), float64.
        correct: Tokens whose likeliest prediction was right (num_documents,), float64.
    """

    tokens: FloatArray
    log_likelihood: FloatArray
    correct: FloatArray

    @property
    def mean_log_likelihood(self) -> float:
        """Nats a token, at most 0."""
        return float(self.log_likelihood.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        """Fraction of tokens predicted right."""
        return float(self.correct.sum() / self.tokens.sum())

    def mix(self, other: DocumentSums, share: float) -> DocumentSums:
        """Linear interpolation: `share` of `other`, the rest of this; `share` in [0, 1]."""
        return DocumentSums(
            tokens=self.tokens,
            log_likelihood=(1 - share) * self.log_likelihood + share * other.log_likelihood,
            correct=(1 - share) * self.correct + share * other.correct,
        )


def log_likelihood_difference(first: DocumentSums, second: DocumentSums, *, seed: int = 0) -> Interval:
    """`first` minus `second` in nats a token, paired over documents."""
    return ratio_interval(first.log_likelihood - second.log_likelihood, shared_tokens(first, second), seed=seed)


def accuracy_difference(first: DocumentSums, second: DocumentSums, *, seed: int = 0) -> Interval:
    """`first` minus `second` as a fraction of tokens, paired over documents."""
    return ratio_interval(first.correct - second.correct, shared_tokens(first, second), seed=seed)


def ratio_interval(sums: FloatArray, tokens: FloatArray, *, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean per token; documents are the unit of resampling.

    Args:
        sums: Sum over the tokens of each document (num_documents,), float64, any unit.
        tokens: Tokens of each document, same shape.
        seed: Seed of the resamples; equal seeds draw equal documents.

    Returns:
        The ratio sum(sums) / sum(tokens) and its interval. With one document the interval has no width.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    weights = document_weights(len(tokens), seed)
    return percentile_interval(float(sums.sum() / tokens.sum()), (weights @ sums) / (weights @ tokens))


def percentile_interval(estimate: float, samples: FloatArray) -> Interval:
    """The estimate, and what holds the middle 95 % of its resamples (num_resamples,), some of which may be infinite."""
    ends = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    low, high = np.quantile(samples, ends, method="inverted_cdf")  # mixes no two resamples: one may be infinite
    return Interval(mean=estimate, low=float(low), high=float(high))


@lru_cache(maxsize=4)
def document_weights(num_documents: int, seed: int = 0) -> FloatArray:
    """How often each resample drew each document (RESAMPLES, num_documents), float64."""
    generator = np.random.default_rng(seed)
    shares = np.full(num_documents, 1 / num_documents)
    return generator.multinomial(num_documents, shares, size=RESAMPLES).astype(np.float64)


def shared_tokens(first: DocumentSums, second: DocumentSums) -> FloatArray:
    """Tokens of each document (num_documents,), float64.

    Raises:
        ValueError: If the two did not score the same text.
    """
    if not np.array_equal(first.tokens, second.tokens):
        raise ValueError(
            f"paired scores must cover the same tokens of the same documents, "
            f"got {first.tokens.sum():.0f} in {len(first.tokens)} and {second.tokens.sum():.0f} in {len(second.tokens)}"
        )
    return first.tokens

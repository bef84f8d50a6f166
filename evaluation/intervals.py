"""Per-document sums, and paired bootstrap intervals over documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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

    def to_json(self) -> dict[str, float]:
        """Keys `mean`, `low` and `high`."""
        return asdict(self)


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
    return ratio_interval(first.log_likelihood - second.log_likelihood, _shared_tokens(first, second), seed=seed)


def accuracy_difference(first: DocumentSums, second: DocumentSums, *, seed: int = 0) -> Interval:
    """`first` minus `second` as a fraction of tokens, paired over documents."""
    return ratio_interval(first.correct - second.correct, _shared_tokens(first, second), seed=seed)


def ratio_interval(sums: FloatArray, tokens: FloatArray, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean per token; documents are the unit of resampling.

    Args:
        sums: Sum over the tokens of each document (num_documents,), float64, any unit.
        tokens: Tokens of each document, same shape.
        resamples: Bootstrap resamples.
        seed: Seed of the resamples; equal seeds draw equal documents.

    Returns:
        The ratio sum(sums) / sum(tokens) and its interval. With one document the interval has no width.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    weights = _document_weights(len(tokens), resamples, seed)
    ratios = (weights @ sums) / (weights @ tokens)
    low, high = np.quantile(ratios, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(mean=float(sums.sum() / tokens.sum()), low=float(low), high=float(high))


@lru_cache(maxsize=2)
def _document_weights(num_documents: int, resamples: int, seed: int) -> FloatArray:
    """How often each resample drew each document (resamples, num_documents), float64."""
    generator = np.random.default_rng(seed)
    shares = np.full(num_documents, 1 / num_documents)
    return generator.multinomial(num_documents, shares, size=resamples).astype(np.float64)


def _shared_tokens(first: DocumentSums, second: DocumentSums) -> FloatArray:
    if not np.array_equal(first.tokens, second.tokens):
        raise ValueError(
            f"paired scores must cover the same tokens of the same documents, "
            f"got {first.tokens.sum():.0f} in {len(first.tokens)} and {second.tokens.sum():.0f} in {len(second.tokens)}"
        )
    return first.tokens

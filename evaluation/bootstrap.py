"""Stratified bootstrap over documents and seeds, and the interquartile mean; arXiv:2108.13264.

Documents are drawn once for all routers, so that differences are paired; seeds are drawn for each router on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from evaluation.intervals import RESAMPLES, FloatArray, Interval, document_weights, percentile_interval

CUT = 0.25
"""Share of the seeds left out at each end, rounded down: one of five, none of three."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """One router against another in one quantity; above 0 the first is better."""

    ours: float
    """Interquartile mean over seeds, in the unit of the quantity."""
    theirs: float
    difference: Interval
    """Ours minus theirs."""
    probability: Interval
    """Share of pairs, a seed of ours and a seed of theirs, in which ours is better; a tie counts half."""


def iqm(values: FloatArray) -> FloatArray:
    """Interquartile mean over the last axis: a quarter of the values, rounded down, is cut at each end.

    Example: 1, 2, 3, 4, 90 give (2 + 3 + 4) / 3 = 3.
    Source: arXiv:2108.13264.
    """
    count = values.shape[-1]
    cut = int(CUT * count)
    inner: FloatArray = np.sort(values, axis=-1)[..., cut : count - cut].mean(axis=-1)
    return inner


def resample(sums: FloatArray, tokens: FloatArray, *, stratum: int) -> FloatArray:
    """Scores of drawn seeds on drawn documents.

    Args:
        sums: Sum over the tokens of each document (..., num_seeds, num_documents), float64.
        tokens: Tokens of each document (num_documents,), float64.
        stratum: Number of the router: its seeds are drawn apart from those of routers with another number.

    Returns:
        Means a token (RESAMPLES, ..., num_seeds), float64, in the unit of `sums`.
    """
    scores = on_drawn_documents(sums, tokens)
    draws = seed_draws(sums.shape[-2], stratum)
    draws = draws.reshape(RESAMPLES, *(1 for _ in sums.shape[:-2]), -1)
    return np.take_along_axis(scores, np.broadcast_to(draws, scores.shape), axis=-1)


def on_drawn_documents(sums: FloatArray, tokens: FloatArray) -> FloatArray:
    """Scores of every seed on drawn documents (RESAMPLES, ..., num_seeds); arguments as for `resample`."""
    weights = document_weights(len(tokens))
    scores = weights @ sums.reshape(-1, len(tokens)).T / (weights @ tokens)[:, None]
    return scores.reshape(RESAMPLES, *sums.shape[:-1])


@lru_cache(maxsize=64)
def seed_draws(num_seeds: int, stratum: int) -> NDArray[np.int64]:
    """Which seeds each resample drew, with replacement (RESAMPLES, num_seeds)."""
    return np.random.default_rng([num_seeds, stratum]).integers(num_seeds, size=(RESAMPLES, num_seeds))


def gain(ours: FloatArray, theirs: FloatArray, tokens: FloatArray) -> Gain:
    """Hold two routers against each other on the same documents.

    Args:
        ours: Sums (num_seeds, num_documents), float64, of a quantity of which more is better.
        theirs: The same; its number of seeds may differ.
        tokens: Tokens of each document (num_documents,), float64.

    Source: probability of improvement and stratified bootstrap of arXiv:2108.13264.
    """
    first, second = ours.sum(-1) / tokens.sum(), theirs.sum(-1) / tokens.sum()
    drawn, others = resample(ours, tokens, stratum=0), resample(theirs, tokens, stratum=1)
    return Gain(
        ours=float(iqm(first)),
        theirs=float(iqm(second)),
        difference=percentile_interval(float(iqm(first) - iqm(second)), iqm(drawn) - iqm(others)),
        probability=percentile_interval(float(_share_better(first, second)), _share_better(drawn, others)),
    )


def difference_if_equal(first: FloatArray, second: FloatArray, tokens: FloatArray) -> Interval:
    """The difference of two groups of seeds of *one* router, and what chance alone makes of it.

    All seeds are drawn from both groups together, as they come from one router. Drawn within a group, two or three
    seeds vary too little, and equal groups would be told apart in one run of six.

    Args:
        first: Sums (num_seeds, num_documents), float64.
        second: The same; its number of seeds may differ.
        tokens: Tokens of each document (num_documents,), float64.

    Returns:
        First minus second; the interval holds 0 in at least 19 of 20 runs if the groups are equal.
    """
    estimate = float(iqm(first.sum(-1)) - iqm(second.sum(-1))) / tokens.sum()
    pooled = np.concatenate([first, second])
    scores = on_drawn_documents(pooled, tokens)
    places = np.random.default_rng(0).integers(len(pooled), size=(RESAMPLES, len(pooled)))
    drawn = np.take_along_axis(scores, places, axis=1)
    chance = iqm(drawn[:, : len(first)]) - iqm(drawn[:, len(first) :])
    return percentile_interval(float(estimate), estimate - chance)


def _share_better(ours: FloatArray, theirs: FloatArray) -> FloatArray:
    """Share of pairs in which ours is larger, over the last axis of both."""
    pairs = ours[..., :, None] - theirs[..., None, :]
    share: FloatArray = ((pairs > 0) + 0.5 * (pairs == 0)).mean(axis=(-2, -1))
    return share

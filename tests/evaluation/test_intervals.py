from __future__ import annotations

import numpy as np
import pytest

from evaluation import DocumentSums, accuracy_difference, log_likelihood_difference, ratio_interval


def test_interval_matches_normal_theory_for_equal_documents():
    values = np.random.default_rng(1).normal(-1.3, 0.2, size=400)
    interval = ratio_interval(values * 100, np.full(400, 100.0))
    half_width = 1.96 * values.std() / np.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


def test_long_documents_count_for_more():
    assert ratio_interval(np.array([10.0, 0.0]), np.array([30.0, 10.0])).mean == 0.25


def test_same_seed_gives_the_same_interval():
    sums, tokens = np.arange(20.0), np.full(20, 7.0)
    assert ratio_interval(sums, tokens, seed=3) == ratio_interval(sums, tokens, seed=3)
    assert ratio_interval(sums, tokens, seed=3) != ratio_interval(sums, tokens, seed=4)


def test_pairing_narrows_the_interval():
    generator = np.random.default_rng(2)
    tokens = generator.integers(50, 200, size=60).astype(float)
    first = tokens * generator.normal(-1.3, 0.3, size=60)
    second = first - tokens * generator.normal(0.02, 0.01, size=60)
    ours = DocumentSums(tokens=tokens, log_likelihood=first, correct=0.5 * tokens)
    theirs = DocumentSums(tokens=tokens, log_likelihood=second, correct=0.4 * tokens)
    paired = log_likelihood_difference(ours, theirs)
    unpaired = ratio_interval(first, tokens)
    assert paired.low > 0, "a difference of 0.02 nats must show"
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)
    assert accuracy_difference(ours, theirs).low == pytest.approx(0.1)


def test_other_documents_cannot_be_paired():
    first = DocumentSums(tokens=np.array([4.0, 2.0]), log_likelihood=np.zeros(2), correct=np.zeros(2))
    second = DocumentSums(tokens=np.array([4.0, 3.0]), log_likelihood=np.zeros(2), correct=np.zeros(2))
    with pytest.raises(ValueError, match="must cover the same tokens of the same documents, got 6 in 2 and 7 in 2"):
        log_likelihood_difference(first, second)

from __future__ import annotations

import numpy as np
import pytest

from evaluation import gain, iqm, ratio_interval
from evaluation.bootstrap import difference_if_equal, resample
from evaluation.intervals import percentile_interval

TOKENS = np.full(50, 100.0)


def sums(per_seed, noise=0.0, seed=0):
    """Sums (num_seeds, num_documents) with these means a token; `noise` is a document's own deviation, all seeds'."""
    documents = np.random.default_rng(seed).normal(0.0, 1.0, size=len(TOKENS))
    documents -= documents.mean()
    return (np.array(per_seed)[:, None] + noise * documents) * TOKENS


def test_interquartile_mean_by_hand():
    assert iqm(np.array([90.0, 1.0, 3.0, 2.0, 4.0])) == 3.0
    assert iqm(np.array([1.0, 2.0, 6.0])) == 3.0, "a quarter of three is no whole seed"
    assert iqm(np.array([[1.0], [2.0]])).tolist() == [1.0, 2.0]
    assert iqm(np.arange(8.0)) == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_planted_difference_is_found():
    ours, theirs = sums([-1.30, -1.31, -1.29, -1.30, -1.32], noise=0.5), sums([-1.40], noise=0.5)
    found = gain(ours, theirs, TOKENS)
    assert found.ours == pytest.approx((-1.30 - 1.31 - 1.30) / 3)
    assert found.theirs == pytest.approx(-1.40)
    assert found.difference.mean == pytest.approx(found.ours - found.theirs)
    assert -1.32 + 1.40 <= found.difference.low < found.difference.mean < found.difference.high <= -1.29 + 1.40
    assert (found.probability.low, found.probability.high) == (1.0, 1.0)


def test_seeds_widen_the_interval_and_documents_are_paired():
    """The documents' own noise is shared and cancels; what the seeds do does not."""
    steady = gain(sums([-1.3] * 5, noise=0.5), sums([-1.4], noise=0.5), TOKENS).difference
    assert steady.high - steady.low < 1e-9
    shaky = gain(sums([-1.3, -1.25, -1.35, -1.28, -1.32]), sums([-1.4]), TOKENS).difference
    assert 0.02 < shaky.high - shaky.low < 0.1


def test_one_seed_each_is_the_paired_bootstrap_over_documents():
    ours, theirs = sums([-1.3], noise=0.5, seed=1), sums([-1.4], noise=0.5, seed=2)
    found, expected = gain(ours, theirs, TOKENS).difference, ratio_interval((ours - theirs)[0], TOKENS)
    assert vars(found) == pytest.approx(vars(expected))


def test_probability_of_improvement_by_hand():
    """Seeds 1, 3 against 2, 2: two of four pairs; a tie counts half."""
    assert gain(sums([1.0, 3.0]), sums([2.0, 2.0]), TOKENS).probability.mean == 0.5
    assert gain(sums([1.0, 3.0, 4.0]), sums([2.0, 2.0]), TOKENS).probability.mean == pytest.approx(4 / 6)
    assert gain(sums([2.0]), sums([2.0]), TOKENS).probability.mean == 0.5


def test_routers_draw_their_seeds_apart():
    """With the same draws for both, five equal seeds would always cancel, and the interval would have no width."""
    seeds = sums([1.0, 2.0, 3.0, 4.0, 5.0])
    found = gain(seeds, seeds, TOKENS)
    assert found.difference.mean == 0.0
    assert found.difference.low < -0.5
    assert found.difference.high > 0.5
    assert found.probability.mean == pytest.approx(0.5)


def test_resamples_have_the_spread_of_the_mean_of_seeds():
    seeds = np.random.default_rng(3).normal(0.0, 1.0, size=40)
    means = resample(sums(seeds), TOKENS, stratum=0).mean(axis=-1)
    assert means.mean() == pytest.approx(seeds.mean(), abs=0.02)
    assert means.std() == pytest.approx(seeds.std() / np.sqrt(40), rel=0.1)


def test_many_computes_are_resampled_as_each_alone():
    both = np.stack([sums([1.0, 2.0]), sums([5.0, 7.0])])
    together = resample(both, TOKENS, stratum=1)
    for index in range(2):
        np.testing.assert_array_equal(together[:, index], resample(both[index], TOKENS, stratum=1))


def test_halves_of_one_router_come_out_equal_and_others_do_not():
    generator = np.random.default_rng(4)
    wrong = 0
    for _ in range(40):
        seeds = generator.normal(-1.3, 0.02, size=5)
        found = difference_if_equal(sums(seeds[::2]), sums(seeds[1::2]), TOKENS)
        assert found.mean == pytest.approx(seeds[::2].mean() - seeds[1::2].mean())
        wrong += not found.low <= 0 <= found.high
    assert wrong <= 5
    apart = difference_if_equal(sums([-1.31, -1.3, -1.29]), sums([-1.3, -1.31]), TOKENS)
    assert apart.low <= 0 <= apart.high


def test_interval_may_end_out_of_reach():
    samples = np.append(np.full(1900, 0.7), np.full(100, np.inf))
    interval = percentile_interval(0.7, samples)
    assert interval.to_json() == {"mean": 0.7, "low": 0.7, "high": None}

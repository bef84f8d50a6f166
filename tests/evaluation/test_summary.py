from __future__ import annotations

import pytest

from evaluation import average_quality, hypervolume, summarize


def test_hypervolume_by_hand():
    assert hypervolume([(0.5, 0.6)], 0.2) == pytest.approx(0.2)
    assert hypervolume([(0.5, 0.6), (0.8, 0.7)], 0.2) == pytest.approx(0.3 * 0.4 + 0.2 * 0.5)


@pytest.mark.parametrize("useless", [(0.6, 0.5), (1.2, 0.9), (0.3, 0.1), (0.5, 0.6)])
def test_hypervolume_ignores_dominated_and_out_of_range_points(useless):
    assert hypervolume([(0.5, 0.6), useless], 0.2) == pytest.approx(0.2)
    assert hypervolume([(1.0, 0.9)], 0.2) == 0


def test_average_quality_by_hand():
    assert average_quality([(0.2, 0.4), (0.6, 0.8)], 1.0) == pytest.approx(0.24 + 0.32)
    assert average_quality([(0.2, 0.4), (0.6, 0.8)], 2.0) == pytest.approx((0.24 + 1.12) / 2)


def test_average_quality_uses_the_non_decreasing_hull():
    hull = average_quality([(0.2, 0.4), (0.6, 0.8)], 1.0)
    below_the_chord, after_the_top = (0.4, 0.5), (0.9, 0.7)
    assert average_quality([(0.2, 0.4), below_the_chord, (0.6, 0.8), after_the_top], 1.0) == pytest.approx(hull)
    above_the_chord = (0.4, 0.7)
    assert average_quality([(0.2, 0.4), above_the_chord, (0.6, 0.8)], 1.0) == pytest.approx(0.11 + 0.15 + 0.32)


def test_summary_says_null_where_out_of_reach(make_point):
    curves = {
        "learned": [make_point(0.4, -1.2, 0.76), make_point(0.6, -1.0, 0.8)],
        "random": [make_point(0.8, -2.0, 0.3)],
    }
    summary = summarize(curves, native_accuracy=0.8, random_accuracy=0.3)
    assert summary["random"] == {
        "hypervolume": 0.0,
        "aiq": 0.0,
        "compute_at_99_accuracy": None,
        "accuracy_at_50_compute": None,
    }
    assert summary["learned"]["accuracy_at_50_compute"] == pytest.approx(0.78)
    assert summary["learned"]["aiq"] == pytest.approx((0.2 * 0.78 + 0.2 * 0.8) / 0.8)

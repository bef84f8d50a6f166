from __future__ import annotations

import pytest

from evaluation import average_quality, hypervolume, summarize


@pytest.fixture
def curve(make_scored):
    """Curve of (compute, accuracy) corners; a third number is the accuracy on selection text."""

    def make(*corners):
        return [
            make_scored(compute, -1.0, accuracy[0], selection=(compute, -1.0, accuracy[-1]))
            for compute, *accuracy in corners
        ]

    return make


def test_hypervolume_by_hand(curve):
    assert hypervolume(curve((0.5, 0.6)), 0.2) == pytest.approx(0.2)
    assert hypervolume(curve((0.5, 0.6), (0.8, 0.7)), 0.2) == pytest.approx(0.3 * 0.4 + 0.2 * 0.5)


@pytest.mark.parametrize("useless", [(0.6, 0.5), (1.2, 0.9), (0.3, 0.1), (0.5, 0.6)])
def test_hypervolume_ignores_dominated_and_out_of_range_settings(curve, useless):
    assert hypervolume(curve((0.5, 0.6), useless), 0.2) == pytest.approx(0.2)
    assert hypervolume(curve((1.0, 0.9)), 0.2) == 0


def test_average_quality_by_hand(curve):
    assert average_quality(curve((0.2, 0.4), (0.6, 0.8)), 1.0) == pytest.approx(0.24 + 0.32)
    assert average_quality(curve((0.2, 0.4), (0.6, 0.8)), 2.0) == pytest.approx((0.24 + 1.12) / 2)


def test_average_quality_uses_the_non_decreasing_hull(curve):
    hull = average_quality(curve((0.2, 0.4), (0.6, 0.8)), 1.0)
    below_the_chord, after_the_top = (0.4, 0.5), (0.9, 0.7)
    bent = curve((0.2, 0.4), below_the_chord, (0.6, 0.8), after_the_top)
    assert average_quality(bent, 1.0) == pytest.approx(hull)
    above_the_chord = (0.4, 0.7)
    high = curve((0.2, 0.4), above_the_chord, (0.6, 0.8))
    assert average_quality(high, 1.0) == pytest.approx(0.11 + 0.15 + 0.32)


def test_areas_are_of_what_selection_text_chose(curve):
    """The lucky second setting is chosen, by 0.7 on selection text, and adds what it is worth, 0.5."""
    lucky = curve((0.5, 0.6, 0.6), (0.8, 0.5, 0.7))
    assert hypervolume(lucky, 0.2) == pytest.approx(0.3 * 0.4 + 0.2 * 0.3)
    assert average_quality(lucky, 1.0) == pytest.approx(0.3 * 0.55 + 0.2 * 0.5)
    unlucky = curve((0.5, 0.6, 0.6), (0.8, 0.9, 0.5))
    assert hypervolume(unlucky, 0.2) == pytest.approx(0.5 * 0.4)


def test_summary_says_null_where_out_of_reach(make_scored):
    curves = {
        "learned": [[make_scored(0.4, -1.2, 0.76), make_scored(0.6, -1.0, 0.8)]],
        "random": [[make_scored(0.8, -2.0, 0.3)]],
    }
    summary = summarize(curves, random_accuracy=0.3)
    flat = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert summary["random"] == {
        "hypervolume": 0.0,
        "aiq": 0.0,
        "compute_at_99_accuracy": None,
        "accuracy_at_50_compute": None,
        "seeds": 1,
        "intervals": {"hypervolume": flat, "aiq": flat},
    }
    assert summary["learned"]["accuracy_at_50_compute"] == pytest.approx(0.78)
    assert summary["learned"]["aiq"] == pytest.approx((0.2 * 0.78 + 0.2 * 0.8) / 0.8)
    assert summary["learned"]["compute_at_99_accuracy"] == pytest.approx(0.56)


def test_summary_is_the_mean_over_seeds_with_an_interval(make_scored):
    seeds = [[make_scored(0.5, -1.0, accuracy, seed=seed)] for seed, accuracy in enumerate((0.5, 0.6, 0.7, 0.6, 0.6))]
    entry = summarize({"learned": seeds}, random_accuracy=0.2)["learned"]
    assert entry["seeds"] == 5
    assert entry["hypervolume"] == pytest.approx(0.5 * 0.4)
    interval = entry["intervals"]["hypervolume"]
    assert 0.5 * 0.3 < interval["low"] < interval["mean"] < interval["high"] < 0.5 * 0.5
    assert entry["intervals"]["accuracy_at_50_compute"]["mean"] == pytest.approx(0.6)


def test_share_of_native_is_that_of_the_same_documents(make_scored):
    """Every resample has its own native accuracy: a router that is native on each document always keeps 100 %."""
    curve = [make_scored(0.4, -2.0, 0.6), make_scored(0.7, -1.0, 0.8)]
    interval = summarize({"learned": [curve]}, random_accuracy=0.2)["learned"]["intervals"]["compute_at_99_accuracy"]
    assert interval["low"] == pytest.approx(interval["high"]) == pytest.approx(0.7 - 0.3 * 0.008 / 0.2)

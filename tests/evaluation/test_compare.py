from __future__ import annotations

import pytest

from evaluation import accuracy_at, at_compute, compare, compute_at_accuracy, frontier, loss_at


def test_interpolates_between_neighbours(make_point):
    points = [make_point(0.8, -1.0, 0.8), make_point(0.4, -2.0, 0.6)]
    assert loss_at(points, 0.5) == pytest.approx(1.75)
    assert accuracy_at(points, 0.5) == pytest.approx(0.65)
    assert loss_at(points, 0.4) == 2.0
    assert loss_at(points, 0.8) == 1.0


def test_does_not_extrapolate_below_the_cheapest_point(make_point):
    assert at_compute([make_point(0.4), make_point(0.8)], 0.39) is None
    assert at_compute([], 0.39) is None


def test_budget_need_not_be_used_up(make_point):
    assert loss_at([make_point(0.4, -2.0), make_point(0.8, -1.0)], 0.81) == 1.0


def test_dominated_points_leave_the_curve(make_point):
    good, worse, best = make_point(0.4, -2.0), make_point(0.6, -3.0), make_point(0.8, -1.0)
    twin = make_point(0.8, -1.0)
    assert frontier([best, worse, good, twin]) == [good, best]
    assert loss_at([best, worse, good], 0.6) == pytest.approx(1.5)


def test_curve_is_flat_where_paying_more_buys_nothing(make_point):
    points = [make_point(0.4, -1.5), make_point(0.8, -1.6)]
    assert loss_at(points, 0.6) == 1.5
    assert loss_at(points, 0.9) == 1.5


def test_compute_at_accuracy_interpolates(make_point):
    points = [make_point(0.4, -2.0, 0.6), make_point(0.8, -1.0, 0.8)]
    assert compute_at_accuracy(points, 0.8, 0.99) == pytest.approx(0.8 - 0.4 * 0.008 / 0.2)
    assert compute_at_accuracy(points, 0.6, 0.99) == 0.4
    assert compute_at_accuracy(points, 0.9, 0.99) is None
    assert compute_at_accuracy([], 0.9) is None


def test_accuracy_must_be_kept_from_there_on(make_point):
    points = [make_point(0.2, -4.0, 0.8), make_point(0.4, -3.0, 0.6), make_point(0.8, -1.0, 0.8)]
    assert compute_at_accuracy(points, 0.8, 0.875) == pytest.approx(0.6)


def test_rival_is_the_best_fixed_router_at_each_compute(make_point):
    learned = [make_point(0.4, -1.2, 0.7), make_point(0.8, -1.0, 0.8)]
    rivals = {
        "flat": [make_point(0.4, -1.5, 0.65), make_point(0.8, -1.4, 0.66)],
        "steep": [make_point(0.6, -1.6, 0.6), make_point(0.8, -1.1, 0.75)],
    }
    low, high = compare(learned, rivals, [0.4, 0.8])
    assert (low.rival, high.rival) == ("flat", "steep")
    assert low.difference.mean == pytest.approx(0.3)
    assert low.difference.low == pytest.approx(0.3), "both documents differ by the same amount"
    assert low.accuracy_difference.mean == pytest.approx(0.05)
    assert (high.learned_loss, high.rival_loss) == (pytest.approx(1.0), pytest.approx(1.1))


def test_computes_that_nobody_reaches_are_left_out(make_point):
    learned = [make_point(0.4), make_point(0.8)]
    assert compare(learned, {"rival": [make_point(0.7)]}, [0.5, 0.7, 0.9])[0].compute == 0.7
    assert compare(learned, {}, [0.5]) == []

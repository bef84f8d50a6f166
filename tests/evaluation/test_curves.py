from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluation import (
    Scored,
    accuracy_at,
    at_compute,
    compute_at_accuracy,
    frontier,
    group_curves,
    loss_at,
    scores_along,
)
from evaluation.curves import cache_along


def with_cache(scored, share):
    return replace(scored, held_out=replace(scored.held_out, cache=share))


def test_interpolates_between_neighbours(make_scored):
    curve = [make_scored(0.8, -1.0, 0.8), make_scored(0.4, -2.0, 0.6)]
    assert loss_at(curve, 0.5) == pytest.approx(1.75)
    assert accuracy_at(curve, 0.5) == pytest.approx(0.65)
    assert loss_at(curve, 0.4) == 2.0
    assert loss_at(curve, 0.8) == 1.0


def test_cache_is_interpolated_as_scores_are(make_scored):
    """Between .4 and .8 of compute in proportion, above them as the dearest, below not; mean over two seeds."""
    one = [with_cache(make_scored(0.8, -1.0), 0.9), with_cache(make_scored(0.4, -2.0), 0.5)]
    other = [with_cache(make_scored(0.8, -1.0), 0.7), make_scored(0.4, -2.0)]
    np.testing.assert_allclose(cache_along([one], [0.4, 0.5, 0.9]), [0.5, 0.6, 0.9])
    assert np.isnan(cache_along([one], [0.3])).all()
    np.testing.assert_allclose(cache_along([one, other], [0.8, 0.4]), [0.8, 0.75])


def test_does_not_extrapolate_below_the_cheapest_setting(make_scored):
    assert at_compute([make_scored(0.4), make_scored(0.8)], 0.39) is None
    assert at_compute([], 0.39) is None


def test_budget_need_not_be_used_up(make_scored):
    assert loss_at([make_scored(0.4, -2.0), make_scored(0.8, -1.0)], 0.81) == 1.0


def test_dominated_settings_leave_the_curve(make_scored):
    good, worse, best = make_scored(0.4, -2.0), make_scored(0.6, -3.0), make_scored(0.8, -1.0)
    twin = make_scored(0.8, -1.0)
    assert frontier([best, worse, good, twin]) == [good, best]
    assert loss_at([best, worse, good], 0.6) == pytest.approx(1.5)


def test_what_selection_text_chose_is_reported_with_its_held_out_score(make_scored):
    """`lucky` looks best where settings are chosen and is worse where they are reported: the worse score stands."""
    lucky = make_scored(0.5, -1.9, 0.5, selection=(0.5, -1.0, 0.8))
    steady = make_scored(0.5, -1.2, 0.7, selection=(0.51, -1.1, 0.75))
    assert frontier([steady, lucky]) == [lucky]
    assert loss_at([steady, lucky], 0.6) == pytest.approx(1.9)
    assert accuracy_at([steady, lucky], 0.6) == pytest.approx(0.5)
    assert at_compute([steady, lucky], 0.6, "selection").mean_log_likelihood == pytest.approx(-1.0)


def test_curve_runs_by_the_compute_of_the_text_that_is_asked_for(make_scored):
    """Equal compute means equal on that text, also where the order of two settings differs between the texts."""
    first = make_scored(0.5, -1.4, selection=(0.40, -2.0, 0.5))
    second = make_scored(0.4, -1.8, selection=(0.45, -1.0, 0.5))
    assert frontier([first, second]) == [second, first]
    assert frontier([first, second], "selection") == [first, second]
    assert loss_at([first, second], 0.45) == pytest.approx(1.6)
    assert at_compute([first, second], 0.425, "selection").mean_log_likelihood == pytest.approx(-1.5)


def test_settings_of_one_compute_need_no_interpolation(make_scored):
    twins = [make_scored(0.5, -1.4, selection=(0.50, -2.0)), make_scored(0.5, -1.8, selection=(0.55, -1.0))]
    assert loss_at(twins, 0.5) == pytest.approx(1.4)
    assert loss_at(twins, 0.6) == pytest.approx(1.8)


def test_compute_at_accuracy_interpolates(make_scored):
    curve = [make_scored(0.4, -2.0, 0.6), make_scored(0.8, -1.0, 0.8)]  # native has 0.8
    assert compute_at_accuracy(curve, 0.99) == pytest.approx(0.8 - 0.4 * 0.008 / 0.2)
    assert compute_at_accuracy(curve, 0.74) == 0.4
    assert compute_at_accuracy(curve, 1.01) is None
    assert compute_at_accuracy([], 0.9) is None


def test_accuracy_must_be_kept_from_there_on(make_scored):
    curve = [make_scored(0.2, -4.0, 0.8), make_scored(0.4, -3.0, 0.6), make_scored(0.8, -1.0, 0.8)]
    assert compute_at_accuracy(curve, 0.875) == pytest.approx(0.6)


def test_curves_are_grouped_by_router_and_seed(make_scored):
    scored = [make_scored(0.5, router="a", seed=seed) for seed in (1, 0, 1)] + [make_scored(0.5, router="b")]
    curves = group_curves(scored)
    assert list(curves) == ["a", "b"]
    assert curves["a"] == [[scored[0], scored[2]], [scored[1]]]


def test_five_seeds_are_averaged_without_the_ends(make_scored):
    seeds = [[make_scored(0.5, -loss, seed=seed)] for seed, loss in enumerate((1.0, 1.1, 1.2, 1.3, 9.0))]
    assert scores_along(seeds, [0.4, 0.6], "log_likelihood") == pytest.approx([np.nan, -1.2], nan_ok=True)


def test_compute_that_one_seed_does_not_reach_is_not_reached(make_scored):
    seeds = [[make_scored(0.5, -1.0)], [make_scored(0.6, -1.0)]]
    assert np.isnan(scores_along(seeds, [0.55], "accuracy")).all()


def test_json_has_the_score_that_chose_beside_the_one_that_is_reported(make_scored):
    entry = make_scored(0.5, -1.9, 0.5, selection=(0.6, -1.0, 0.7), causal=False, seed=3).to_json()
    assert entry["selection"] == {
        "compute": 0.6,
        "accuracy": pytest.approx(0.7),
        "log_likelihood": pytest.approx(-1.0),
    }
    assert (entry["compute"], entry["log_likelihood"], entry["causal"], entry["seed"]) == (0.5, -1.9, False, 3)


def test_one_text_may_stand_for_both(make_point):
    point = make_point(0.5)
    assert Scored.on_one_text(point).selection is Scored.on_one_text(point).held_out is point

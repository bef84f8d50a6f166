from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluation import DocumentSums, Scored, best_others, check_native, check_seeds, compare


def test_rival_is_the_best_other_at_each_compute(make_scored):
    curves = {
        "learned": [[make_scored(0.4, -1.2, 0.7), make_scored(0.8, -1.0, 0.8)]],
        "flat": [[make_scored(0.4, -1.5, 0.65), make_scored(0.8, -1.4, 0.66)]],
        "steep": [[make_scored(0.6, -1.6, 0.6), make_scored(0.8, -1.1, 0.75)]],
    }
    comparisons = compare(curves, [0.4, 0.8])
    low, high, low_accuracy, _ = best_others(comparisons)
    assert (low.rival, high.rival) == ("flat", "steep")
    assert low.gain.difference.mean == pytest.approx(0.3)
    assert low.gain.difference.low == pytest.approx(0.3), "both documents differ by the same amount"
    assert low_accuracy.quantity == "accuracy"
    assert low_accuracy.gain.difference.mean == pytest.approx(0.05)
    assert (high.gain.ours, high.gain.theirs) == (pytest.approx(-1.0), pytest.approx(-1.1))
    assert [(c.compute, c.rival) for c in comparisons if c.quantity == "accuracy"] == [
        (0.4, "flat"),
        (0.8, "flat"),
        (0.8, "steep"),
    ]


def test_best_other_is_named_by_selection_text_and_judged_on_held_out_text(make_scored):
    curves = {
        "learned": [[make_scored(0.5, -1.2, 0.7)]],
        "lucky": [[make_scored(0.5, -1.6, 0.5, selection=(0.5, -1.0, 0.8))]],
        "steady": [[make_scored(0.5, -1.3, 0.6, selection=(0.5, -1.1, 0.7))]],
    }
    (nats, accuracy) = best_others(compare(curves, [0.5]))
    assert (nats.rival, accuracy.rival) == ("lucky", "lucky")
    assert nats.gain.difference.mean == pytest.approx(0.4)
    assert accuracy.gain.difference.mean == pytest.approx(0.2)


def test_each_quantity_has_its_own_best_other(make_scored):
    curves = {
        "learned": [[make_scored(0.5, -1.2, 0.7)]],
        "likely": [[make_scored(0.5, -1.3, 0.5)]],
        "right": [[make_scored(0.5, -1.6, 0.6)]],
    }
    assert [row.rival for row in best_others(compare(curves, [0.5]))] == ["likely", "right"]


def test_bound_is_compared_but_best_only_where_there_is_no_rival(make_scored):
    curves = {
        "learned": [[make_scored(0.4, -1.2)]],
        "bound": [[make_scored(0.4, -1.1, causal=False)]],
        "rival": [[make_scored(0.6, -1.5)]],
    }
    comparisons = [row for row in compare(curves, [0.5, 0.7], bounds={"bound"}) if row.quantity == "log_likelihood"]
    assert [(row.compute, row.rival, row.best) for row in comparisons] == [
        (0.5, "bound", True),
        (0.7, "bound", False),
        (0.7, "rival", True),
    ]


def test_several_seeds_enter_one_comparison(make_scored):
    learned = [[make_scored(0.5, value, seed=seed)] for seed, value in enumerate((-1.0, -1.1, -1.2, -1.3, -9.0))]
    curves = {"learned": learned, "rival": [[make_scored(0.5, -1.25)]]}
    found = compare(curves, [0.5])[0].gain
    assert found.ours == pytest.approx(-1.2)
    assert found.difference.mean == pytest.approx(0.05)
    assert found.probability.mean == pytest.approx(3 / 5)
    assert found.difference.low < 0 < found.difference.high


def test_computes_that_nobody_reaches_are_left_out(make_scored):
    learned = [[make_scored(0.4), make_scored(0.8)]]
    comparisons = compare({"learned": learned, "rival": [[make_scored(0.7)]]}, [0.5, 0.7, 0.9])
    assert {row.compute for row in comparisons} == {0.7, 0.9}
    assert compare({"learned": learned}, [0.5]) == []
    assert compare({"rival": learned}, [0.5]) == []


def test_other_text_cannot_be_compared(make_scored):
    point = make_scored(0.5, -1.2).held_out
    other = DocumentSums(tokens=np.array([10.0, 31.0]), log_likelihood=np.zeros(2), correct=np.zeros(2))
    curves = {
        "learned": [[make_scored(0.5, -1.2)]],
        "rival": [[Scored.on_one_text(replace(point, documents=other))]],
    }
    with pytest.raises(ValueError, match="must cover the same tokens of the same documents"):
        compare(curves, [0.5])


def test_native_against_itself_is_exactly_equal(make_point):
    for check in check_native(make_point(1.0), make_point(1.0)):
        assert check.equal
        assert check.difference.to_json() == {"mean": 0.0, "low": 0.0, "high": 0.0}
    nats, accuracy = check_native(make_point(1.0), make_point(1.0, -1.0 + 1e-9))
    assert (nats.equal, accuracy.equal) == (False, True)
    assert nats.exact


def test_halves_of_the_seeds_are_compared_from_four_seeds_on(make_scored):
    losses = (1.30, 1.31, 1.29, 1.30, 1.32)
    learned = [[make_scored(0.5, -loss, router="learned", seed=seed)] for seed, loss in enumerate(losses)]
    assert check_seeds(learned[:3], [0.5]) == []
    assert check_seeds(learned, [0.4]) == []
    nats, accuracy = check_seeds(learned, [0.4, 0.5, 0.6])
    assert nats.name == "learned, seeds 0 2 4 against 1 3"
    assert nats.difference.mean == pytest.approx(-(1.30 + 1.29 + 1.32) / 3 + (1.31 + 1.30) / 2)
    assert nats.equal
    assert accuracy.equal
    assert not nats.exact

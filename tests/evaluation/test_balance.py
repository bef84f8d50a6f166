from __future__ import annotations

import numpy as np
import pytest

from evaluation.balance import Balance, balance


def test_balance_by_hand():
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert balance([np.array([3.0, 1.0, 0.0, 0.0])], 4).to_json() == pytest.approx(
        {
            "load_cv": 1.5**0.5,  # variance (4 + 0 + 1 + 1) / 4 around a mean of 1
            "max_vio": 2.0,
            "dead_units": 0.5,
            "diversity": np.exp(entropy) / 4,
            "busiest_load": 0.75,
        }
    )


def test_even_loads_are_the_best_case_whatever_their_size():
    even = balance([np.full(8, 5.0)], 20)
    assert even.to_json() == pytest.approx(
        {"load_cv": 0.0, "max_vio": 0.0, "dead_units": 0.0, "diversity": 1.0, "busiest_load": 0.25}
    )


def test_sites_count_alike_whatever_their_load():
    even, first = np.full(4, 100.0), np.array([1.0, 0.0, 0.0, 0.0])
    both = balance([even, first], 400)
    assert both.max_vio == pytest.approx((0 + 3) / 2)
    assert both.dead_units == pytest.approx((0 + 0.75) / 2)
    assert both.diversity == pytest.approx((1 + 0.25) / 2)


def test_a_site_never_used_is_dead_and_not_a_division_by_zero():
    assert balance([np.zeros(4)], 10) == Balance(
        load_cv=0.0, max_vio=0.0, dead_units=1.0, diversity=0.0, busiest_load=0.0
    )


def test_without_expert_sites_nothing_is_unbalanced():
    assert balance([], 10).dead_units == 0.0
    assert balance([], 10).diversity == 1.0

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from evaluation.showcase import nearest, showcase


def seen(make_point, *settings):
    """Specs and their points from (router, compute, log-likelihood, seed)."""
    specs, points = [], []
    for name, compute, log_likelihood, seed in settings:
        specs.append(SimpleNamespace(name=name, compute=compute, seed=seed))
        points.append(replace(make_point(compute, log_likelihood, router=name), seed=seed))
    return specs, points


def shown(specs):
    return [(spec.name, spec.compute, spec.seed) for spec in specs]


def test_showcase_takes_the_learned_router_three_times_and_its_best_rival_once(make_point):
    ours = [("learned", compute, -1 / compute, seed) for seed in (3, 4) for compute in (0.3, 0.42, 0.55, 0.68, 0.9)]
    rivals = [
        ("good", 0.45, -1.1, None),
        ("good", 0.8, -1.0, None),
        ("bad", 0.5, -3.0, None),
        ("oracle", 0.2, -0.9, None),
        ("dear", 0.9, -0.95, None),
    ]
    specs, points = seen(make_point, *rivals, *ours)
    expected = [("learned", 0.68, 3), ("learned", 0.55, 3), ("learned", 0.42, 3), ("good", 0.45, None)]
    assert shown(showcase(specs, points, bounds={"oracle"})) == expected
    without = showcase(specs[:5], points[:5], bounds={"oracle"})
    assert shown(without) == [("good", 0.8, None), ("good", 0.45, None)]
    named = shown(showcase(specs, points, best="bad"))
    assert named == [*expected[:3], ("bad", 0.5, None)]
    assert showcase([], []) == []


def test_what_cannot_run_on_the_backbone_is_not_shown(make_point):
    specs, points = seen(make_point, ("smaller", 0.5, -0.5, None), ("plain", 0.5, -1.0, None))
    specs[0].score_on = lambda evaluator: None
    assert shown(showcase(specs, points)) == [("plain", 0.5, None)]


def test_nearest_is_never_a_setting_that_another_beats():
    assert nearest([(0.5, -2.0), (0.45, -1.0), (0.5, -1.0)], 0.5, lambda setting: setting) == (0.45, -1.0)

from __future__ import annotations

import numpy as np
import pytest

from evaluation import save_figure, tradeoff_figure, usage_figure
from evaluation.plots import COLORS, GREY


@pytest.fixture
def curves(make_scored):
    return {
        "learned": [[make_scored(0.4, -1.2, 0.7), make_scored(0.8, -1.0, 0.8), make_scored(0.9, -1.1, 0.79)]],
        "random": [[make_scored(0.5, -3.0, 0.1), make_scored(0.7, -1.1, 0.75)]],
    }


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_tradeoff_shows_every_router_on_both_panels(curves, make_point):
    figure = tradeoff_figure(curves, make_point(1.0))
    accuracy, log_likelihood = figure.axes
    for axes, values in ((accuracy, [0.7, 0.8]), (log_likelihood, [-1.2, -1.0])):
        lines = lines_of(axes)
        np.testing.assert_allclose(lines["learned"].get_xdata(), [0.4, 0.8])
        np.testing.assert_allclose(lines["learned"].get_ydata(), values)
        assert lines["learned"].get_zorder() > lines["random"].get_zorder()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"native", "learned", "random"}


def test_line_is_the_mean_over_seeds_where_all_of_them_reach(make_scored, make_point):
    seeds = [
        [make_scored(0.4, -1.2, 0.70, seed=0), make_scored(0.8, -1.0, 0.80, seed=0)],
        [make_scored(0.6, -1.3, 0.65, seed=1), make_scored(0.8, -1.1, 0.78, seed=1)],
    ]
    figure = tradeoff_figure({"learned": seeds}, make_point(1.0))
    line = lines_of(figure.axes[1])["learned"]
    np.testing.assert_allclose(line.get_xdata(), [0.6, 0.8])
    np.testing.assert_allclose(line.get_ydata(), [-1.2, -1.05])
    low, high = figure.axes[1].collections[0].get_paths()[0].vertices[:, 1][[0, 1]].min(), -1.1
    assert low <= -1.3 + 1e-9 < high, "the band reaches to the worst seed"


def test_no_two_of_many_routers_look_alike_and_only_the_first_have_a_colour(make_scored, make_point):
    points = [make_scored(0.5, -1.1, 0.7), make_scored(0.6, -1.0, 0.75)]
    curves = {f"router-{number}": [points] for number in range(30)}
    figure = tradeoff_figure({"learned": [[make_scored(0.4, -1.2, 0.7)]], **curves}, make_point(1.0))
    lines = lines_of(figure.axes[0])
    looks = {name: (line.get_color(), line.get_marker(), line.get_linestyle()) for name, line in lines.items()}
    assert len(set(looks.values())) == len(looks) == 32
    grey = {name for name, (color, _, _) in looks.items() if color == GREY}
    assert grey == {f"router-{number}" for number in range(len(COLORS), 30)}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:3] == ["native", "learned", "router-0"]


def test_router_that_is_not_causal_is_named_so(curves, make_scored, make_point):
    curves["sequence"] = [[make_scored(0.5, -1.1, 0.7, causal=False)]]
    names = {text.get_text() for text in tradeoff_figure(curves, make_point(1.0)).legends[0].get_texts()}
    assert "sequence (not causal)" in names


def test_axes_keep_to_the_learned_router_and_say_what_they_hide(curves, make_point):
    log_likelihood = tradeoff_figure(curves, make_point(1.0)).axes[1]
    assert -1.3 < log_likelihood.get_ylim()[0] < -1.2
    assert log_likelihood.get_title(loc="right") == "1 of 4 settings lie outside the axes"


def test_axes_end_half_a_nat_below_native(curves, make_scored, make_point):
    curves["learned"][0].append(make_scored(0.1, -4.0, 0.1))
    assert tradeoff_figure(curves, make_point(1.0)).axes[1].get_ylim()[0] > -1.6


def test_figures_become_png_files(curves, make_point, tmp_path):
    save_figure(tradeoff_figure(curves, make_point(1.0)), tmp_path / "tradeoff.png", dpi=50)
    usage = make_point(1.0).usage
    save_figure(usage_figure(usage, ["layer0.heads", "layer0.experts"]), tmp_path / "usage.png", dpi=50)
    for name in ("tradeoff.png", "usage.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_usage_leaves_units_that_do_not_exist_blank():
    figure = usage_figure(np.array([[0.5, np.nan], [0.1, 0.2]]), ["layer0.heads", "layer0.experts"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["50", "10", "20"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer0.heads", "layer0.experts"]

from __future__ import annotations

import numpy as np
import pytest

from evaluation import save_figure, tradeoff_figure, usage_figure


@pytest.fixture
def curves(make_point):
    return {
        "learned": [make_point(0.4, -1.2, 0.7), make_point(0.8, -1.0, 0.8), make_point(0.9, -1.1, 0.79)],
        "random": [make_point(0.5, -3.0, 0.1), make_point(0.7, -1.1, 0.75)],
    }


def test_tradeoff_shows_every_router_on_both_panels(curves, make_point):
    figure = tradeoff_figure(curves, make_point(1.0))
    accuracy, log_likelihood = figure.axes
    for axes, values in ((accuracy, [0.7, 0.8]), (log_likelihood, [-1.2, -1.0])):
        lines = {line.get_label(): line for line in axes.get_lines()}
        np.testing.assert_allclose(lines["learned"].get_xdata(), [0.4, 0.8])
        np.testing.assert_allclose(lines["learned"].get_ydata(), values)
        assert lines["learned"].get_zorder() > lines["random"].get_zorder()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"native", "learned", "random"}


def test_no_two_of_many_routers_look_alike(make_point):
    points = [make_point(0.5, -1.1, 0.7), make_point(0.6, -1.0, 0.75)]
    curves = {f"router-{number}": points for number in range(30)}
    lines = tradeoff_figure({"learned": [make_point(0.4, -1.2, 0.7)], **curves}, make_point(1.0)).axes[0].get_lines()
    named = [line for line in lines if not line.get_label().startswith("_")]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in named]
    assert len(set(looks)) == len(looks)


def test_axes_keep_to_the_learned_router_and_say_what_they_hide(curves, make_point):
    log_likelihood = tradeoff_figure(curves, make_point(1.0)).axes[1]
    assert -1.3 < log_likelihood.get_ylim()[0] < -1.2
    assert log_likelihood.get_title(loc="right") == "1 of 5 points lie outside the axes"


def test_axes_end_half_a_nat_below_native(curves, make_point):
    curves["learned"].append(make_point(0.1, -4.0, 0.1))
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

"""The trade-off and the use of units as figures; draws without a display."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.compare import frontier
from evaluation.intervals import FloatArray, Interval
from evaluation.points import Point
from moe_backbone.files import write_atomic

LEARNED_COLOR = "#D55E00"
COLORS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
"""Okabe and Ito's palette for colour blindness, without the learned router's colour."""
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8", "H", "x", "+", "1", "2")
LINES = tuple(line for line in ("-", "--", ":", "-.") for _ in COLORS)
DEEPEST_LOSS = 0.5
"""Nats a token below native where the axis ends at the latest."""

Quantity = Callable[[Point], Interval]


def tradeoff_figure(curves: Mapping[str, Sequence[Point]], native: Point, *, learned: str = "learned") -> Figure:
    """Accuracy and log-likelihood against compute, one line for each router through its best points.

    The vertical axes reach down to the learned router's worst point, at most 0.5 nats below native.

    Args:
        curves: Points of each router by name.
        native: The point of native routing.
        learned: Name of the router that is drawn on top.

    Returns:
        A figure of two panels; bands are 95 % intervals of the difference to native.
    """
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    focus = _focus(curves, native, learned)
    labels = ("Accuracy (fraction of tokens)", "Log-likelihood (nats per token)")
    for axes, label, quantity in zip(figure.subplots(1, 2), labels, (_accuracy, _log_likelihood), strict=True):
        for name, style in _styles(curves, learned).items():
            _draw_curve(axes, curves[name], quantity, name, style)
        base = quantity(native).mean
        axes.axhline(base, color="black", linewidth=1, linestyle=":", zorder=1)
        axes.plot(native.compute, base, "k*", markersize=13, label="native", zorder=6)
        axes.set_xlabel("Compute (fraction of native routable FLOPs, router included)")
        axes.set_ylabel(label)
        _limit(axes, focus, quantity)
        _note_hidden(axes, [point for points in curves.values() for point in points], quantity)
    handles = axes.get_legend_handles_labels()[0][::-1]  # native and the learned router first
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    figure.suptitle("Held-out quality at equal compute; bands: 95 % interval of the difference to native", fontsize=11)
    return figure


def usage_figure(usage: FloatArray, site_names: Sequence[str]) -> Figure:
    """Heat map of how often each unit runs.

    Args:
        usage: Share of tokens that used each unit (num_sites, max_units), float64; NaN is left blank.
        site_names: Label of each site.

    Returns:
        A figure with one row for each site.
    """
    num_sites, max_units = usage.shape
    size = (max(5.0, 0.45 * max_units + 3), max(2.6, 0.38 * num_sites + 1.6))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(usage), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(num_sites), site_names)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_xlabel("Unit (head or expert)")
    axes.set_title("Share of tokens that use each unit (%)", fontsize=11)
    if max_units <= 16:
        for (site, unit), share in np.ndenumerate(usage):
            if np.isfinite(share):
                color = "black" if share > 0.6 else "white"
                axes.text(unit, site, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes, format=PercentFormatter(xmax=1))
    return figure


def save_figure(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Write a PNG whole or not at all; `dpi` in dots per inch."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


def _styles(names: Iterable[str], learned: str) -> dict[str, dict[str, Any]]:
    """Line style of each router, the learned one last so that it lies on top."""
    looks = zip(cycle(COLORS), cycle(MARKERS), cycle(LINES), strict=False)
    styles: dict[str, dict[str, Any]] = {}
    for name, (color, marker, line) in zip((name for name in names if name != learned), looks, strict=False):
        styles[name] = {"color": color, "marker": marker, "linestyle": line, "linewidth": 1.3, "markersize": 4.5}
        styles[name]["zorder"] = 3
    if learned in names:
        styles[learned] = {"color": LEARNED_COLOR, "marker": "o", "linewidth": 2.8, "markersize": 6.5, "zorder": 5}
    return styles


def _draw_curve(axes: Axes, points: Sequence[Point], quantity: Quantity, name: str, style: Mapping[str, Any]) -> None:
    """A line with its band through the frontier; points behind it as faint markers."""
    best = frontier(points)
    computes, values = [point.compute for point in best], [quantity(point) for point in best]
    axes.plot(computes, [value.mean for value in values], label=name, **style)
    lows, highs = [value.low for value in values], [value.high for value in values]
    axes.fill_between(computes, lows, highs, color=style["color"], alpha=0.16, linewidth=0, zorder=2)
    behind = [point for point in points if point not in best]
    look = {"color": style["color"], "marker": style["marker"], "markersize": style["markersize"]}
    axes.plot([p.compute for p in behind], [quantity(p).mean for p in behind], linestyle="", alpha=0.3, **look)


def _accuracy(point: Point) -> Interval:
    """Accuracy as a fraction, with the interval of its difference to native."""
    return _shift(point.delta_accuracy, point.native_documents.accuracy)


def _log_likelihood(point: Point) -> Interval:
    """Log-likelihood in nats a token, with the interval of its difference to native."""
    return _shift(point.delta_log_likelihood, point.native_documents.mean_log_likelihood)


def _shift(interval: Interval, base: float) -> Interval:
    return Interval(mean=interval.mean + base, low=interval.low + base, high=interval.high + base)


def _focus(curves: Mapping[str, Sequence[Point]], native: Point, learned: str) -> list[Point]:
    """Points that the axes must show: the learned router's, or else everyone's, that are not far below native."""
    every = [point for points in curves.values() for point in points]
    near = [p for p in curves.get(learned, every) if p.log_likelihood >= native.log_likelihood - DEEPEST_LOSS]
    return [*near, native]


def _limit(axes: Axes, focus: Sequence[Point], quantity: Quantity) -> None:
    """Fit the axes around `focus`, the last of which is native, with room above it."""
    base = quantity(focus[-1]).mean
    depth = max(base - min(quantity(point).mean for point in focus), 1e-3)
    axes.set_ylim(base - 1.1 * depth, base + 0.12 * depth)
    axes.set_xlim(min(point.compute for point in focus) - 0.04, max(point.compute for point in focus) + 0.04)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _note_hidden(axes: Axes, points: Sequence[Point], quantity: Quantity) -> None:
    """Say how many points the limits cut off."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    hidden = sum(not (left <= p.compute <= right and bottom <= quantity(p).mean <= top) for p in points)
    if hidden:
        axes.set_title(f"{hidden} of {len(points)} points lie outside the axes", fontsize=8, loc="right", color="0.4")

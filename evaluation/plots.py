"""The trade-off and the use of units as figures; draws without a display."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.bootstrap import iqm, resample
from evaluation.curves import Curve, Curves, Quantity, frontier, sums_along, sums_of, tokens_of
from evaluation.headroom import HeadroomPoint
from evaluation.intervals import FloatArray, percentile_interval
from evaluation.points import Point
from moe_backbone.files import write_atomic

LEARNED_COLOR = "#D55E00"
COLORS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette for colour blindness, without the learned router's colour."""
GREY = "#9A9A9A"
"""Of the routers after the first few, which only marker and line tell apart."""
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8", "H", "x", "+", "1", "2")
LINES = tuple(line for line in ("-", "--", ":", "-.") for _ in COLORS)
DEEPEST_LOSS = 0.5
"""Nats a token below native where the axis ends at the latest."""
MOST_MARKERS = 14
"""Markers on a line at most; several seeds have many settings."""

LABELS: Mapping[Quantity, str] = {
    "accuracy": "Accuracy (fraction of tokens)",
    "log_likelihood": "Log-likelihood (nats per token)",
}


def tradeoff_figure(
    curves: Curves, native: Point, *, learned: str = "learned", headroom: Sequence[HeadroomPoint] = ()
) -> Figure:
    """Accuracy and log-likelihood against compute on held-out text, one line for each router.

    A line is the interquartile mean over seeds. The vertical axes reach down to the learned router's worst setting, at
    most 0.5 nats below native.

    Args:
        curves: Of all routers; the first few that are not learned get a colour and a band, the others are grey.
        native: The held-out point of native routing.
        learned: Name of the router that is drawn on top.
        headroom: Of an oracle that does not know the label, drawn as native plus its difference, dashed.

    Returns:
        A figure of two panels; bands are 95 % intervals of the difference to native, over documents and seeds.
    """
    rows = -(-(len(curves) + 1) // 6)
    figure = Figure(figsize=(11, 5.0 + 0.22 * rows), layout="constrained")
    focus = _focus(curves, native, learned)
    shown = [point.held_out for seeds in curves.values() for curve in seeds for point in frontier(curve)]
    for axes, quantity in zip(figure.subplots(1, 2), reversed(get_args(Quantity)), strict=True):
        for name, style in _styles(curves, learned).items():
            _draw_router(axes, curves[name], quantity, _label(name, curves[name]), style)
        base = _mean(native, quantity)
        axes.axhline(base, color="black", linewidth=1, linestyle=":", zorder=1)
        axes.plot(native.compute, base, "k*", markersize=13, label="native", zorder=6)
        axes.set_xlabel("Compute (fraction of native routable FLOPs, router included)")
        axes.set_ylabel(LABELS[quantity])
        _draw_headroom(axes, headroom, quantity, base)
        _limit(axes, focus, quantity)
        _note_hidden(axes, shown, quantity)
    handles = axes.get_legend_handles_labels()[0][::-1]  # native and the learned router first
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize="small"
    )
    figure.suptitle(_title(curves), fontsize=11)
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


def _draw_headroom(axes: Axes, headroom: Sequence[HeadroomPoint], quantity: Quantity, base: float) -> None:
    points = sorted((point for point in headroom if not point.knows_label), key=lambda point: point.compute)
    if points:
        gains = [getattr(point, f"delta_{quantity}").mean for point in points]
        label = f"oracle on {points[0].num_tokens} tokens"
        axes.plot([p.compute for p in points], [base + gain for gain in gains], "k--", linewidth=1, label=label)


def _title(curves: Curves) -> str:
    seeds = max(map(len, curves.values()))
    over = f", interquartile mean over {seeds} seeds" if seeds > 1 else ""
    return f"Held-out quality at equal compute{over}; bands: 95 % interval of the difference to native"


def _label(name: str, seeds: Sequence[Curve]) -> str:
    return name if all(point.causal for curve in seeds for point in curve) else f"{name} (not causal)"


def _styles(names: Iterable[str], learned: str) -> dict[str, dict[str, Any]]:
    """Line style of each router, the learned one last so that it lies on top, and colours above grey."""
    looks = zip(cycle(MARKERS), cycle(LINES), strict=False)
    styles: dict[str, dict[str, Any]] = {}
    others = (name for name in names if name != learned)
    for index, (name, (marker, line)) in enumerate(zip(others, looks, strict=False)):
        named = index < len(COLORS)
        look = {"color": COLORS[index] if named else GREY, "marker": marker, "linestyle": line}
        size = {"linewidth": 1.4 if named else 0.9, "markersize": 4.5 if named else 3.5, "zorder": 3 if named else 2}
        styles[name] = look | size
    styles = dict(reversed(styles.items()))
    if learned in names:
        styles[learned] = {"color": LEARNED_COLOR, "marker": "o", "linewidth": 2.8, "markersize": 6.5, "zorder": 5}
    return styles


def _draw_router(axes: Axes, seeds: Sequence[Curve], quantity: Quantity, label: str, style: Mapping[str, Any]) -> None:
    """A line through the computes of the chosen settings that all seeds reach, with its band unless it is grey."""
    reach = [[point.held_out.compute for point in frontier(curve)] for curve in seeds]
    cheapest = max(computes[0] for computes in reach)
    computes = sorted({compute for seed in reach for compute in seed if compute >= cheapest})
    sums, tokens = sums_along(seeds, computes, quantity), tokens_of(seeds[0])
    every = -(-len(computes) // MOST_MARKERS)
    axes.plot(computes, iqm(sums.sum(-1)) / tokens.sum(), label=label, markevery=every, **style)
    if style["color"] == GREY:
        return
    native = sums_of(seeds[0][0].held_out.native_documents, quantity)
    drawn = iqm(resample(sums - native, tokens, stratum=0)) + native.sum() / tokens.sum()
    bands = [percentile_interval(0.0, samples) for samples in drawn.T]
    lows, highs = [band.low for band in bands], [band.high for band in bands]
    alpha = 0.2 if style["color"] == LEARNED_COLOR else 0.09
    axes.fill_between(computes, lows, highs, color=style["color"], alpha=alpha, linewidth=0, zorder=2)


def _mean(point: Point, quantity: Quantity) -> float:
    return point.accuracy if quantity == "accuracy" else point.log_likelihood


def _focus(curves: Curves, native: Point, learned: str) -> list[Point]:
    """Points that the axes must show: the learned router's, or else everyone's, that are not far below native."""
    wanted = [curves[learned]] if learned in curves else curves.values()
    every = [point.held_out for seeds in wanted for curve in seeds for point in curve]
    return [*(point for point in every if point.log_likelihood >= native.log_likelihood - DEEPEST_LOSS), native]


def _limit(axes: Axes, focus: Sequence[Point], quantity: Quantity) -> None:
    """Fit the axes around `focus`, the last of which is native, with room above it."""
    base = _mean(focus[-1], quantity)
    depth = max(base - min(_mean(point, quantity) for point in focus), 1e-3)
    axes.set_ylim(base - 1.1 * depth, base + 0.12 * depth)
    axes.set_xlim(min(point.compute for point in focus) - 0.04, max(point.compute for point in focus) + 0.04)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _note_hidden(axes: Axes, points: Sequence[Point], quantity: Quantity) -> None:
    """Say how many chosen settings the limits cut off."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    hidden = sum(not (left <= p.compute <= right and bottom <= _mean(p, quantity) <= top) for p in points)
    if hidden:
        note = f"{hidden} of {len(points)} settings lie outside the axes"
        axes.set_title(note, fontsize=8, loc="right", color="0.4")

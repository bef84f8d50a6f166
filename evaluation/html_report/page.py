"""Puts tables, figures and the coloured passage on one page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from evaluation.html_report.cells import Table, heading, record_table, value_text
from evaluation.html_report.passage import passage_marks, shading
from evaluation.html_report.tables import balance_table, group_tables, router_table, site_table
from evaluation.plots import tradeoff_figure, usage_figure
from evaluation.points import Point
from evaluation.profile import RIVAL_COMPUTE, Profile, TokenRouting, showcase
from evaluation.report import KEYS
from moe_backbone.files import write_text_atomic

LONG_KEYS = {"units_per_token"}
"""Keys of a point that would widen the table of all points beyond use; the page has them by site."""

Curves = Mapping[str, Sequence[Point]]


def write_html_report(
    path: Path,
    *,
    evaluation: Mapping[str, Any],
    curves: Curves,
    native: Point,
    profile: Profile,
    passage: Profile,
    provenance: Mapping[str, str],
    learned: str = "learned",
) -> None:
    """Write one HTML file that needs no other, whole or not at all.

    Args:
        path: Where it goes.
        evaluation: Content of `evaluation.json`; what it has beyond schema 1, such as `comparisons`, is shown too.
        curves: Points of each router by name, without native.
        native: The point of native routing.
        profile: Routers on windows spread over the held-out text.
        passage: The same routers on windows side by side.
        provenance: What was run and with what, by name; see `run_provenance`.
        learned: Name of the learned router; the page also serves a run without one.
    """
    environment = Environment(
        loader=PackageLoader("evaluation.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shades = shading(passage.routings or (passage.native,))
    page = environment.get_template("page.html").render(
        evaluation=evaluation,
        num_routers=len(curves),
        facts=_facts(evaluation, native, learned),
        routers=router_table(curves, native, evaluation["summary"], learned),
        tradeoff=figure_uri(tradeoff_figure(curves, native, learned=learned)),
        comparisons=_comparisons(evaluation),
        further=_further(evaluation),
        who=[site_table(profile), *group_tables(profile)],
        shade_labels=shades.labels,
        open_passage=min(passage.routings, key=_distance, default=None),
        passages=[(routing, passage_marks(passage, routing, shades)) for routing in passage.routings],
        usages=_usages(curves, native, evaluation["backbone"]["sites"], learned),
        balance=balance_table(curves, native, evaluation["summary"], learned),
        points=_all_points(evaluation),
        provenance=provenance,
        setting_text=value_text,
    )
    write_text_atomic(path, page)


def _distance(routing: TokenRouting) -> float:
    """How far from the compute at which routers are held against each other."""
    return abs(float(routing.compute.mean()) - RIVAL_COMPUTE)


def figure_uri(figure: Figure) -> str:
    """A figure as SVG in a data URI; equal figures give equal text."""
    image = BytesIO()
    with rc_context({"svg.hashsalt": "routegym"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}"


def _facts(evaluation: Mapping[str, Any], native: Point, learned: str) -> list[tuple[str, str]]:
    """The figures that stand first, each with what it says."""
    facts = [
        (f"{native.loss:.4f}", "nats a token: native loss"),
        (f"{100 * native.accuracy:.2f} %", "of tokens predicted right: native accuracy"),
    ]
    reached = evaluation["summary"].get(learned, {}).get("compute_at_99_accuracy")
    if reached is not None:
        facts.append((value_text(reached), f"of native compute keeps 99 % of native accuracy: {learned}"))
    for row in evaluation.get("comparisons", []):
        if row.get("compute") == RIVAL_COMPUTE and "difference" in row:
            gain = f"nats a token gained over {row.get('rival')}, the best other router, at compute {RIVAL_COMPUTE}"
            facts.append((f"{row['difference']['mean']:+.4f}", gain))
    return facts


def _comparisons(evaluation: Mapping[str, Any]) -> Table | None:
    records = evaluation.get("comparisons", [])
    note = "Gain: learned minus best other router at the same compute, mean [95 % interval]; above zero is better."
    source = "points of evaluation.json, paired by document"
    return record_table("Learned against the best other router", records, source, note) if records else None


def _further(evaluation: Mapping[str, Any]) -> list[Table]:
    """What `evaluation.json` holds beyond schema 1, one table for each key."""
    tables = []
    for key in sorted(set(evaluation) - KEYS - {"comparisons"}):
        value = evaluation[key]
        records = value if isinstance(value, list) else [value]
        records = [record if isinstance(record, Mapping) else {key: record} for record in records]
        tables.append(record_table(heading(key).capitalize(), records, f"evaluation.json, key {key}"))
    return tables


def _usages(curves: Curves, native: Point, sites: Sequence[str], learned: str) -> list[tuple[str, str]]:
    """Heat maps of native routing and of each showcase: what it is, and the image."""
    points = [native, *showcase(curves, learned=learned)]
    return [
        (f"{point.router} at {point.compute:.2f}", figure_uri(usage_figure(point.usage, sites))) for point in points
    ]


def _all_points(evaluation: Mapping[str, Any]) -> Table:
    records = [{key: value for key, value in point.items() if key not in LONG_KEYS} for point in evaluation["points"]]
    return record_table("Every router at every setting", records, "evaluation.json, key points")

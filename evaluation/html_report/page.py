"""Puts tables, figures and the coloured passage on one page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import rich.table
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from evaluation.html_report.cells import Table, record_table, terminal_table, value_text
from evaluation.html_report.passage import passage_marks, shading
from evaluation.html_report.tables import balance_table, group_tables, profile_source, site_table
from evaluation.plots import usage_figure
from evaluation.profile import Profile, TokenRouting
from evaluation.showcase import RIVAL_COMPUTE
from moe_backbone.files import write_text_atomic

LONG_KEYS = {"units_per_token"}
"""Keys of a point that would widen the table of all settings beyond use; the page has them by site."""


def write_html_report(
    path: Path,
    *,
    evaluation: Mapping[str, Any],
    parts: Iterable[rich.table.Table | str],
    tradeoff: Figure,
    profile: Profile,
    passage: Profile,
    provenance: Mapping[str, str],
    learned: str = "learned",
) -> None:
    """Write one HTML file that needs no other, whole or not at all.

    Args:
        path: Where it goes.
        evaluation: Content of `evaluation.json`.
        parts: What the terminal shows of it: tables, and text of one or more lines.
        tradeoff: From `tradeoff_figure`.
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
        facts=_facts(evaluation, learned),
        tradeoff=figure_uri(tradeoff),
        parts=[_part(part, learned) for part in parts],
        who=[site_table(profile), *group_tables(profile)],
        shade_labels=shades.labels,
        open_passage=min(passage.routings, key=_distance, default=None),
        passages=[(routing, passage_marks(passage, routing, shades)) for routing in passage.routings],
        usages=[(routing.label, _usage_uri(profile, routing)) for routing in (profile.native, *profile.routings)],
        profile_source=profile_source(profile),
        balance=balance_table(evaluation["points"], evaluation["summary"], learned),
        points=_all_points(evaluation),
        provenance=provenance,
        value_text=value_text,
        word=profile.word,
    )
    write_text_atomic(path, page)


def figure_uri(figure: Figure) -> str:
    """A figure as SVG in a data URI; equal figures give equal text."""
    image = BytesIO()
    with rc_context({"svg.hashsalt": "routegym"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}"


def _usage_uri(profile: Profile, routing: TokenRouting) -> str:
    return figure_uri(usage_figure(routing.usage, [site.name for site in profile.sites]))


def _distance(routing: TokenRouting) -> float:
    """How far from the compute at which routers are held against each other."""
    return abs(float(routing.compute.mean()) - RIVAL_COMPUTE)


def _facts(evaluation: Mapping[str, Any], learned: str) -> list[tuple[str, str]]:
    """The figures that stand first, each with what it says."""
    native = evaluation["native"]
    facts = [
        (f"{-native['log_likelihood']:.4f}", "nats a token: native loss"),
        (f"{100 * native['accuracy']:.2f} %", "of tokens predicted right: native accuracy"),
    ]
    reached = evaluation["summary"].get(learned, {}).get("compute_at_99_accuracy")
    if reached is not None:
        facts.append((f"{reached:.3f}", f"of native compute keeps 99 % of native accuracy: {learned}"))
    for row in evaluation.get("comparisons", []):
        if (row["compute"], row["quantity"], row["best_other"]) == (RIVAL_COMPUTE, "log_likelihood", True):
            words = f"nats a token gained over {row['rival']}, the best other router, at compute {RIVAL_COMPUTE}"
            facts.append((f"{row['difference']['mean']:+.4f}", words))
    return facts


def _part(part: rich.table.Table | str, learned: str) -> Table | str:
    if isinstance(part, str):
        return part
    return terminal_table(part, "evaluation.json, keys points, summary and comparisons; as in tables.txt", learned)


def _all_points(evaluation: Mapping[str, Any]) -> Table:
    records = [{key: value for key, value in point.items() if key not in LONG_KEYS} for point in evaluation["points"]]
    return record_table("Every router at every setting", records, "evaluation.json, key points")

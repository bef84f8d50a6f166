"""A whole report over tiny text, and what a parser finds in it."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.table import Table
from torch import Tensor

from evaluation import Evaluator, Point, score_all, usage_figure
from evaluation.html_report import write_html_report
from evaluation.profile import Profile, profile_points
from evaluation.showcase import showcase
from moe_backbone import MoETransformer, SiteView, best_units

VOID = {"meta", "br", "img", "link", "input", "hr"}
NASTY = b"<script>alert(1)</script>&amp;\"' \x00\t\xff\n"
"""Bytes that would break a page that does not escape them."""


class CountRouter:
    """The best `count` units everywhere, at a cost of its own."""

    overhead_flops = 500.0

    def __init__(self, count: int) -> None:
        self.count = count

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return best_units(view.scores, self.count)


class Page(HTMLParser):
    """What a browser would find: tags that close, links, tables, the bytes of the passages.

    Attributes:
        tables: Rows of cell texts by the table's title.
        marks: (glyph, classes, tip) of each coloured byte, one list for each passage.
        links: Values of `src` and `href`.
        facts: The figures that stand first.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source, self.text = text, ""
        self.tables: dict[str, list[list[str]]] = {}
        self.marks: list[list[tuple[str, str, str]]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.facts: list[str] = []
        self._open: list[str] = []
        self._mark: dict[str, str | None] | None = None
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what the tests ask for."""
        found = dict(attrs)
        assert len(found) == len(attrs)
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "srcset") and value]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "p" and found.get("class") == "text":
            self.marks.append([])
        if tag == "span" and "title" in found:
            self._mark = found
        if tag == "table":
            self.tables[self._region] = []
        if tag == "div" and found.get("class") == "scroll":
            self._region = str(found["aria-label"])
        if tag == "tr":
            self.tables[self._region].append([])
        if tag in ("td", "th"):
            self.tables[self._region][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        """Refuse a tag that does not close the last one."""
        assert self._open.pop() == tag, f"</{tag}> at {self.getpos()}"
        self._mark = None if tag == "span" else self._mark

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        self.text += data
        if self._open and self._open[-1] == "dt" and "div" in self._open:
            self.facts.append(data)
        if self._mark is not None:
            self.marks[-1].append((data, str(self._mark["class"]), str(self._mark["title"])))
        if {"td", "th"} & set(self._open):
            self.tables[self._region][-1][-1] += data


def content(points: list[Point]) -> dict[str, Any]:
    """What `evaluation.json` holds, as far as the page reads it."""
    return {
        "corpus": {"name": "a<i>b", "split": "test", "tokens": 160, "documents": 2},
        "backbone": {"name": "tiny", "sha256": "0" * 64, "parameters": 123, "sites": ["a", "b", "c", "d"]},
        "native": {"accuracy": points[0].accuracy, "log_likelihood": points[0].log_likelihood},
        "points": [point.to_json() for point in points],
        "summary": {point.router: {"compute_at_99_accuracy": 0.625} for point in points[1:]},
    }


def terminal_table() -> Table:
    """A table as `report_parts` gives it."""
    table = Table(title="Gains & losses", caption="more\nis better")
    table.add_column("router")
    table.add_column("gain\n(nats)", justify="right")
    table.add_row("plain", "[red]+.020[/red] [.010, .030]")
    table.add_row("learned", "-", style="bold")
    return table


@pytest.fixture
def nasty_tokens() -> Tensor:
    """The nasty bytes, then zeros: two windows of 16 and the bytes after them, int64 (3, 16)."""
    values = list(NASTY) + [0] * (48 - len(NASTY))
    return torch.tensor(values).view(3, 16)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the figures empty: drawing them takes longer than all the rest."""
    for name in ("usage_figure", "figure_uri"):
        monkeypatch.setattr(f"evaluation.html_report.page.{name}", lambda *_, **__: "data:image/svg+xml;base64,")


@pytest.fixture
def write_page(evaluator: Evaluator, tiny_backbone: MoETransformer, nasty_tokens: Tensor, tmp_path: Path) -> Any:
    """Writes a report of two routers, or of one alone, and parses it; the passage is the nasty bytes."""

    def write(*, learned: bool = True, **changes: Any) -> tuple[Page, dict[str, Any]]:
        specs = [
            SimpleNamespace(name=name, setting={"count": count, "<b>": "&"}, router=CountRouter(count))
            for name in ("plain", *(["learned"] if learned else []))
            for count in (1, 2)
        ]
        points = [scored.held_out for scored in score_all(specs, evaluator, evaluator)]
        evaluation = content([evaluator.native, *points]) | changes.pop("evaluation", {})
        shown = showcase(specs, points)
        tokens, targets = evaluator.split.windows(16, 160)[:2]
        arguments = {
            "parts": [terminal_table(), "A/A: <equal>\nsecond line"],
            "tradeoff": usage_figure(evaluator.native.usage, ["a", "b", "c", "d"]),
            "profile": profile_points(tiny_backbone, tokens, targets, shown),
            "passage": profile_points(tiny_backbone, nasty_tokens, nasty_tokens.roll(-1), shown),
            "provenance": {"command": "evaluate <all>", "run": "one"},
        } | changes
        path = tmp_path / "folder" / "report.html"
        write_html_report(path, evaluation=evaluation, **arguments)
        assert [file.name for file in path.parent.iterdir()] == ["report.html"]
        return Page(path.read_text(encoding="utf-8")), {"evaluation": evaluation, **arguments}

    return write


@pytest.fixture
def page_and_parts(write_page: Callable[..., tuple[Page, dict[str, Any]]]) -> tuple[Page, dict[str, Any]]:
    """The report of two routers."""
    return write_page()


@pytest.fixture
def page(page_and_parts: tuple[Page, dict[str, Any]]) -> Page:
    """The same, the page alone."""
    return page_and_parts[0]


@pytest.fixture
def profile(page_and_parts: tuple[Page, dict[str, Any]]) -> Profile:
    """The profile that the page shows."""
    return page_and_parts[1]["profile"]

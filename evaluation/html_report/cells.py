"""Tables as the page shows them, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.text import Text

HEADINGS = {"load_cv": "load CV", "max_vio": "MaxVio"}
"""Headings of keys that do not read well as they are."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell."""

    text: str
    note: str = ""
    """Small print behind the text."""
    bar: float | None = None
    """Length of the bar under the text, as a fraction of the cell; None for no bar."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first cell of a row is its heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    source: str
    """Where the numbers come from."""
    note: str = ""
    """How to read it."""
    strong: str = ""
    """Heading of the row that stands out."""


def record_table(title: str, records: Iterable[Mapping[str, Any]], source: str) -> Table:
    """One row for each record, one column for each key that any of them has."""
    records = list(records)
    keys = list(dict.fromkeys(key for record in records for key in record))
    rows = [[Cell(text=value_text(record.get(key))) for key in keys] for record in records]
    return Table(title=title, columns=[heading(key) for key in keys], rows=rows, source=source)


def terminal_table(table: rich.table.Table, source: str, strong: str) -> Table:
    """A table made for a terminal; names that are folded there are whole here."""
    cells = [[Cell(text=_plain(cell).replace("\n", "")) for cell in column.cells] for column in table.columns]
    return Table(
        title=_plain(table.title),
        columns=[_plain(column.header) for column in table.columns],
        rows=list(zip(*cells, strict=True)),
        source=source,
        note=_plain(table.caption),
        strong=strong,
    )


def _plain(text: Any) -> str:
    """What a terminal shows of a cell, without its colours."""
    return Text.from_markup(text).plain if isinstance(text, str) else str(text or "")


def heading(key: str) -> str:
    """A key of `evaluation.json` as a heading."""
    return HEADINGS.get(key, key.replace("_", " "))


def value_text(value: Any) -> str:
    """Any JSON value in one line; an interval as `mean [low, high]`."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        if set(value) == {"mean", "low", "high"}:
            return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
        return ", ".join(f"{heading(key)} {value_text(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return " ".join(value_text(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _number_text(value) if isinstance(value, float) else str(value)


def _number_text(value: float) -> str:
    """Four decimals, or two if those say it all; three digits of a very small number."""
    if 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4f}".removesuffix("00")

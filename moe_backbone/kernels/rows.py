"""Counts the rows that the ops really ran, so that compute is counted and not estimated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_open_counters: list[Counter[str]] = []


@contextmanager
def count_rows() -> Iterator[Counter[str]]:
    """Count (token, unit) rows by kind of unit while the context is open.

    Yields:
        A counter with keys `heads` and `experts`; filled from the shapes of the tensors that were multiplied.
    """
    counter: Counter[str] = Counter()
    _open_counters.append(counter)
    try:
        yield counter
    finally:
        # by identity: `remove` would take another counter with equal counts
        _open_counters[:] = [other for other in _open_counters if other is not counter]


def record_rows(kind: str, rows: int) -> None:
    """Tell every open counter that `rows` rows of `kind` were multiplied."""
    for counter in _open_counters:
        counter[kind] += rows

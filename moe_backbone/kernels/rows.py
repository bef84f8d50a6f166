"""Counts the rows that the ops really ran, so that compute is counted and not estimated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

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


@contextmanager
def uncounted() -> Iterator[None]:
    """Run rows once more, as a backward pass does to recompute, without counting them again."""
    counters = _open_counters[:]
    _open_counters.clear()
    try:
        yield
    finally:
        _open_counters[:] = counters


def record_rows(kind: str, rows: int | Tensor) -> None:
    """Tell every open counter that `rows` rows of `kind` were multiplied.

    Args:
        kind: `heads` or `experts`.
        rows: A number, or counts on any device, which are summed; they are read only if a counter is open.
    """
    if _open_counters:
        total = int(rows.sum()) if isinstance(rows, Tensor) else rows
        for counter in _open_counters:
            counter[kind] += total

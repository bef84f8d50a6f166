"""What processes of a job share, where there is one of them."""

from __future__ import annotations

import io
import sys

import pytest

from moe_backbone import ranks


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.mark.parametrize(("output", "often"), [(Terminal(), 0.1), (io.StringIO(), ranks.IN_A_FILE)])
def test_progress_is_shown_everywhere_and_seldom_in_a_file(
    monkeypatch: pytest.MonkeyPatch, output: io.StringIO, often: float
) -> None:
    """A log says how far a night's work is, and is not made of it."""
    monkeypatch.setattr(sys, "stderr", output)
    for _ in (bar := ranks.bar(range(1000), desc="work")):
        pass
    assert bar.mininterval == often
    assert "work: 100%" in output.getvalue()


def test_only_the_first_rank_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bars would write over each other."""
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert ranks.bar(range(3)).disable

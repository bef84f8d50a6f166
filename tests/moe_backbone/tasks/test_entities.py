"""One scheme for tags, and F1 of whole entities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_backbone.tasks import entity_f1, to_iob2


def test_iob1_becomes_iob2() -> None:
    """Neighbours of one kind are one entity unless `B-` parts them."""
    tags = ["I-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-ORG"]
    assert to_iob2(tags) == ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "B-ORG"]


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"])))
def test_iob2_stays_as_it_is(tags: list[str]) -> None:
    """Converting twice changes nothing more."""
    once = to_iob2(tags)
    assert to_iob2(once) == once


def test_f1_counts_whole_entities() -> None:
    """Two of three gold entities found, one of three answers wrong in its extent: precision and recall 2/3."""
    pytest.importorskip("seqeval")
    gold = [["I-PER", "I-PER", "O", "I-LOC"], ["I-ORG", "O"]]
    found = [["I-PER", "O", "O", "I-LOC"], ["I-ORG", "O"]]
    assert entity_f1(gold, found) == pytest.approx(2 / 3)
    assert entity_f1(gold, gold) == 1
    assert entity_f1(gold, [["O"] * 4, ["O"] * 2]) == 0

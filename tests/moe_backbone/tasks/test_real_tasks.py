"""The real tasks, where their folder is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_backbone.quality import scored
from moe_backbone.tasks import load_task


@pytest.mark.parametrize(
    ("name", "examples", "labels"),
    [
        ("banking77", {"train": 9003, "validation": 1000, "test": 3080}, 77),
        ("ner_wikigold/wikigold.conll.txt", {"train": 1187, "validation": 183, "test": 326}, 5),
        ("ner_sec_filings", {"train": 892, "validation": 272, "test": 303}, 5),
    ],
)
def test_every_label_is_asked_for_once(name: str, examples: dict[str, int], labels: int) -> None:
    """Sizes of the parts as documented, and as many scored tokens as labels."""
    folder = os.environ.get("ROUTEGYM_DATA")
    if folder is None:
        pytest.skip("ROUTEGYM_DATA names no folder of real text")
    task = load_task(Path(folder) / name)
    assert {part: len(own) for part, own in task.examples.items()} == examples
    assert len(task.label_bytes.labels) == labels
    for split in (task.train, task.validation, task.test):
        targets = split.windows(256, 10**9)[1]
        assert int(scored(targets).sum()) == sum(len(one.labels) for one in task.examples[split.name])

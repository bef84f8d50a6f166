"""A small task of each kind, written to files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

NUM_TEXTS, NUM_DOCUMENTS = 120, 12


@pytest.fixture
def texts_file(tmp_path: Path) -> Path:
    """CSV of texts whose last word tells the label."""
    words = random.Random(0)
    rows = [f"{number} my {(word := words.choice(['card', 'cash']))},lost_{word}" for number in range(NUM_TEXTS)]
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tags_file(tmp_path: Path) -> Path:
    """CoNLL columns of documents of two sentences each."""
    words = random.Random(0)
    lines = []
    for number in range(NUM_DOCUMENTS):
        lines += ["-DOCSTART- O", "", f"{number} O", "Anna I-PER", "Smith I-PER", "left O", ""]
        lines += [f"{words.choice(['Rome', 'Oslo'])} I-LOC", "is O", "far O", ""]
    path = tmp_path / "tags.conll"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path

"""Real text sets, where $ROUTEGYM_DATA names the folder that holds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_backbone.corpus import TEST_SHARE, VALIDATION_SHARE, Corpus, load_corpus

DATA = os.environ.get("ROUTEGYM_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="ROUTEGYM_DATA names no folder of real text")


def _load(*parts: str) -> Corpus:
    assert DATA is not None
    return load_corpus([Path(DATA, *parts)])


@pytest.mark.parametrize(
    ("path", "megabytes", "documents"),
    [
        pytest.param(("tinyshakespeare", "input.txt"), 1.1, None, id="one file"),
        pytest.param(("peps", "peps.jsonl.gz"), 13.7, 699, id="compressed lines of JSON"),
        pytest.param(("books_pd",), 14.0, 13, id="folder of compressed files"),
    ],
)
def test_every_kind_of_file_is_read_whole_and_split_by_share(
    path: tuple[str, ...], megabytes: float, documents: int | None
) -> None:
    """Nothing is lost, and the held-out parts have about the size they should."""
    corpus = _load(*path)
    sizes = [len(split.tokens) for split in (corpus.train, corpus.validation, corpus.test)]
    assert sum(sizes) / 1e6 == pytest.approx(megabytes, rel=0.02)
    assert sizes[1] / sum(sizes) == pytest.approx(VALIDATION_SHARE, abs=0.1)
    assert sizes[2] / sum(sizes) == pytest.approx(TEST_SHARE, abs=0.1)
    if documents is not None:
        splits = (corpus.train, corpus.validation, corpus.test)
        assert sum(split.num_documents for split in splits) == documents


def test_held_out_documents_do_not_stand_in_the_training_text() -> None:
    """Long stretches of held-out PEPs are nowhere in the training part, but for boilerplate that PEPs share."""
    corpus = _load("peps", "peps.jsonl.gz")
    train = corpus.train.tokens.numpy().tobytes()
    tokens, _, _ = corpus.test.windows(512, 64 * 512)
    found = sum(window.byte().numpy().tobytes() in train for window in tokens)
    assert found <= len(tokens) * 0.05

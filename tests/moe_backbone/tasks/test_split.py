"""Examples as a stream: every label asked for once, where it should be, and by bytes that no text uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_backbone.quality import UNSCORED, scored
from moe_backbone.tasks import Example, LabelBytes, TaskSplit, load_task
from moe_backbone.tasks.split import encode

SEQ_LEN = 16
SENTENCES = st.lists(st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=7), min_size=1, max_size=8)


def stream(sentences: list[list[str]], lookahead: int = 1, seq_len: int = SEQ_LEN) -> tuple[TaskSplit, int]:
    """Sentences whose tags are their words' first letters."""
    examples = [
        Example(words=tuple(words), labels=tuple(word[0] for word in words), document=number)
        for number, words in enumerate(sentences)
    ]
    names = LabelBytes.choose("abc", ["abc"])
    return encode("test", examples, names, seq_len=seq_len, lookahead=lookahead, tagging=True)


def labels(split: TaskSplit, targets: Tensor) -> list[str]:
    """Names of what is asked for, in order."""
    return [split.label_bytes.label(value, "?") for value in targets[scored(targets)].tolist()]


def test_labels_stand_behind_the_words_that_are_read_first() -> None:
    """By hand: `a bb` and a look ahead of no or of one word."""
    split, _ = stream([["a", "bb"]], lookahead=0)
    assert bytes(split.tokens.tolist()) == b"a bb\n"
    a, b = split.label_bytes.value("a"), split.label_bytes.value("b")
    assert split.labels.tolist() == [UNSCORED, a, UNSCORED, UNSCORED, b]
    split, _ = stream([["a", "bb"]], lookahead=1)
    assert bytes(split.tokens.tolist()) == b"a bb\n\n"
    assert split.labels.tolist() == [UNSCORED, UNSCORED, UNSCORED, UNSCORED, a, b]


@settings(max_examples=60, deadline=None)
@given(sentences=SENTENCES, lookahead=st.integers(0, 2))
def test_windows_score_every_word_once(sentences: list[list[str]], lookahead: int) -> None:
    """In order, also of sentences that were cut, each under its document; and no label is ever read."""
    split, cut = stream(sentences, lookahead)
    tokens, targets, documents = split.windows(SEQ_LEN, 10**6)
    assert labels(split, targets) == [word[0] for words in sentences for word in words]
    assert documents[scored(targets)].tolist() == [number for number, words in enumerate(sentences) for _ in words]
    assert not set(tokens.flatten().tolist()) & set(split.label_bytes.values)
    lengths = [sum(len(word) + 1 for word in words) + lookahead for words in sentences]
    assert cut == sum(length > SEQ_LEN for length in lengths)


@settings(max_examples=30, deadline=None)
@given(sentences=SENTENCES, seed=st.integers(0, 99))
def test_drawn_windows_hold_whole_examples(sentences: list[list[str]], seed: int) -> None:
    """What is scored is what the words before it say, so the two streams are put together alike."""
    split, _ = stream(sentences, lookahead=0)
    tokens, targets = split.sample(3, SEQ_LEN, np.random.default_rng(seed))
    for row, asked in zip(tokens, targets, strict=True):
        words = bytes(row.tolist()).decode().replace("\n", " ").split(" ")
        found = labels(split, asked)
        assert found == [word[0] for word in words[: len(found)]]
        assert found


def test_a_long_text_loses_its_beginning() -> None:
    """The label stays."""
    examples = [Example(words=("x" * 30 + "end",), labels=("a",), document=0)]
    names = LabelBytes.choose("a", ["xend"])
    split, cut = encode("test", examples, names, seq_len=8, lookahead=0, tagging=False)
    assert bytes(split.tokens.tolist()) == b"xxxxend\n"
    assert cut == 1


def test_label_bytes_occur_in_no_text() -> None:
    """Those that UTF-8 never uses come first; too many labels are refused."""
    assert LabelBytes.choose(["b", "a"], ["hi"]).values == (0xC0, 0xC1)
    many = LabelBytes.choose([str(number) for number in range(60)], ["1£ or 1€"])
    assert not set(many.values) & set("1£ or 1€".encode())
    with pytest.raises(ValueError, match="labels must be at most"):
        LabelBytes.choose([str(number) for number in range(250)], [""])


def test_parts_share_no_document(tags_file: Path) -> None:
    """Whole documents are held out, and every sentence is in one part."""
    task = load_task(tags_file, seq_len=64)
    documents = [{one.document for one in task.examples[part]} for part in ("train", "validation", "test")]
    assert sum(map(len, documents)) == len(set.union(*documents)) == 12
    assert sum(len(examples) for examples in task.examples.values()) == 24


@pytest.mark.parametrize(("count", "whole"), [(2, False), (3, True), (5, True)])
def test_of_few_documents_whole_ones_are_held_out(tmp_path: Path, count: int, whole: bool) -> None:
    """From three on; of two the last sentences of each."""
    sentence = "word O\nplace I-LOC\n\n"
    for part, documents in (("train", count), ("test", 1)):
        (tmp_path / f"{part}.conll").write_text(f"-DOCSTART- O\n\n{10 * sentence}" * documents, encoding="utf-8")
    task = load_task(tmp_path, seq_len=64)
    kept, held = ({one.document for one in task.examples[part]} for part in ("train", "validation"))
    assert kept | held == set(range(count))
    assert kept.isdisjoint(held) == whole
    assert len(task.examples["validation"]) == (10 if whole else count)


def test_a_folder_names_its_parts(tmp_path: Path) -> None:
    """Files by the beginnings of their names; what is not there is held out of training."""
    for name, count in (("train.csv", 50), ("test_a.csv", 7)):
        rows = "".join(f"{name} {number},l{number % 2}\n" for number in range(count))
        (tmp_path / name).write_text(f"text,label\n{rows}", encoding="utf-8")
    task = load_task(tmp_path, seq_len=64)
    assert {part: len(examples) for part, examples in task.examples.items()} == {
        "train": 45,
        "validation": 5,
        "test": 7,
    }
    (tmp_path / "test_b.csv").write_text("text,label\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="one file to test"):
        load_task(tmp_path)
    with pytest.raises(ValueError, match=r"task folder must hold a file train"):
        load_task(tmp_path / "..")

"""Every row is used or refused with its line and the reason."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_backbone.tasks import Example, read_conll, read_csv

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
TEXTS = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
TAGS = st.sampled_from(["O", "B-PER", "I-PER", "I-LOC"])
HERE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(path: Path, data: bytes) -> str:
    """What the reader of this kind of file says of these bytes."""
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        (read_csv if path.suffix == ".csv" else read_conll)(path)
    return str(caught.value)


@HERE
@given(rows=st.lists(st.tuples(TEXTS, WORDS), min_size=1, max_size=6))
def test_csv_comes_back_as_it_was_written(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    """Every row, in order, whatever commas and quotes it holds."""
    path = tmp_path / "task.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *rows])
    expected = [Example(words=(text,), labels=(label,), document=number) for number, (text, label) in enumerate(rows)]
    assert read_csv(path) == expected


@HERE
@given(sentences=st.lists(st.lists(st.tuples(WORDS, TAGS), min_size=1, max_size=5), min_size=1, max_size=5))
def test_columns_come_back_as_they_were_written(tmp_path: Path, sentences: list[list[tuple[str, str]]]) -> None:
    """Every word with its tag, whatever stands in columns between them."""
    path = tmp_path / "task.conll"
    path.write_text("\n\n".join("\n".join(f"{w} x {t}" for w, t in rows) for rows in sentences), encoding="utf-8")
    found = read_conll(path)
    assert [list(zip(one.words, one.labels, strict=True)) for one in found] == sentences


@HERE
@given(rows=st.lists(st.booleans(), min_size=1, max_size=12))
def test_no_bad_row_is_dropped(tmp_path: Path, rows: list[bool]) -> None:
    """A file with bad rows is refused; the first few are named by line, and all are counted."""
    path = tmp_path / "task.csv"
    data = "".join(["text,label\n", *("a,b\n" if good else "a,\n" for good in rows)]).encode()
    bad = [line for line, good in enumerate(rows, 2) if not good]
    if not bad:
        path.write_bytes(data)
        assert len(read_csv(path)) == len(rows)
        return
    message = refused(path, data)
    named = [int(line) for line in re.findall(r"row must have a label, got none at line (\d+)", message)]
    assert named == bad[:5]
    assert len(bad) == len(named) + int((re.findall(r"and (\d+) more", message) or [0])[0])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"text,label\nhi,a\n ,b\n", "row must have a text, got none at line 3"),
        (b"text,label\nhi,a,b\n", "row must have 2 columns, got 3 at line 2"),
        (b'text,label\n"two\nlines",a\nhi\n', "row must have 2 columns, got 1 at line 4"),
        (b'text,label\nhi,a\n"open,b\n', "at line 3"),
        (b"text,label\nhi,a\ncaf\xe9,b\n", "row must be UTF-8, got byte 0xE9 at line 3"),
        (b"text,label\nhi\x00,a\n", "got a zero byte at line 2"),
        (b"words,label\nhi,a\n", "header must name text and one of label, category, got words, label at line 1"),
        (b"text,label\n", "file must hold a row below its header"),
        (b" \n", "got an empty file"),
    ],
)
def test_csv_refusals(tmp_path: Path, data: bytes, reason: str) -> None:
    """Line and reason of whatever cannot be used."""
    assert reason in refused(tmp_path / "task.csv", data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"Rome I-LOC\nis\n", "row must have a label, got only 'is' at line 2"),
        (b"Rome NNP I-LOC\n\nis O\n", "row must have 3 columns as the first one, got 2 at line 3"),
        (b"Rome LOC\n", "tag must be O, B-TYPE or I-TYPE, got 'LOC' at line 1"),
        (b"Rome I-LOC\n\xff O\n", "row must be UTF-8, got byte 0xFF at line 2"),
        (b"-DOCSTART- O\n", "file must hold a word and its tag"),
        (b"", "got an empty file"),
    ],
)
def test_column_refusals(tmp_path: Path, data: bytes, reason: str) -> None:
    """The same for columns."""
    assert reason in refused(tmp_path / "task.conll", data)


def test_documents_are_counted(tmp_path: Path) -> None:
    """Each mark begins another document, but for one that nothing stands before."""
    path = tmp_path / "task.conll"
    path.write_text("-DOCSTART- O\n\na O\n\nb O\n-DOCSTART- O\n\nc O\n", encoding="utf-8")
    assert [(example.words[0], example.document) for example in read_conll(path)] == [("a", 0), ("b", 0), ("c", 1)]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Refused, not raised as an OSError."""
    with pytest.raises(ValueError, match="task file must be readable"):
        read_csv(tmp_path / "none.csv")

"""Labelled text from CSV and from CoNLL columns; every row is used or refused with its line and the reason."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_backbone.checks import require

TEXT_COLUMN, LABEL_COLUMNS = "text", ("label", "category")
DOCUMENT_MARK = "-DOCSTART-"
SHOWN_PROBLEMS = 5
"""Most bad rows that an error quotes; it counts the others."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text to classify, as a single word with a single label, or one sentence to tag."""

    words: tuple[str, ...]
    labels: tuple[str, ...]
    """One a word."""
    document: int
    """Number of the document that it belongs to; of a classification, its own."""


class _Problems:
    """Bad rows of one file, told together."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, list[str]()

    def add(self, line: int, reason: str) -> None:
        """Remember one."""
        self.found.append(f"{reason} at line {line}")

    def tell(self) -> None:
        """Refuse the file if there is any.

        Raises:
            ValueError: With the first ones, and the number of the others.
        """
        more = len(self.found) - SHOWN_PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        require(not self.found, f"{'; '.join(self.found[:SHOWN_PROBLEMS])}{rest} of {self.path}")


def read_csv(path: Path) -> list[Example]:
    """Texts and labels of a CSV file with the columns `text` and `label` (or `category`); empty lines are no rows.

    White space around both is not part of them, and line ends within a text count as spaces.

    Raises:
        ValueError: If the file or any row of it cannot be used: line number and reason.
    """
    rows = _csv_rows(path)
    _, header = next(rows, (0, []))
    names = [name.strip().lower() for name in header]
    labels = [name for name in LABEL_COLUMNS if name in names]
    rule = f"header must name {TEXT_COLUMN} and one of {', '.join(LABEL_COLUMNS)}"
    require(TEXT_COLUMN in names and len(labels) == 1, f"{rule}, got {', '.join(names) or 'none'} at line 1 of {path}")
    places = names.index(TEXT_COLUMN), names.index(labels[0])
    problems, examples = _Problems(path), list[Example]()
    for line, row in rows:
        if len(row) != len(names):
            problems.add(line, f"row must have {len(names)} columns, got {len(row)}")
            continue
        text, label = (" ".join(row[place].split()) for place in places)
        if not text or not label:
            problems.add(line, f"row must have a {'label' if text else 'text'}, got none")
            continue
        examples.append(Example(words=(text,), labels=(label,), document=len(examples)))
    problems.tell()
    require(bool(examples), f"file must hold a row below its header, got none in {path}")
    return examples


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, each with the number of its first line."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    first = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"row must be CSV, got {error} at line {first} of {path}") from None
        if row:
            yield first, row
        first = reader.line_num + 1


def read_conll(path: Path) -> list[Example]:
    """Sentences of a file with a word a line: the word first, its tag last, columns between white space.

    An empty line ends a sentence, and a line that begins with `-DOCSTART-` a document.

    Raises:
        ValueError: If the file or any row of it cannot be used: line number and reason.
    """
    problems, examples = _Problems(path), list[Example]()
    rows: list[list[str]] = []
    columns = document = 0

    def close() -> None:
        if rows:
            words, tags = tuple(row[0] for row in rows), tuple(row[-1] for row in rows)
            examples.append(Example(words=words, labels=tags, document=document))
            rows.clear()

    for number, line in enumerate(_text(path).split("\n"), 1):
        row = line.split()
        if not row or row[0].startswith(DOCUMENT_MARK):
            close()
            document += bool(row) and any(example.document == document for example in examples[-1:])
            continue
        columns = columns or len(row)
        if len(row) == 1:
            problems.add(number, f"row must have a label, got only {row[0]!r}")
        elif len(row) != columns:
            problems.add(number, f"row must have {columns} columns as the first one, got {len(row)}")
        elif not _is_tag(row[-1]):
            problems.add(number, f"tag must be O, B-TYPE or I-TYPE, got {row[-1]!r}")
        else:
            rows.append(row)
    close()
    problems.tell()
    require(bool(examples), f"file must hold a word and its tag, got none in {path}")
    return examples


def _is_tag(tag: str) -> bool:
    return tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def _text(path: Path) -> str:
    """The file's text, a byte-order mark left out.

    Raises:
        ValueError: If it cannot be read, is empty, or is not UTF-8: line number and byte.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"task file must be readable, got {path}: {error.strerror}") from None
    require(bool(data.strip()), f"task file must hold text, got an empty file: {path}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"row must be UTF-8, got byte 0x{data[error.start]:02X} at line {line} of {path}") from None
    if "\x00" in text:
        line = text.count("\n", 0, text.index("\x00")) + 1
        raise ValueError(f"row must be text, got a zero byte at line {line} of {path}")
    return text

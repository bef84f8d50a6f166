"""Text in, tokens out: honest splits, windows that do not overlap, one-line errors that name the path."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_backbone.corpus import Corpus, Split, load_corpus

SEQ_LEN = 16
PARTS = ("train", "validation", "test")
TEXT = b"some words that fill a few windows of text. " * 40


def _documents(split: Split) -> list[bytes]:
    """Documents of a part, read back from its tokens."""
    return bytes(split.tokens.tolist()).split(b"\x00")[:-1]


def _same_splits(one: Corpus, other: Corpus) -> bool:
    return one.sha256 == other.sha256 and all(
        torch.equal(getattr(one, part).tokens, getattr(other, part).tokens)
        and torch.equal(getattr(one, part).document_ids, getattr(other, part).document_ids)
        for part in PARTS
    )


def _folder(path: Path, documents: list[bytes]) -> Path:
    path.mkdir()
    for number, document in enumerate(documents):
        (path / f"{number:03d}.txt").write_bytes(document)
    return path


def _jsonl(documents: list[bytes]) -> bytes:
    return b"".join(json.dumps({"text": document.decode(), "id": 7}).encode() + b"\n" for document in documents)


def test_splits_follow_neither_order_nor_names_of_files(text_folder: Path, tmp_path: Path) -> None:
    """The same documents under other names, in reverse, give the same three parts."""
    documents = [path.read_bytes() for path in sorted(text_folder.iterdir())]
    renamed = _folder(tmp_path / "renamed", documents[::-1])
    expected = load_corpus([text_folder], seq_len=SEQ_LEN)
    assert _same_splits(load_corpus([renamed], seq_len=SEQ_LEN), expected)
    one_by_one = load_corpus(sorted(text_folder.iterdir())[::-1], seq_len=SEQ_LEN)
    assert _same_splits(one_by_one, expected)


def test_changed_document_changes_the_hash(text_folder: Path) -> None:
    """One letter is enough, as the hash names the cached backbone."""
    before = load_corpus([text_folder], seq_len=SEQ_LEN).sha256
    path = text_folder / "00.txt"
    path.write_text(path.read_text(encoding="utf-8") + "x", encoding="utf-8")
    assert load_corpus([text_folder], seq_len=SEQ_LEN).sha256 != before


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt.gz", "two folders"])
def test_every_format_gives_the_same_corpus(suffix: str, text_folder: Path, tmp_path: Path) -> None:
    """A folder of files, one `.jsonl`, and both compressed hold the same documents."""
    documents = [path.read_bytes() for path in sorted(text_folder.iterdir())]
    path = tmp_path / f"corpus{suffix}"
    paths = [path]
    if suffix == ".jsonl":
        path.write_bytes(_jsonl(documents))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(_jsonl(documents)))
    elif suffix == ".txt.gz":
        path.mkdir()
        for number, document in enumerate(documents):
            (path / f"{number}.txt.gz").write_bytes(gzip.compress(document))
    else:
        paths = [_folder(tmp_path / "one", documents[:5]), _folder(tmp_path / "two", documents[5:])]
    assert _same_splits(load_corpus(paths, seq_len=SEQ_LEN), load_corpus([text_folder], seq_len=SEQ_LEN))


def test_no_document_is_in_two_parts(text_folder: Path) -> None:
    """Parts are disjoint and together hold every document once, though some files are copies."""
    originals = {path.read_bytes() for path in text_folder.iterdir()}
    for path in list(text_folder.iterdir()):
        (text_folder / f"copy-{path.name}").write_bytes(path.read_bytes())
    corpus = load_corpus([text_folder], seq_len=SEQ_LEN)
    documents = [document for part in PARTS for document in _documents(getattr(corpus, part))]
    assert sorted(documents) == sorted(originals)
    assert corpus.train.num_documents > corpus.test.num_documents > 0
    assert corpus.validation.num_documents > 0


@pytest.mark.parametrize("count", range(10, 20))
def test_equally_long_documents_leave_no_part_empty(count: int, tmp_path: Path) -> None:
    """However the shares fall between whole documents, every part gets one."""
    folder = _folder(tmp_path / "equal", [f"document number {number:03d} ".encode() * 20 for number in range(count)])
    corpus = load_corpus([folder], seq_len=SEQ_LEN)
    assert corpus.validation.num_documents == 1
    assert corpus.test.num_documents in (1, 2)
    assert corpus.train.num_documents >= 0.8 * (count - 1)


def test_single_file_is_cut_into_contiguous_parts(tmp_path: Path) -> None:
    """Train, validation and test follow one another and lose nothing; held-out text is cut into sections."""
    text = "".join(f"line {number} of one long text\n" for number in range(4000)).encode()
    path = tmp_path / "book.txt"
    path.write_bytes(text)
    corpus = load_corpus([path], seq_len=SEQ_LEN)
    parts = [_documents(getattr(corpus, part)) for part in PARTS]
    assert b"".join(b"".join(part) for part in parts) == text
    assert [round(sum(map(len, part)) / len(text), 3) for part in parts] == [0.85, 0.05, 0.1]
    assert len(parts[0]) == 1
    assert len(parts[2]) > 1
    assert corpus.name == "book.txt"


def test_document_ids_count_the_documents_of_a_part(text_folder: Path) -> None:
    """Each zero byte closes a document, and the next token belongs to the next one."""
    train = load_corpus([text_folder], seq_len=SEQ_LEN).train
    closed = train.tokens.eq(0).long().cumsum(0) - train.tokens.eq(0).long()
    assert torch.equal(train.document_ids, closed)
    assert train.num_documents == len(_documents(train))


def test_folder_skips_what_is_not_text_and_says_so(text_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Binary files are counted in a warning; hidden files and folders are not looked at."""
    expected = load_corpus([text_folder], seq_len=SEQ_LEN)
    (text_folder / "image.png").write_bytes(b"\x89PNG\x00\xff")
    (text_folder / ".notes").write_bytes(b"hidden")
    (text_folder / ".git").mkdir()
    (text_folder / ".git" / "config").write_bytes(b"hidden too")
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus([text_folder], seq_len=SEQ_LEN)
    assert _same_splits(corpus, expected)
    assert caplog.messages == [f"corpus {text_folder}: skipped 1 files that are not text"]


def test_relative_folder_has_a_name(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports name the corpus, also when it is the working folder."""
    monkeypatch.chdir(text_folder)
    assert load_corpus([Path(".")], seq_len=SEQ_LEN).name == "text"


def _counting_split(num_tokens: int) -> Split:
    """Every token is its own position."""
    tokens = torch.arange(num_tokens, dtype=torch.uint8)
    return Split(name="test", tokens=tokens, document_ids=tokens.long() // 50)


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "count"),
    [
        pytest.param(161, 10_000, 10, id="all"),
        pytest.param(160, 10_000, 9, id="the last next token is missing"),
        pytest.param(250, 64, 4, id="four of fifteen"),
        pytest.param(250, 16 * 14, 14, id="all but one"),
        pytest.param(250, 5, 1, id="less than one window"),
        pytest.param(17, 10_000, 1, id="one window"),
    ],
)
def test_windows_do_not_overlap(num_tokens: int, max_tokens: int, count: int) -> None:
    """As many as fit, no token twice, next tokens shifted by one, from the beginning to the end of the text."""
    tokens, targets, documents = _counting_split(num_tokens).windows(SEQ_LEN, max_tokens)
    assert tokens.shape == targets.shape == documents.shape == (count, SEQ_LEN)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.unique().numel() == tokens.numel()
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(documents, tokens // 50)
    assert tokens[0, 0] == 0
    assert count == 1 or targets[-1, -1] >= num_tokens - SEQ_LEN


def test_samples_reach_every_place_and_are_shifted_by_one() -> None:
    """Random windows start at the first token and end at the last at times, and never beyond."""
    tokens, targets = _counting_split(40).sample(400, SEQ_LEN, np.random.default_rng(0))
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens.diff(dim=1), torch.ones(400, SEQ_LEN - 1, dtype=torch.int64))
    assert tokens.min() == 0
    assert targets.max() == 39


def _file(name: str, content: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def _binary_folder(folder: Path) -> Path:
    (folder / "images").mkdir()
    (folder / "images" / "one.png").write_bytes(b"\x89PNG\x00\xff")
    return folder / "images"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(_file("none.txt", b""), "must contain text, got none in none.txt", id="empty file"),
        pytest.param(_file("blank.txt", b" \n\t\n"), "must contain text, got none in blank.txt", id="blank file"),
        pytest.param(
            _file("a.txt", b"\x89PNG\xff" + TEXT), "must be UTF-8 text, got binary data in .*a.txt", id="binary"
        ),
        pytest.param(_file("a.txt", TEXT + b"\x00"), "must be UTF-8 text, got binary data in .*a.txt", id="zero byte"),
        pytest.param(lambda folder: folder / "missing.txt", "readable file or folder, got .*missing.txt", id="missing"),
        pytest.param(
            lambda folder: _file("a.txt", TEXT)(folder) / "b.txt",
            "readable file or folder, got .*b.txt",
            id="below a file",
        ),
        pytest.param(_binary_folder, "must contain text, got none in images", id="folder without text"),
        pytest.param(
            _file("short.txt", TEXT[:200]),
            r"every part at least 2 \* seq_len=32 bytes, got 11 for validation of short.txt",
            id="too short",
        ),
        pytest.param(
            _file("a.jsonl", b'{"text": "x"}\n{"text"\n'), "'text', got line 2 of .*a.jsonl", id="half an object"
        ),
        pytest.param(_file("a.jsonl", b'{"body": "x"}\n'), "'text', got line 1 of .*a.jsonl", id="no text field"),
        pytest.param(_file("a.jsonl", b'\n["text"]\n'), "'text', got line 2 of .*a.jsonl", id="list"),
        pytest.param(_file("a.jsonl", b'{"text": null}\n'), "'text', got line 1 of .*a.jsonl", id="null text"),
        pytest.param(
            _file("a.jsonl", b'{"text": "\\ud800"}\n'), "'text', got line 1 of .*a.jsonl", id="lone surrogate"
        ),
        pytest.param(
            _file("a.gz", gzip.compress(TEXT)[:-12]), "readable file or folder, got .*a.gz", id="truncated gz"
        ),
        pytest.param(_file("b.gz", TEXT), "readable file or folder, got .*b.gz", id="not gzip"),
        pytest.param(
            _file("c.gz", gzip.compress(TEXT)[:10] + b"\xff" * 20),
            "readable file or folder, got .*c.gz",
            id="damaged gz",
        ),
    ],
)
def test_unusable_text_is_refused_in_one_line(build: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    """Whatever is wrong with a path, the user sees one line that names it."""
    with pytest.raises(ValueError, match=message) as error:
        load_corpus([build(tmp_path)], seq_len=SEQ_LEN)
    assert "\n" not in str(error.value)


def test_unreadable_file_is_refused_in_one_line(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without permission is named, with the reason."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"readable file or folder, got .*00\.txt: .*Permission denied"):
        load_corpus([text_folder / "00.txt"], seq_len=SEQ_LEN)

"""Text in, tokens out: reading, splitting by whole documents, random and exhaustive windows."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_backbone.vocabulary import BYTES, Vocabulary

logger = logging.getLogger(__name__)

TEST_SHARE, VALIDATION_SHARE = 0.10, 0.05
"""Shares of the bytes held out for evaluation, and for early stopping and calibration."""
FEW_DOCUMENTS = 10
"""With fewer documents than this the text itself is cut, not the list of documents."""
SECTION_BYTES = 2048
"""Held-out sections of a text with few documents; they stand in for documents in the intervals."""
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part of a corpus as a token stream.

    Attributes:
        name: `train`, `validation` or `test`.
        tokens: All documents, each closed by its end (num_tokens,): uint8 for bytes, else int32.
        document_ids: Document of every token (num_tokens,), int64, non-decreasing.
        vocabulary: What the tokens are.
    """

    name: str
    tokens: Tensor
    document_ids: Tensor
    vocabulary: Vocabulary = BYTES

    @property
    def num_documents(self) -> int:
        """Distinct documents."""
        return int(self.document_ids[-1]) + 1

    def windows(self, seq_len: int, max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Windows that do not overlap, spread evenly over the whole split.

        Args:
            seq_len: Tokens of a window.
            max_tokens: Most tokens in all.

        Returns:
            Tokens, next tokens and document ids, each (num_windows, seq_len), int64.
        """
        starts = self.starts(seq_len)
        count = max(1, min(len(starts), max_tokens // seq_len))
        starts = starts[np.linspace(0, len(starts) - 1, count).round().astype(np.int64)]
        return *self.at(starts, seq_len), self.document_ids[self.rows(starts, seq_len)]

    def sample(self, count: int, seq_len: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Windows at random places: tokens and next tokens, each (count, seq_len), int64."""
        return self.at(generator.integers(0, len(self.tokens) - seq_len, size=count), seq_len)

    def starts(self, seq_len: int) -> np.ndarray:
        """Where the windows of `seq_len` tokens, each with its next tokens, begin that fit side by side, int64."""
        return np.arange((len(self.tokens) - 1) // seq_len) * seq_len

    def at(self, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
        """Windows that begin at `starts`, int64 (count,): tokens and next tokens, each (count, seq_len), int64."""
        rows = self.rows(starts, seq_len)
        return self.tokens[rows].long(), self.tokens[rows + 1].long()

    def rows(self, starts: np.ndarray, seq_len: int) -> Tensor:
        """Places of every token of the windows that begin at `starts` (count, seq_len), int64."""
        return torch.from_numpy(starts).unsqueeze(1) + torch.arange(seq_len)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Three parts of one body of text that share no document."""

    name: str
    sha256: str
    """Hash of all documents, in order."""
    train: Split
    validation: Split
    test: Split


def load_corpus(paths: Sequence[Path] = (), *, seq_len: int = 128, vocabulary: Vocabulary = BYTES) -> Corpus:
    """Read text and split it by whole documents.

    Args:
        paths: Files or folders of UTF-8 text, `.jsonl` (one object with a `text` a line) or either in `.gz`;
            none for the source of the Python standard library on this machine.
        seq_len: Window length that every part must hold.
        vocabulary: What the tokens are.

    Raises:
        ValueError: If a path cannot be read, is not text, or the text is too short.
    """
    if paths:
        name = "+".join(path.resolve().name for path in paths)
        documents = [document for path in paths for document in _read(path)]
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        name = f"python-{sysconfig.get_python_version()}-stdlib"
        documents = [text for path in _python_files(root) if (text := _text(path.read_bytes())) is not None]
    documents = sorted({document for document in documents if document.strip()}, key=_digest)
    if not documents:
        raise ValueError(f"corpus must contain text, got none in {name}")
    corpus = _split(name, documents, vocabulary)
    for split in (corpus.train, corpus.validation, corpus.test):
        if len(split.tokens) < 2 * seq_len:
            raise ValueError(
                f"corpus must give every part at least 2 * seq_len={2 * seq_len} {vocabulary.unit}s, "
                f"got {len(split.tokens)} for {split.name} of {name}"
            )
    return corpus


def _split(name: str, documents: list[bytes], vocabulary: Vocabulary) -> Corpus:
    """Documents ordered by hash, so a part neither follows file names nor changes with their order."""
    sha256 = hashlib.sha256(b"".join(_digest(document).encode() for document in documents)).hexdigest()
    parts: dict[str, list[bytes]] = {"test": [], "validation": [], "train": []}
    if len(documents) < FEW_DOCUMENTS:
        logger.info("corpus %s has %d document(s): each is cut into train, validation and test", name, len(documents))
        for document in documents:
            first = int(len(document) * (1 - TEST_SHARE - VALIDATION_SHARE))
            second = int(len(document) * (1 - TEST_SHARE))
            parts["train"].append(document[:first])
            parts["validation"] += _sections(document[first:second])
            parts["test"] += _sections(document[second:])
    else:
        total = sum(map(len, documents))
        seen = 0
        for document in documents:
            share = seen / total
            part = "test" if share < TEST_SHARE else "train"
            if part == "train" and (share < TEST_SHARE + VALIDATION_SHARE or not parts["validation"]):
                part = "validation"
            parts[part].append(document)
            seen += len(document)
    splits = {part: _stream(part, texts, vocabulary) for part, texts in parts.items()}
    return Corpus(name=name, sha256=sha256, **splits)


def _sections(text: bytes) -> list[bytes]:
    return [text[start : start + SECTION_BYTES] for start in range(0, len(text), SECTION_BYTES)]


def _stream(name: str, documents: Iterable[bytes], vocabulary: Vocabulary) -> Split:
    texts = [vocabulary.encode(document) for document in documents]
    tokens = torch.cat(texts) if texts else torch.zeros(0).byte()
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    ids = torch.arange(len(texts)).repeat_interleave(lengths)
    return Split(name=name, tokens=tokens, document_ids=ids, vocabulary=vocabulary)


def _python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            yield path


def _read(path: Path) -> Iterator[bytes]:
    """Documents of a file or folder."""
    if path.is_dir():
        skipped = 0
        for child in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in child.relative_to(path).parts)
            if child.is_file() and not hidden:
                try:
                    yield from _read_file(child)
                except ValueError:
                    skipped += 1
        if skipped:
            logger.warning("corpus %s: skipped %d files that are not text", path, skipped)
    else:
        yield from _read_file(path)


def _read_file(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"corpus path must be a readable file or folder, got {path}: {error}") from None
    text = _text(data)
    if text is None:
        raise ValueError(f"corpus file must be UTF-8 text, got binary data in {path}")
    if ".jsonl" not in path.suffixes:
        return [text]
    return [_json_text(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _json_text(line: bytes, number: int, path: Path) -> bytes:
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError
        return text.encode()
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"line must be a JSON object with a 'text', got line {number} of {path}") from None


def _text(data: bytes) -> bytes | None:
    """The data if it is UTF-8 text without zero bytes."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return None
    return None if b"\x00" in data else data


def _digest(document: bytes) -> str:
    return hashlib.sha256(document).hexdigest()

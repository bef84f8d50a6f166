"""Examples of a task as a token stream: the answer is the token that the model predicts next, where it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.corpus import Split
from moe_backbone.quality import UNSCORED
from moe_backbone.tasks.readers import Example

WORD_END, TEXT_END = 0x20, 0x0A
"""Bytes behind a word and behind an example; at them the labels are predicted."""
RESERVED = (0x00, WORD_END, TEXT_END)


@dataclass(frozen=True, kw_only=True)
class LabelBytes:
    """Byte values that stand for labels; they occur in no text, so no text can be taken for an answer.

    Raises:
        ValueError: If there are more labels than values that no text uses.
    """

    labels: tuple[str, ...]
    values: tuple[int, ...]

    @classmethod
    def choose(cls, labels: Sequence[str], texts: Sequence[str]) -> LabelBytes:
        """Values for labels in sorted order: those that UTF-8 never uses first, then others that these texts don't."""
        used = {byte for text in texts for byte in text.encode()} | set(RESERVED)
        never = [*range(0xC0, 0xC2), *range(0xF5, 0x100)]
        others = [*range(0x80, 0xC0), *range(0xC2, 0xF5), *range(0x01, 0x20), 0x7F]
        free = [value for value in (*never, *others) if value not in used]
        distinct = tuple(sorted(set(labels)))
        rule = f"labels must be at most {len(free)}, the byte values that no text uses"
        require(len(distinct) <= len(free), f"{rule}, got {len(distinct)}")
        return cls(labels=distinct, values=tuple(free[: len(distinct)]))

    def value(self, label: str) -> int:
        """Byte of a label."""
        return self.values[self.labels.index(label)]

    def label(self, value: int, otherwise: str) -> str:
        """Label of a byte; `otherwise` for one that is none."""
        return self.labels[self.values.index(value)] if value in self.values else otherwise


@dataclass(frozen=True, kw_only=True)
class TaskSplit(Split):
    """Examples back to back, and beside each token the label that is to be predicted there.

    A window begins where an example begins and scores those that it holds whole; the beginning of the next fills it
    up. Documents are examples, and sentences that were cut are one document.

    Attributes:
        labels: Byte to predict at each token, `UNSCORED` where there is none (num_tokens,), int16.
        bounds: Where each example begins, and the end of the last (num_examples + 1,), int64.
        label_bytes: What the bytes mean.
        tagging: Whether the labels are tags of entities, which F1 counts.
    """

    labels: Tensor
    bounds: Tensor
    label_bytes: LabelBytes
    tagging: bool

    def starts(self, seq_len: int) -> np.ndarray:
        """Where windows begin that score every example once, int64."""
        bounds, first, starts = self.bounds.numpy(), 0, []
        while first < len(bounds) - 1:
            starts.append(bounds[first])
            first = int(np.searchsorted(bounds, bounds[first] + seq_len, side="right")) - 1
        return np.array(starts, dtype=np.int64)

    def at(self, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
        """Windows that begin at `starts`, int64 (count,): tokens and labels, each (count, seq_len), int64."""
        rows = self.rows(starts, seq_len)
        tokens, labels = self.tokens[rows].long(), self.labels[rows].long()
        whole = np.searchsorted(self.bounds.numpy(), starts + seq_len, side="right") - 1
        ends = self.bounds[torch.from_numpy(whole)] - torch.from_numpy(starts)
        return tokens, labels.masked_fill(torch.arange(seq_len) >= ends.unsqueeze(1), UNSCORED)

    def rows(self, starts: np.ndarray, seq_len: int) -> Tensor:
        """Places of every token of the windows (count, seq_len), int64; behind the last example comes the first."""
        return super().rows(starts, seq_len) % len(self.tokens)

    def sample(self, count: int, seq_len: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Windows of examples drawn and put together at random: tokens and labels, each (count, seq_len), int64."""
        lengths = self.bounds.diff().numpy()
        rows, ends = np.zeros((count, seq_len), dtype=np.int64), np.zeros((count, 1), dtype=np.int64)
        for window in range(count):
            filled = 0
            while filled < seq_len:
                example = int(generator.integers(len(lengths)))
                taken = min(int(lengths[example]), seq_len - filled)
                rows[window, filled : filled + taken] = int(self.bounds[example]) + np.arange(taken)
                filled += taken
                if taken == lengths[example]:
                    ends[window] = filled
        tokens, labels = self.tokens[rows].long(), self.labels[rows].long()
        return tokens, labels.masked_fill(torch.from_numpy(np.arange(seq_len) >= ends), UNSCORED)


def encode(
    name: str, examples: Sequence[Example], label_bytes: LabelBytes, *, seq_len: int, lookahead: int, tagging: bool
) -> tuple[TaskSplit, int]:
    """A part of a task as a stream, and how many examples were cut to fit a window.

    Args:
        name: `train`, `validation` or `test`.
        examples: In the order of the stream.
        label_bytes: Of all labels.
        seq_len: Most tokens of an example. A longer sentence is cut into several; a longer word, or text to classify,
            loses its beginning.
        lookahead: Words that are read behind a word before its label is asked for.
        tagging: Whether the labels are tags of entities.
    """
    tokens, labels, lengths, documents, cut = bytearray(), list[int](), list[int](), list[int](), 0
    for document, example in enumerate(examples):
        words = [word.encode()[lookahead + 1 - seq_len :] for word in example.words]
        pieces = list(_pieces([len(word) for word in words], seq_len - lookahead))
        cut += len(pieces) > 1 or sum(map(len, words)) < len("".join(example.words).encode())
        for piece in pieces:
            text, asked = _piece(words[piece], [label_bytes.value(tag) for tag in example.labels[piece]], lookahead)
            tokens += text
            labels += asked
            lengths.append(len(text))
            documents += [document] * len(text)
    split = TaskSplit(
        name=name,
        tokens=torch.frombuffer(tokens, dtype=torch.uint8),
        document_ids=torch.tensor(documents),
        labels=torch.tensor(labels, dtype=torch.int16),
        bounds=torch.tensor([0, *accumulate(lengths)]),
        label_bytes=label_bytes,
        tagging=tagging,
    )
    return split, cut


def _pieces(lengths: Sequence[int], most: int) -> list[slice]:
    """Runs of words of at most `most` bytes, one behind each word counted in."""
    pieces, first, filled = list[slice](), 0, 0
    for index, length in enumerate(lengths):
        if filled + length + 1 > most:
            pieces.append(slice(first, index))
            first, filled = index, 0
        filled += length + 1
    return [*pieces, slice(first, len(lengths))]


def _piece(words: Sequence[bytes], values: Sequence[int], lookahead: int) -> tuple[bytes, list[int]]:
    """Bytes of words, and at each the label to predict there or `UNSCORED`."""
    text = bytes([WORD_END]).join(words) + bytes([TEXT_END]) * (lookahead + 1)
    ends = [end - 1 for end in accumulate(len(word) + 1 for word in words)]
    ends += range(ends[-1] + 1, ends[-1] + 1 + lookahead)
    asked = [UNSCORED] * len(text)
    for place, value in zip(ends[lookahead:], values, strict=True):
        asked[place] = value
    return text, asked

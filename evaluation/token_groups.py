"""Groups of byte tokens: by class, by place in a word, by how hard native routing finds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluation.intervals import FloatArray

IntArray = NDArray[np.int64]

BYTE_CLASSES = {
    "lower-case letter": b"abcdefghijklmnopqrstuvwxyz",
    "upper-case letter": b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "digit": b"0123456789",
    "underscore": b"_",
    "bracket": b"()[]{}<>",
    "quote": b"'\"`",
    "space in a line": b" \t",
    "indentation": b"",
    "newline": b"\n\r",
    "end of document": b"\x00",
    "byte beyond ASCII": bytes(range(128, 256)),
    "other punctuation": b"",
}
"""Bytes of each class; indentation is told from other spaces by its place, the last class holds all that is left."""
WORD_BYTES = b"".join(BYTE_CLASSES[name] for name in list(BYTE_CLASSES)[:4]) + BYTE_CLASSES["byte beyond ASCII"]
WORD_PLACES = ("first byte of a word", "second byte", "third to fifth byte", "later byte", "outside words")
QUINTILES = ("easiest fifth", "second fifth", "third fifth", "fourth fifth", "hardest fifth")


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouping:
    """Every token in exactly one group; no group is empty."""

    title: str
    names: tuple[str, ...]
    members: IntArray = field(repr=False)
    """Group of each token, an index into `names` (num_tokens,)."""

    @property
    def shares(self) -> FloatArray:
        """Fraction of the tokens in each group (num_groups,), float64; they add up to 1."""
        return self._counts / len(self.members)

    def means(self, values: FloatArray) -> FloatArray:
        """Mean of `values` (num_tokens,) over each group (num_groups,), float64."""
        return np.bincount(self.members, weights=values, minlength=len(self.names)) / self._counts

    @property
    def _counts(self) -> IntArray:
        return np.bincount(self.members, minlength=len(self.names))


def byte_classes(tokens: IntArray, title: str = "Class of the byte") -> Grouping:
    """Group bytes by what they are; spaces and tabs that begin a line are indentation.

    Args:
        tokens: Bytes (num_sequences, seq_len); a window that begins within a line has no indentation there.
        title: What the bytes are of.
    """
    names = list(BYTE_CLASSES)
    lookup = np.full(256, names.index("other punctuation"))
    for index, values in enumerate(BYTE_CLASSES.values()):
        lookup[list(values)] = index
    members = lookup[tokens]
    blank = members == names.index("space in a line")
    begins = np.zeros(len(tokens), dtype=bool)  # whether only blanks lie between here and the start of a line
    for place in range(tokens.shape[1]):
        members[begins & blank[:, place], place] = names.index("indentation")
        begins = (tokens[:, place] == ord("\n")) | (begins & blank[:, place])
    return _grouping(title, names, members.ravel())


def word_positions(tokens: IntArray) -> Grouping:
    """Group bytes by their place in a word of letters, digits and underscores.

    Args:
        tokens: Bytes (num_sequences, seq_len); a window that begins within a word counts from there.
    """
    in_word = np.isin(tokens, list(WORD_BYTES))
    length = np.zeros(len(tokens), dtype=np.int64)
    members = np.empty_like(tokens)
    for place in range(tokens.shape[1]):
        length = np.where(in_word[:, place], length + 1, 0)
        members[:, place] = np.where(length > 0, np.searchsorted([2, 3, 6], length, side="right"), 4)
    return _grouping("Place in the word", WORD_PLACES, members.ravel())


def quintiles(title: str, values: FloatArray) -> Grouping:
    """Group tokens into fifths by `values` (num_tokens,), nats; of equal values the earlier token counts as lower."""
    order = values.argsort(kind="stable")
    members = np.empty(len(values), dtype=np.int64)
    members[order] = np.arange(len(values)) * len(QUINTILES) // len(values)
    ranges = [values[members == fifth] for fifth in range(len(QUINTILES))]
    names = [
        f"{name}: {part.min():.3f} to {part.max():.3f}" if len(part) else name
        for name, part in zip(QUINTILES, ranges, strict=True)
    ]
    return _grouping(title, names, members)


def _grouping(title: str, names: Sequence[str], members: IntArray) -> Grouping:
    """Leave out empty groups."""
    present, renamed = np.unique(members, return_inverse=True)
    return Grouping(title=title, names=tuple(_pick(names, present)), members=renamed.reshape(-1))


def _pick(names: Sequence[str], indices: Iterable[int]) -> list[str]:
    return [names[index] for index in indices]

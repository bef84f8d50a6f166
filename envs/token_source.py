"""Where sequences come from."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from moe_backbone.corpus import Split


class TokenSource(Protocol):
    """Draws token sequences and their next tokens."""

    seq_len: int

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens, each (count, seq_len), int64."""
        ...


class CorpusSource:
    """Windows of one part of a corpus.

    A pass takes every window of a grid once, in an order that the generator shuffles anew for each pass. It belongs
    to its generator: another one starts a new pass, so environments that take turns each need a source of their own.

    Args:
        split: Where the windows lie.
        seq_len: Tokens of a window.
        order: `random` places, or `passes` over windows that lie side by side.

    Attributes:
        left: Windows of the current pass that are still to come; may be set after a first draw, to go on with another.
    """

    def __init__(self, split: Split, seq_len: int, order: Literal["random", "passes"] = "random") -> None:
        if order not in ("random", "passes"):
            raise ValueError(f"order must be one of random, passes, got {order!r}")
        self._starts = split.starts(seq_len) if order == "passes" else np.zeros(0, dtype=np.int64)
        if order == "passes" and len(self._starts) < 1:
            raise ValueError(
                f"split must hold a window of seq_len={seq_len} tokens for passes, got {len(split.tokens)}"
            )
        self.split, self.seq_len, self.order = split, seq_len, order
        self._generator: np.random.Generator | None = None
        self.left = np.zeros(0, dtype=np.int64)

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens, each (count, seq_len), int64."""
        if self.order == "random":
            return self.split.sample(count, self.seq_len, generator)
        if generator is not self._generator:
            self._generator, self.left = generator, self.left[:0]
        while len(self.left) < count:
            self.left = np.append(self.left, generator.permutation(len(self._starts)))
        windows, self.left = self.left[:count], self.left[count:]
        return self.split.at(self._starts[windows], self.seq_len)


class FixedSource:
    """The same sequences again and again, in order; for tests and replays."""

    def __init__(self, tokens: Tensor, targets: Tensor) -> None:
        """Keep tokens and next tokens, each (num_sequences, seq_len), int64."""
        self.tokens, self.targets = tokens, targets
        self.seq_len = tokens.shape[1]

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The first `count` sequences, from the start again when they run out; `generator` is not used."""
        rows = np.arange(count) % len(self.tokens)
        return self.tokens[rows], self.targets[rows]

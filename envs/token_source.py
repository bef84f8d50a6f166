"""Where sequences come from."""

from __future__ import annotations

from typing import Protocol

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
    """Windows at random places of one part of a corpus."""

    def __init__(self, split: Split, seq_len: int) -> None:
        """Draw windows of `seq_len` tokens from `split`."""
        self.split = split
        self.seq_len = seq_len

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens, each (count, seq_len), int64."""
        return self.split.sample(count, self.seq_len, generator)


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

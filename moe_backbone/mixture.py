"""Several corpora as one training text: every sample of a batch draws its corpus at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.corpus import Corpus, load_corpus
from moe_backbone.vocabulary import BYTES, Vocabulary

FORM = "NAME=PATH:RATIO, NAME=PATH:START..END or NAME=PATH"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One corpus of a mixture, as a command names it."""

    name: str
    paths: tuple[Path, ...]
    """Files and folders; none for the source of the Python standard library."""
    ratio: tuple[float, float] | None
    """At the first step and at the last, of any scale; None to go by size."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Corpora and how often each is drawn.

    Attributes:
        names: One for each corpus.
        corpora: The texts.
        first: Share of the samples that each corpus gets at the first step; sums to 1.
        last: The same at the last step; in between it moves linearly.
    """

    names: tuple[str, ...]
    corpora: tuple[Corpus, ...]
    first: tuple[float, ...]
    last: tuple[float, ...]

    def shares(self, progress: float) -> np.ndarray:
        """Share of the samples that each corpus gets (num_corpora,), float64.

        Args:
            progress: 0 at the first step, 1 at the last.

        Example: shares from (.9, .1) to (.5, .5) are (.7, .3) half way.
        """
        return (1 - progress) * np.array(self.first) + progress * np.array(self.last)

    def sample(
        self, count: int, seq_len: int, progress: float, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Windows at random places of corpora drawn at random.

        Returns:
            Tokens and next tokens, each (count, seq_len), int64, and the place of each one's corpus (count,), int64.
        """
        drawn = generator.choice(len(self.corpora), size=count, p=self.shares(progress))
        windows = [self.corpora[place].train.sample(1, seq_len, generator) for place in drawn]
        tokens, targets = zip(*windows, strict=True)
        return torch.cat(tokens), torch.cat(targets), torch.from_numpy(drawn)

    def describe(self) -> str:
        """Names, texts and shares in one line."""
        parts = zip(self.names, self.corpora, self.first, self.last, strict=True)
        return ", ".join(
            f"{name} ({corpus.name}) {first:.3g}" + ("" if math.isclose(first, last) else f" to {last:.3g}")
            for name, corpus, first, last in parts
        )


def parse_part(word: str) -> Part:
    """Read `NAME=PATH:RATIO`, `NAME=PATH:START..END` or `NAME=PATH`.

    PATH may be several, with commas between, or nothing for the source of the Python standard library. What follows the
    last colon is the ratio. 0 is for a corpus that is only measured.

    Raises:
        ValueError: If it has another form, a path does not exist, or a ratio is not a number or is below 0.
    """
    name, equals, rest = word.partition("=")
    require(bool(equals and name), f"mix must be of {FORM}, got {word!r}")
    where, colon, text = rest.rpartition(":")
    if not colon:
        where = rest
    paths = tuple(Path(path) for path in where.split(",") if path)
    for path in paths:
        require(path.exists(), f"mix must name files or folders that exist, got {path} for {name}")
    return Part(name=name, paths=paths, ratio=_ratio(name, text) if colon else None)


def _ratio(name: str, text: str) -> tuple[float, float]:
    first, dots, last = text.partition("..")
    try:
        ratio = float(first), float(last if dots else first)
    except ValueError:
        raise ValueError(f"mix must have a number or START..END behind the colon, got {text!r} for {name}") from None
    require(all(0 <= value < math.inf for value in ratio), f"mix must have ratios of at least 0, got {text} for {name}")
    return ratio


def load_mixture(
    words: Sequence[str], *, temperature: float = 1.0, seq_len: int = 128, vocabulary: Vocabulary = BYTES
) -> Mixture:
    """Read the corpora of a mixture.

    Args:
        words: One for each corpus, see `parse_part`.
        temperature: Where no corpus has a ratio, shares go by `size ** (1 / temperature)`, size in training tokens: 1
            in proportion to size, above it more evenly (arXiv:1907.05019).
        seq_len: Window length that every part of every corpus must hold.
        vocabulary: What the tokens are.

    Raises:
        ValueError: If a word is malformed, a name comes twice, some corpora have ratios and some do not, all ratios are
            0 at an end, the temperature is not positive or stands beside ratios, or a corpus cannot be read.
    """
    require(bool(words), "mix must name at least one corpus, got none")
    require(0 < temperature < math.inf, f"temperature must be positive, got {temperature}")
    parts = [parse_part(word) for word in words]
    names = tuple(part.name for part in parts)
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"mix must name every corpus once, got {', '.join(twice)} more often")
    without = [part.name for part in parts if part.ratio is None]
    rule = "mix must give a ratio to every corpus or to none"
    require(len(without) in (0, len(parts)), f"{rule}, got none for {', '.join(without)}")
    require(bool(without) or temperature == 1, f"temperature must be 1 where ratios are given, got {temperature}")
    ratios = np.array([part.ratio or (1.0, 1.0) for part in parts])
    require(bool((ratios.sum(0) > 0).all()), f"mix must have a positive ratio at each end, got {' '.join(words)}")
    corpora = tuple(load_corpus(part.paths, seq_len=seq_len, vocabulary=vocabulary) for part in parts)
    if without:
        sizes = np.array([float(len(corpus.train.tokens)) for corpus in corpora])
        ratios = ((sizes / sizes.max()) ** (1 / temperature))[:, None].repeat(2, axis=1)
    first, last = (ratios / ratios.sum(0)).T.tolist()
    return Mixture(names=names, corpora=corpora, first=tuple(first), last=tuple(last))

"""What tokens are: bytes, or the pieces of a checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Vocabulary(Protocol):
    """Turns text into tokens and shows them."""

    unit: str
    """What a reader calls a token: `byte`, or `token`."""

    def encode(self, document: bytes) -> Tensor:
        """Tokens of UTF-8 text, closed by an end of document: integers (num_tokens,)."""
        ...

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token."""
        ...


class Bytes:
    """A token a byte; a zero byte ends a document."""

    unit = "byte"

    def encode(self, document: bytes) -> Tensor:
        """Bytes, uint8 (num_tokens,)."""
        return torch.frombuffer(bytearray(document + b"\x00"), dtype=torch.uint8)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The character of each byte, as in Latin-1."""
        return [chr(token) for token in tokens]


BYTES = Bytes()

"""The tokenizer of a checkpoint as a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_backbone.checks import require


class TokenizerVocabulary:
    """Pieces of a tokenizer of transformers.

    Args:
        tokenizer: What the checkpoint was trained with.
        vocab_size: Of the model.

    Attributes:
        end: Token that ends a document; None where the tokenizer has none, and documents then follow each other.

    Raises:
        ValueError: If the tokenizer has tokens that the model does not.
    """

    unit = "token"

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        size = len(tokenizer)
        require(size <= vocab_size, f"tokenizer must have at most the model's {vocab_size} tokens, got {size}")
        self.tokenizer = tokenizer
        end = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
        self.end: int | None = next((token for token in end if token is not None), None)

    def encode(self, document: bytes) -> Tensor:
        """Token ids of a document, int32 (num_tokens,)."""
        text = document.decode("utf-8", errors="ignore")
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(tokens if self.end is None else [*tokens, self.end], dtype=torch.int32)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [self.tokenizer.decode([token]) for token in tokens]

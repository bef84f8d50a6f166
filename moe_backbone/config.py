"""Sizes and rules of the mixture-of-experts transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_backbone.checks import require, require_at_least

LONGEST = 2**20
"""Tokens of a sequence; a table of positions is as long."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Architecture of the backbone; every field changes the trained weights.

    Raises:
        ValueError: If a size is impossible; the message gives name, rule and actual value.
    """

    vocab_size: int = 256
    """Number of distinct tokens; 256 reads text as bytes."""
    hidden_size: int = 128
    """Width of a token's hidden state."""
    num_layers: int = 4
    """Transformer layers; each has one attention site and one expert site."""
    num_heads: int = 8
    """Attention heads a layer."""
    num_experts: int = 16
    """Experts a layer."""
    top_k: int = 4
    """Experts a token uses under native routing."""
    intermediate_size: int = 96
    """Inner width of one SwiGLU expert."""
    shared_intermediate_size: int = 0
    """Inner width of an expert that every token always uses; 0 for none."""
    head_gate: bool = False
    """Whether attention heads have a native gate that weights them, as experts do."""
    mixing: Literal["renormalize", "keep", "gate_vector"] = "renormalize"
    """Weights of chosen experts: gate probabilities renormalised over the subset, kept as they are, or renormalised in
    each dimension of the update after a learned vector was added to the gate."""
    seq_len: int = 128
    """Tokens of one sequence in training, rollouts and evaluation."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies (arXiv:2104.09864)."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_experts", "intermediate_size")
        require_at_least(self, 1, *sizes)
        require(2 <= self.seq_len <= LONGEST, f"seq_len must lie in [2, {LONGEST}], got {self.seq_len}")
        require(
            1 <= self.top_k <= self.num_experts,
            f"top_k must lie in [1, num_experts={self.num_experts}], got {self.top_k}",
        )
        require(
            self.hidden_size % (2 * self.num_heads) == 0,
            f"hidden_size must be a multiple of 2 * num_heads={2 * self.num_heads}, got {self.hidden_size}",
        )
        require(
            self.shared_intermediate_size >= 0,
            f"shared_intermediate_size must be at least 0, got {self.shared_intermediate_size}",
        )
        require(self.rope_theta > 0, f"rope_theta must be positive, got {self.rope_theta}")
        require(
            self.mixing in ("renormalize", "keep", "gate_vector"),
            f"mixing must be 'renormalize', 'keep' or 'gate_vector', got {self.mixing!r}",
        )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def max_units(self) -> int:
        """Units of the largest site: the width of an action."""
        return max(self.num_heads, self.num_experts)

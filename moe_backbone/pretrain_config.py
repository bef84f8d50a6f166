"""How a backbone is trained, and which of it shapes the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from moe_backbone.checks import require, require_at_least, require_fraction
from moe_backbone.precision import Precision, require_precision
from moe_backbone.random_routing import RandomUnits

LATER_SETTINGS = ("random_schedule", "random_units", "consistency", "precision")
"""Settings that came after the first backbones were kept; see `shaping`."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How the backbone is trained on first use.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    steps: int = 1500
    """Most optimiser steps; early stopping may end before."""
    sequences: int = 16
    """Sequences of a step."""
    learning_rate: float = 3e-3
    """Peak of the AdamW learning rate; warmed up, then a cosine to 0."""
    weight_decay: float = 0.1
    """AdamW weight decay."""
    balance_weight: float = 0.01
    """Weight of the load-balance loss of the native gate."""
    random_routing: float = 0.0
    """Share of sequences trained under random subsets, see `random_units`; 0 to 1."""
    random_from: float = 0.0
    """Share of training that passes before random routing starts; 0 for all of training, 0.7 for the last 30 %."""
    random_schedule: Literal["constant", "linear"] = "constant"
    """From there on: the share at once, or growing linearly from 0 to it at the end."""
    random_units: tuple[RandomUnits, ...] = ("heads", "depth")
    """What is drawn: `heads` (each token its own, at a rate drawn for the sequence) or `sequence_heads` (one choice a
    sequence); `depth` (how many experts, best first), `experts` (which ones), or both."""
    consistency: float = 0.0
    """Weight of the disagreement between two routes of the same tokens (arXiv:2110.04260), nats; above 0 a step under
    random routing has half as many different sequences, each of them twice."""
    eval_every: int = 100
    """Steps between looks at the validation documents."""
    patience: int = 4
    """Looks without improvement before training stops early."""
    seed: int = 0
    """Seed of weights, batches and random routing."""
    precision: Precision = "fp32"
    """Of the forward pass and its gradients; weights and optimiser are float32 under each, and so is validation. It
    pays where the machine multiplies in 16 bits: GPUs, and CPUs with AMX or AVX512-BF16."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "sequences", "eval_every", "patience")
        require_fraction(self, "random_routing", "random_from")
        require_at_least(self, 0, "consistency")
        require(bool(self.random_units), "random_units must name what is drawn, got none")
        for unit in self.random_units:
            known = ", ".join(get_args(RandomUnits))
            require(unit in get_args(RandomUnits), f"random_units must be some of {known}, got {unit!r}")
        both = {"heads", "sequence_heads"} <= set(self.random_units)
        require(not both, "random_units must name one of heads and sequence_heads, got both")
        schedules = ("constant", "linear")
        rule = f"random_schedule must be one of {', '.join(schedules)}"
        require(self.random_schedule in schedules, f"{rule}, got {self.random_schedule!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        require_precision(self.precision)


def shaping(pretrain: PretrainConfig) -> dict[str, Any]:
    """Settings that shape the weights; a later one only where it is not at its default, so that kept ones are found."""
    defaults = {field.name: field.default for field in fields(pretrain)}
    values = asdict(pretrain)
    return {name: value for name, value in values.items() if name not in LATER_SETTINGS or value != defaults[name]}

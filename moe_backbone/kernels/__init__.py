"""One public op per job; `reference` is the definition, the other paths must equal it."""

from __future__ import annotations

from typing import Literal

from moe_backbone.kernels import compact, reference
from moe_backbone.kernels.reference import expert_mlp, rotate
from moe_backbone.kernels.rows import count_rows

HeadBackend = Literal["reference", "compact"]

HEAD_ATTENTION = {"reference": reference.head_attention, "compact": compact.head_attention}
"""Implementations of the attention op by name."""

__all__ = ["HEAD_ATTENTION", "HeadBackend", "count_rows", "expert_mlp", "rotate"]

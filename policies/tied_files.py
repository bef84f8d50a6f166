"""Weights and a description beside them, tied to the backbone they were made for; loads no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.files import write_atomic, write_text_atomic
from moe_backbone.sites import Backbone

FORMAT = 1
WEIGHTS, DESCRIPTION = "router.safetensors", "router.json"


def save_tied(folder: Path, backbone: Backbone, kind: str, spec: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all.

    Args:
        folder: Made if it is not there.
        backbone: Its hash is written too.
        kind: What the weights are of.
        spec: JSON values.
        weights: By name.
    """
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    write_atomic(folder / WEIGHTS, lambda path: save_file(tensors, path))
    description = {"format": FORMAT, "kind": kind, "backbone_sha256": backbone.sha256(), "router": spec}
    write_text_atomic(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def load_tied(folder: Path, backbone: Backbone, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read specification and weights, and check what they were made for.

    Raises:
        ValueError: If the files are missing, damaged, of another format or kind, not finite, or made for another
            backbone.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        made = (description["format"], description["kind"])
        spec, made_for = dict(description["router"]), str(description["backbone_sha256"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"router folder must hold readable {WEIGHTS} and {DESCRIPTION}, got {folder}: {error}"
        ) from None
    require(made == (FORMAT, kind), f"router must be {kind} of format {FORMAT}, got {made} in {folder}")
    actual = backbone.sha256()
    message = f"router must be made for this backbone (sha256 {actual[:12]}), got one for {made_for[:12]}"
    require(made_for == actual, message)
    finite = all(weight.isfinite().all() for weight in weights.values())
    require(finite, f"router weights must be finite, got NaN or infinity in {folder / WEIGHTS}")
    return spec, weights

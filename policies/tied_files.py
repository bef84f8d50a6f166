"""Weights and a description beside them, tied to the backbone they were made for; loads no code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_backbone.checks import require
from moe_backbone.files import write_atomic, write_text_atomic
from moe_backbone.plain import read_json
from moe_backbone.sites import Backbone

Parsed = TypeVar("Parsed")
FORMAT = 1
WEIGHTS, DESCRIPTION = "router.safetensors", "router.json"


def write_files(folder: Path, description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all; makes the folder if it is not there.

    Args:
        folder: Where they go.
        description: JSON values.
        weights: By name.
    """
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    write_atomic(folder / WEIGHTS, lambda path: save_file(tensors, path))
    write_text_atomic(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def read_files(folder: Path, parse: Callable[[dict[str, Any]], Parsed]) -> tuple[Parsed, dict[str, Tensor]]:
    """Read both files.

    Args:
        folder: Where they lie.
        parse: Makes something of the description; whatever it stumbles over is damage.

    Raises:
        ValueError: If they are missing or damaged.
    """
    try:
        return parse(read_json(folder / DESCRIPTION)), load_file(folder / WEIGHTS)
    except (OSError, KeyError, TypeError, AttributeError, OverflowError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"router folder must hold readable {WEIGHTS} and {DESCRIPTION}, got {folder}: {error}"
        ) from None


def check_made_for(made_for: str, backbone: Backbone, name: str | None = None) -> None:
    """Refuse what was made for another backbone, which is called `name`.

    Raises:
        ValueError: If the hashes differ.
    """
    actual = backbone.sha256()
    other = made_for[:12] if name is None else f"{name} ({made_for[:12]})"
    message = f"router must be made for this backbone, {backbone.name} (sha256 {actual[:12]}), got one for {other}"
    require(made_for == actual, message)


def check_finite(weights: Iterable[Tensor], folder: Path) -> None:
    """Refuse weights that no training leaves.

    Raises:
        ValueError: If one is NaN or infinite.
    """
    finite = all(weight.isfinite().all() for weight in weights)
    require(finite, f"router weights must be finite, got NaN or infinity in {folder / WEIGHTS}")


def save_tied(folder: Path, backbone: Backbone, kind: str, spec: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files with what they were made for.

    Args:
        folder: Made if it is not there.
        backbone: Its hash is written too.
        kind: What the weights are of.
        spec: JSON values.
        weights: By name.
    """
    write_files(folder, {"format": FORMAT, "kind": kind, "backbone_sha256": backbone.sha256(), "router": spec}, weights)


def load_tied(folder: Path, backbone: Backbone, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read specification and weights, and check what they were made for.

    Raises:
        ValueError: If the files are missing, damaged, of another format or kind, not finite, or made for another
            backbone.
    """

    def parse(description: dict[str, Any]) -> tuple[tuple[Any, Any], dict[str, Any], str]:
        spec = description["router"]
        if not isinstance(spec, dict):
            raise TypeError(f"{spec!r} is no specification")
        return (description["format"], description["kind"]), spec, str(description["backbone_sha256"])

    (made, spec, made_for), weights = read_files(folder, parse)
    require(made == (FORMAT, kind), f"router must be {kind} of format {FORMAT}, got {made} in {folder}")
    check_made_for(made_for, backbone)
    check_finite(weights.values(), folder)
    return spec, weights

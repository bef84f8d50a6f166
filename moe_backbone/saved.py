"""A trained backbone as two files that load no code: `backbone.safetensors` and `backbone.json`.

Weights may lie there as integers and scales, see `moe_backbone.compression`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_backbone.checks import require
from moe_backbone.compression import QuantizedWeights, plain_weights
from moe_backbone.config import BackboneConfig
from moe_backbone.files import write_atomic, write_text_atomic
from moe_backbone.plain import from_plain, read_json
from moe_backbone.transformer import MoETransformer

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"
FORMAT = 1


def save_backbone(
    backbone: MoETransformer | QuantizedWeights, folder: Path, about: Mapping[str, Any] | None = None
) -> None:
    """Write both files, each whole or not at all; makes the folder if it is not there.

    Args:
        backbone: What is kept: sizes and weights.
        folder: Where the files go.
        about: How it was made, JSON values, for readers.
    """
    held = backbone.tensors() if isinstance(backbone, QuantizedWeights) else backbone.state_dict()
    weights = {name: weight.detach().cpu().contiguous() for name, weight in held.items()}
    description = {"format": FORMAT, "config": asdict(backbone.config), "about": dict(about or {})}
    write_atomic(folder / WEIGHTS, lambda path: save_file(weights, path))
    write_text_atomic(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def load_saved(folder: Path, device: str = "cpu") -> MoETransformer:
    """The backbone of a folder, in evaluation mode, frozen, on `device`.

    Raises:
        ValueError: If a file is missing, damaged, of another format, or the two do not fit.
    """
    try:
        description = read_json(folder / DESCRIPTION)
        made, config = description["format"], from_plain(BackboneConfig, description["config"])
        weights = plain_weights(load_file(folder / WEIGHTS))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"backbone folder must hold readable {WEIGHTS} and {DESCRIPTION}, got {folder}: {_line(error)}"
        ) from None
    require(made == FORMAT, f"backbone format must be {FORMAT}, got {made!r:.60} in {folder}")
    require(config.num_layers <= len(weights), f"backbone weights must fit {DESCRIPTION}, got fewer in {folder}")
    try:
        with torch.device("meta"):  # sizes that the weights do not have shall not cost memory
            MoETransformer(config).load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"backbone weights must fit {DESCRIPTION}, got {folder}: {_line(error)}") from None
    whole = MoETransformer(config)
    whole.load_state_dict(weights)
    return whole.requires_grad_(False).eval().to(device)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def read_about(folder: Path) -> dict[str, Any]:
    """How the backbone of a folder was made."""
    about: dict[str, Any] = read_json(folder / DESCRIPTION).get("about", {})
    return about

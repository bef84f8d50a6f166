"""A learned router as two files that load no code: `router.safetensors` and `router.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_backbone.files import write_atomic, write_text_atomic
from moe_backbone.sites import Backbone
from policies.calibration import Calibration
from policies.linear_router import LinearRouter, RouterSpec, check_sites

FORMAT = 2
"""Format 1 had neither compensation nor calibration; it is still read."""
WEIGHTS, DESCRIPTION = "router.safetensors", "router.json"


def save_router(router: LinearRouter, folder: Path, backbone: Backbone) -> None:
    """Write both files, each whole or not at all, with the hash of the backbone they were trained on."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in router.state_dict().items()}
    write_atomic(folder / WEIGHTS, lambda path: save_file(weights, path))
    description = {"format": FORMAT, "backbone_sha256": backbone.sha256(), "router": router.spec.to_json()}
    if router.calibration is not None:
        description["calibration"] = router.calibration.to_json()
    write_text_atomic(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def load_router(folder: Path, backbone: Backbone) -> LinearRouter:
    """Read a router and check that it was made for this backbone.

    Raises:
        ValueError: If the files are missing, damaged, of another format, or made for another backbone.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        if description["format"] not in range(1, FORMAT + 1):
            raise ValueError(f"router format must lie in [1, {FORMAT}], got {description['format']} in {folder}")
        spec = RouterSpec.from_json(description["router"])
        made_for = str(description["backbone_sha256"])
        calibration = _read_calibration(description.get("calibration"))
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(
            f"router folder must hold readable {WEIGHTS} and {DESCRIPTION}, got {folder}: {error}"
        ) from None
    check_sites(spec, backbone.sites, backbone.hidden_size)
    if made_for != backbone.sha256():
        raise ValueError(
            f"router must be made for this backbone (sha256 {backbone.sha256()[:12]}), got one for {made_for[:12]}"
        )
    router = LinearRouter(spec)
    router.calibration = calibration
    try:
        router.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"router weights must fit {DESCRIPTION}, got {folder}: {error}".replace("\n", " ")) from None
    if not all(weight.isfinite().all() for weight in router.parameters()):
        raise ValueError(f"router weights must be finite, got NaN or infinity in {folder / WEIGHTS}")
    return router.requires_grad_(False)


def _read_calibration(data: dict[str, Any] | None) -> Calibration | None:
    return None if data is None else Calibration(tuple(data["prices"]), tuple(data["computes"]))

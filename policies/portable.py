"""A learned router as two files that load no code: `router.safetensors` and `router.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_backbone.checks import require
from moe_backbone.sites import Backbone, RoutingSite
from policies.calibration import Calibration
from policies.linear_router import LinearRouter, RouterSpec, check_sites
from policies.tied_files import DESCRIPTION, WEIGHTS, check_finite, check_made_for, read_files, write_files

__all__ = ["DESCRIPTION", "FORMAT", "WEIGHTS", "load_router", "read_sites", "save_router"]

FORMAT = 2
"""Format 1 had neither compensation nor calibration; it is still read."""


def save_router(router: LinearRouter, folder: Path, backbone: Backbone) -> None:
    """Write both files, each whole or not at all, with the hash of the backbone they were trained on."""
    made_for = {"backbone_sha256": backbone.sha256(), "backbone_name": backbone.name}
    description = {"format": FORMAT, **made_for, "router": router.spec.to_json()}
    if router.calibration is not None:
        description["calibration"] = router.calibration.to_json()
    write_files(folder, description, router.state_dict())


def load_router(folder: Path, backbone: Backbone) -> LinearRouter:
    """Read a router and check that it was made for this backbone.

    Raises:
        ValueError: If the files are missing, damaged, of another format, or made for another backbone.
    """

    def parse(description: dict[str, Any]) -> tuple[RouterSpec, tuple[str, str | None], Calibration | None]:
        made = description["format"]
        require(made in range(1, FORMAT + 1), f"router format must lie in [1, {FORMAT}], got {made} in {folder}")
        calibration = _read_calibration(description.get("calibration"))
        made_for = str(description["backbone_sha256"]), description.get("backbone_name")
        return RouterSpec.from_json(description["router"]), made_for, calibration

    (spec, made_for, calibration), weights = read_files(folder, parse)
    try:
        check_sites(spec, backbone.sites, backbone.hidden_size)
    except ValueError as error:
        raise ValueError(f"{error}; it was made for {made_for[1] or made_for[0][:12]}, not {backbone.name}") from None
    check_made_for(made_for[0], backbone, made_for[1])
    router = LinearRouter(spec)
    router.calibration = calibration
    try:
        router.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"router weights must fit {DESCRIPTION}, got {folder}: {error}".replace("\n", " ")) from None
    check_finite(router.parameters(), folder)
    return router.requires_grad_(False)


def read_sites(folder: Path) -> tuple[RoutingSite, ...]:
    """The sites that a router was made for.

    Raises:
        ValueError: If the files are missing or damaged.
    """
    return read_files(folder, lambda description: RouterSpec.from_json(description["router"]).sites)[0]


def _read_calibration(data: dict[str, Any] | None) -> Calibration | None:
    return None if data is None else Calibration(tuple(data["prices"]), tuple(data["computes"]))

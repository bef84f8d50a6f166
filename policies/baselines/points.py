"""One row of the evaluation table: a fixed router at one setting."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe_backbone.sites import Router


@dataclass(frozen=True)
class FixedPoint:
    """One row of the evaluation table."""

    name: str
    """Family of the router, such as `top-k`."""
    setting: dict[str, Any]
    """What tells it from others of its family: flat, JSON values."""
    router: Router


def described(name: str, router: Any) -> FixedPoint:
    """A point whose setting is the fields of the router, a dataclass of JSON values."""
    return FixedPoint(name, asdict(router), router)

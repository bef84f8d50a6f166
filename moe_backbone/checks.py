"""Refusals of what a user can get wrong: name, rule, actual value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def require(condition: bool, message: str) -> None:
    """Refuse with `message` unless `condition` holds.

    Raises:
        ValueError: If it does not.
    """
    if not condition:
        raise ValueError(message)


def require_at_least(config: object, least: int, *names: str) -> None:
    """Refuse settings below `least`.

    Raises:
        ValueError: Names the first that is.
    """
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{name} must be at least {least}, got {value}")


def require_fraction(config: object, *names: str) -> None:
    """Refuse settings outside [0, 1].

    Raises:
        ValueError: Names the first that is.
    """
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{name} must lie in [0, 1], got {value}")


def require_finite(values: Sequence[float], name: str, where: Callable[[int], str], remedy: str) -> None:
    """Refuse numbers of a training that has gone astray.

    Args:
        values: One for each step.
        name: What they are.
        where: Names the step of an index.
        remedy: What may help.

    Raises:
        ValueError: Says at which step it began, and that the last good checkpoint is kept.
    """
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(
                f"{name} must be finite, got {value} first at {where(index)}; "
                f"the last good checkpoint is kept: {remedy}"
            )


def require_price(name: str, value: float) -> None:
    """Refuse a price whose logarithm an observation cannot hold.

    Raises:
        ValueError: If it is not positive and finite in float32.
    """
    limits = torch.finfo(torch.float32)
    require(limits.tiny <= value <= limits.max, f"{name} must be positive and finite, got {value}")

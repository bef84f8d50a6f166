"""Checks an action while it is still numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import InvalidAction
from torch import Tensor


def action_tensor(action: Any, space: spaces.Space[Any], num_lanes: int, device: torch.device) -> Tensor:
    """Actions of all lanes as a tensor.

    Args:
        action: Array-like of shape (num_lanes, max_units) with entries 0 and 1, or (num_lanes,) counts.
        space: Action space of one lane.
        num_lanes: Rows expected.
        device: Where the tensor shall live.

    Returns:
        bool (num_lanes, max_units) or int64 (num_lanes,).

    Raises:
        InvalidAction: If shape or values do not fit.
    """
    array = np.asarray(action)
    if isinstance(space, spaces.MultiBinary):
        shape: tuple[int, ...] = (num_lanes, int(space.shape[0]))
        most = 1
    else:
        assert isinstance(space, spaces.Discrete)
        shape, most = (num_lanes,), int(space.n) - 1
    if array.shape != shape:
        raise InvalidAction(f"action must have shape {shape}, got {array.shape}")
    if array.dtype.kind not in "biuf" or not np.isin(array, np.arange(most + 1)).all():
        raise InvalidAction(f"action must hold whole numbers in [0, {most}], got {array.dtype} {array.flat[:4]}")
    return torch.as_tensor(array, device=device).to(torch.bool if most == 1 and array.ndim == 2 else torch.int64)

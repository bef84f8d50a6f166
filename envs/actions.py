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
        action: Array-like of shape (num_lanes, max_units) with entries 0 and 1, (num_lanes,) counts, or
            (num_lanes, ranked_units) with different units in each row.
        space: Action space of one lane.
        num_lanes: Rows expected.
        device: Where the tensor shall live.

    Returns:
        bool (num_lanes, max_units), or int64 (num_lanes,) or (num_lanes, ranked_units).

    Raises:
        InvalidAction: If shape or values do not fit.
    """
    array = np.asarray(action)
    shape = (num_lanes, *(space.shape or ()))
    if isinstance(space, spaces.MultiBinary):
        most = 1
    elif isinstance(space, spaces.MultiDiscrete):
        most = int(space.nvec[0]) - 1
    else:
        assert isinstance(space, spaces.Discrete)
        most = int(space.n) - 1
    if array.shape != shape:
        raise InvalidAction(f"action must have shape {shape}, got {array.shape}")
    if array.dtype.kind not in "biuf" or not np.isin(array, np.arange(most + 1)).all():
        raise InvalidAction(f"action must hold whole numbers in [0, {most}], got {array.dtype} {array.flat[:4]}")
    if isinstance(space, spaces.MultiDiscrete):
        level = (np.diff(np.sort(array, axis=1), axis=1) == 0).any(1)
        if level.any():
            raise InvalidAction(f"action must name different units in each lane, got {array[level][0]}")
    dtype = torch.bool if isinstance(space, spaces.MultiBinary) else torch.int64
    return torch.as_tensor(array, device=device).to(dtype)

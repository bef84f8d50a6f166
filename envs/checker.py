"""A checker for vector environments: Gymnasium's and SB3's take single ones only."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate

from moe_backbone.checks import require


def check_vector_env(env: VectorEnv[Any, Any, Any], *, num_steps: int = 32, seed: int = 0) -> None:
    """Walk twice from one seed and hold every result against the contract of `gymnasium.vector`.

    Both walks must give the same data, and every call new memory. The first actions are those at the bounds of the
    action space, the others are drawn. How an episode ends is checked for those that end within `num_steps`.

    Args:
        env: Its memory is new for each call; `copy=False` in Gymnasium's own classes breaks that on purpose.
        num_steps: Steps of a walk, at least 3 to pass the bounds.
        seed: Of environment and actions.

    Raises:
        ValueError: At the first broken rule; the message names it.
    """
    mode = env.metadata.get("autoreset_mode")
    require(isinstance(mode, AutoresetMode), f"metadata['autoreset_mode'] must be an AutoresetMode, got {mode!r}")
    for name in ("observation_space", "action_space"):
        expected = batch_space(getattr(env, f"single_{name}"), env.num_envs)
        actual = getattr(env, name)
        require(actual == expected, f"{name} must be {expected}, {env.num_envs} of the single one, got {actual}")
    walks = [_walk(env, mode, num_steps, seed) for _ in range(2)]
    _check_memory([result for walk in walks for result in walk])
    for call, (first, second) in enumerate(zip(*walks, strict=True)):
        same = data_equivalence(first, second, exact=True)
        require(same, f"results of seed {seed} must repeat, got others at call {call} (0 is reset)")


def _walk(env: VectorEnv[Any, Any, Any], mode: Any, num_steps: int, seed: int) -> list[tuple[Any, ...]]:
    """Results of reset and of every step."""
    env.action_space.seed(seed)
    results: list[tuple[Any, ...]] = [env.reset(seed=seed)]
    _check_observation(env, *results[0])
    before = np.zeros(env.num_envs, dtype=bool)
    bounds = _bounds(env.action_space)
    for step in range(num_steps):
        if mode == AutoresetMode.DISABLED and before.any():
            results.append(env.reset(options={"reset_mask": before}))
            _check_observation(env, *results[-1])
        actions = bounds[step] if step < len(bounds) else env.action_space.sample()
        given = deepcopy(actions)
        results.append(env.step(actions))
        require(data_equivalence(given, actions, exact=True), f"step must leave the actions as they are, got {actions}")
        before = _check_step(env, mode, results[-1], before)
    return results


def _bounds(space: spaces.Space[Any]) -> list[Any]:
    """Least and greatest actions of a batched space, where it has them."""
    if isinstance(space, spaces.Box) and space.is_bounded():
        return [space.low.copy(), space.high.copy()]
    if isinstance(space, spaces.MultiDiscrete):
        return [space.start.copy(), (space.start + space.nvec - 1).astype(space.dtype)]
    return []


def _check_observation(env: VectorEnv[Any, Any, Any], observation: Any, info: Any) -> None:
    require(env.observation_space.contains(observation), f"observation must lie in its space, got {observation}")
    require(isinstance(info, dict), f"info must be one dictionary, got {type(info).__name__}")
    _check_info(info, env.num_envs)


def _check_info(info: dict[str, Any], num_envs: int) -> None:
    """Arrays with a row a lane, or dictionaries of such; `_name` says which lanes have `name`, absent means all."""
    for name, value in info.items():
        if isinstance(value, dict):
            _check_info(value, num_envs)
            continue
        rows = isinstance(value, np.ndarray) and value.shape[:1] == (num_envs,)
        require(rows, f"info[{name!r}] must be an array of {num_envs} rows, got {value!r}")
        if name.startswith("_"):
            require(value.dtype == bool, f"info[{name!r}] must be a mask of bool, got {value.dtype}")


def _check_step(env: VectorEnv[Any, Any, Any], mode: Any, result: tuple[Any, ...], before: np.ndarray) -> np.ndarray:
    """Lanes that ended in this step; `before` those that ended in the last."""
    observation, reward, terminated, truncated, info = result
    _check_observation(env, observation, info)
    for name, value, kinds in (
        ("reward", reward, "fiu"),
        ("terminated", terminated, "b"),
        ("truncated", truncated, "b"),
    ):
        fits = isinstance(value, np.ndarray) and value.shape == (env.num_envs,) and value.dtype.kind in kinds
        require(fits, f"{name} must be an array of {env.num_envs} numbers of kind {kinds!r}, got {value!r}")
    require(bool(np.isfinite(reward).all()), f"reward must be finite, got {reward}")
    ended: np.ndarray = terminated | truncated
    if mode == AutoresetMode.SAME_STEP:
        _check_final_observation(env, info, ended)
    if mode == AutoresetMode.NEXT_STEP:
        idle = not ended[before].any() and not reward[before].any()
        require(idle, f"the step after an end must only reset (NEXT_STEP), got reward {reward}, ended {ended}")
    return ended


def _check_final_observation(env: VectorEnv[Any, Any, Any], info: dict[str, Any], ended: np.ndarray) -> None:
    """SAME_STEP hands out the end of the lanes that ended, and of no others."""
    mask = info.get("_final_obs", np.zeros(env.num_envs, dtype=bool))
    require(bool((mask == ended).all()), f"_final_obs must mark the lanes that ended (SAME_STEP), got {mask}")
    if not ended.any():
        return
    lanes = info["final_obs"]
    rows = lanes if isinstance(lanes, np.ndarray) else list(iterate(env.observation_space, lanes))
    inside = all(env.single_observation_space.contains(rows[lane]) for lane in np.flatnonzero(ended))
    require(inside, f"final_obs must lie in the single observation space, got {lanes}")


def _check_memory(results: list[tuple[Any, ...]]) -> None:
    seen: list[np.ndarray] = []
    for call, result in enumerate(results):
        arrays = _arrays(result)
        shared = any(np.may_share_memory(old, new) for old in seen for new in arrays)
        require(not shared, f"results must be new memory at each call, got memory of an earlier one at call {call}")
        seen += arrays


def _arrays(value: Any) -> list[np.ndarray]:
    """All arrays inside nested results."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    nested = isinstance(value, list | tuple | np.ndarray)
    return [array for item in value for array in _arrays(item)] if nested else []

"""The checker of vector environments passes sound ones and finds planted faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import InvalidAction
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs import EnvConfig, RoutingEnv, RoutingVectorEnv, TokenSource
from envs.checker import check_vector_env
from moe_backbone import MoETransformer

LANES = 16


@pytest.mark.parametrize("action", ["subset", "count"])
def test_the_vector_door_passes(
    make_vector: Callable[..., RoutingVectorEnv], action: Literal["subset", "count"]
) -> None:
    """Both codecs, over eight episodes."""
    check_vector_env(make_vector(EnvConfig(action=action)))


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=str)
def test_gymnasiums_own_vector_environment_passes(make_env: Callable[..., RoutingEnv], mode: AutoresetMode) -> None:
    """Single doors side by side, under each way to start again: the checker asks no more than Gymnasium keeps."""
    check_vector_env(SyncVectorEnv([make_env, make_env], autoreset_mode=mode))


class _Planted(RoutingVectorEnv):
    """A sound environment but for one fault."""

    def __init__(self, fault: str, backbone: MoETransformer, source: TokenSource) -> None:
        super().__init__(LANES, backbone, source)
        self.fault = fault

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        if self.fault == "seed ignored":
            kwargs["seed"] = None
        if self.fault == "one buffer":
            self.buffer = np.zeros((LANES, self.mdp.layout.size), dtype=np.float32)
        return super().reset(**kwargs)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        if self.fault == "greatest action refused" and (actions == 1).all():
            raise InvalidAction("action must hold a zero")
        observation, reward, terminated, truncated, info = super().step(actions)
        if self.fault == "actions changed":
            actions[0] = 1 - actions[0]
        if self.fault == "one buffer":
            self.buffer[:] = observation
            observation = self.buffer
        if self.fault == "outside the space":
            observation[0, 0] = np.inf
        if self.fault == "no end handed out":
            info.pop("_final_obs", None)
        if self.fault == "list of infos":
            info = [{"cost": cost} for cost in info.get("cost", [])]  # type: ignore[assignment]
        if self.fault == "info of one lane":
            info["cost"] = np.zeros(1)
        if self.fault == "mask of numbers":
            info["_cost"] = np.ones(LANES)
        if self.fault == "reward not finite":
            reward[0] = np.nan
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("seed ignored", "results of seed 0 must repeat, got others at call 0"),
        ("one buffer", "results must be new memory at each call"),
        ("outside the space", "observation must lie in its space"),
        ("no end handed out", "_final_obs must mark the lanes that ended"),
        ("list of infos", "info must be one dictionary, got list"),
        ("info of one lane", r"info\['cost'\] must be an array of 16 rows"),
        ("mask of numbers", r"info\['_cost'\] must be a mask of bool, got float64"),
        ("reward not finite", "reward must be finite"),
        ("actions changed", "step must leave the actions as they are"),
    ],
    ids=lambda value: value if " must" not in value else "",
)
def test_planted_faults_are_found(backbone: MoETransformer, source: TokenSource, fault: str, message: str) -> None:
    """Each fault alone, by the rule that it breaks."""
    with pytest.raises(ValueError, match=message):
        check_vector_env(_Planted(fault, backbone, source))


def test_an_action_at_the_bounds_is_tried(backbone: MoETransformer, source: TokenSource) -> None:
    """All units at once would hardly be drawn by chance."""
    with pytest.raises(InvalidAction, match="must hold a zero"):
        check_vector_env(_Planted("greatest action refused", backbone, source))


@pytest.mark.parametrize("claim", [AutoresetMode.NEXT_STEP, None], ids=str)
def test_a_wrong_claim_about_restarts_is_found(
    make_vector: Callable[..., RoutingVectorEnv], claim: AutoresetMode | None
) -> None:
    """The step after an end pays rewards here, so it is no mere reset; no claim at all is refused too."""
    env = make_vector()
    env.metadata = {"autoreset_mode": claim}
    with pytest.raises(ValueError, match="must only reset" if claim else "must be an AutoresetMode, got None"):
        check_vector_env(env)


def test_spaces_that_are_no_batch_are_found(make_vector: Callable[..., RoutingVectorEnv]) -> None:
    """The space of all lanes is that of one lane, as often as there are lanes."""
    env = make_vector()
    env.action_space = gym.spaces.MultiBinary((LANES, 4))
    with pytest.raises(ValueError, match="action_space must be Box"):
        check_vector_env(env)

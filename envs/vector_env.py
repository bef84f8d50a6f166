"""The gymnasium.vector door: all tokens of all sequences at once, site by site."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.actions import action_tensor
from envs.config import EnvConfig
from envs.mdp import RoutingMDP
from envs.routing_env import default_parts, draw_with, step_info
from envs.token_source import TokenSource
from moe_backbone import Backbone


def sequences_for(num_envs: int, seq_len: int, rollouts_per_sequence: int) -> int:
    """Different sequences that fill `num_envs` lanes.

    Raises:
        ValueError: If they do not fill them exactly.
    """
    lanes = seq_len * rollouts_per_sequence
    if num_envs < 1 or num_envs % lanes:
        raise ValueError(
            f"num_envs must be a positive multiple of seq_len * rollouts_per_sequence={lanes} (one lane a token), "
            f"got {num_envs}"
        )
    return num_envs // lanes


class RoutingVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """The same MDP as `RoutingEnv`; lane `s * seq_len + t` is token `t` of sequence `s`.

    All lanes end together at the last site and start again in the same step: `final_obs` and `final_info` hold the
    end of the old episode. Copies of one sequence (`rollouts_per_sequence`) lie next to each other.

    Args:
        num_envs: Lanes; a multiple of `seq_len * rollouts_per_sequence`.
        backbone: See `RoutingEnv`.
        source: See `RoutingEnv`.
        config: Rules.
        render_mode: Must be None; lanes are drawn by `RoutingEnv`.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int = 512,
        backbone: Backbone | None = None,
        source: TokenSource | None = None,
        config: EnvConfig | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None:
            raise ValueError(f"render_mode must be None for the vector environment, got {render_mode!r}")
        backbone, source = default_parts(backbone, source)
        config = config or EnvConfig()
        num_sequences = sequences_for(num_envs, source.seq_len, config.rollouts_per_sequence)
        self.mdp = RoutingMDP(backbone, source, config, num_sequences=num_sequences)
        self.num_envs = num_envs
        self.render_mode = None
        self.single_observation_space = self.mdp.observation_space
        self.single_action_space = self.mdp.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw new sequences; `options` takes `price`, and `tokens` with `targets`, see `draw_with`."""
        super().reset(seed=seed)
        observation = self.mdp.begin(draw_with(self.mdp, self.np_random, options or {}))
        self._running = True
        return observation.cpu().numpy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Run the current site for all lanes.

        Raises:
            ResetNeeded: Before the first reset.
            InvalidAction: If shape or values do not fit the action space.
        """
        if not self._running:
            raise ResetNeeded("reset must be called before the first step")
        step = self.mdp.step(action_tensor(actions, self.single_action_space, self.num_envs, self.mdp.device))
        info: dict[str, Any] = dict(step_info(step, self.mdp.price))
        observation = step.observation
        everyone = np.ones(self.num_envs, dtype=bool)
        if step.terminated:
            info = {"final_obs": observation.cpu().numpy(), "final_info": info, "_final_obs": everyone}
            info["_final_info"] = everyone.copy()
            observation = self.mdp.reset(self.np_random)
        terminated = np.full(self.num_envs, step.terminated)
        truncated = np.zeros(self.num_envs, dtype=bool)
        return observation.cpu().numpy(), step.reward.cpu().numpy(), terminated, truncated, info

"""The Stable-Baselines3 door: tensors inside, numpy at the face."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from envs.actions import action_tensor
from envs.config import EnvConfig
from envs.mdp import RoutingMDP, Step, TokenBatch
from envs.routing_env import default_parts, step_info
from envs.token_source import TokenSource
from envs.vector_env import sequences_for
from moe_backbone import Backbone


class RoutingVecEnv(VecEnv):
    """The same MDP as `RoutingVectorEnv`, for any SB3 algorithm.

    `reset_tensor` and `step_tensor` are the face without numpy (`policies.tensor_rollouts.TensorEnv`).

    Args:
        num_envs: Lanes; a multiple of `seq_len * rollouts_per_sequence`.
        backbone: See `RoutingEnv`.
        source: See `RoutingEnv`.
        config: Rules.
        seed: Of sequences and prices.
    """

    def __init__(
        self,
        num_envs: int = 512,
        backbone: Backbone | None = None,
        source: TokenSource | None = None,
        config: EnvConfig | None = None,
        seed: int = 0,
    ) -> None:
        backbone, source = default_parts(backbone, source)
        config = config or EnvConfig()
        num_sequences = sequences_for(num_envs, source.seq_len, config.rollouts_per_sequence)
        self.mdp = RoutingMDP(backbone, source, config, num_sequences=num_sequences)
        self.generator = np.random.default_rng(seed)
        self.render_mode: str | None = None
        super().__init__(num_envs, self.mdp.observation_space, self.mdp.action_space)
        self._returns = torch.zeros(num_envs, device=self.mdp.device)
        self._running = False

    @property
    def num_sites(self) -> int:
        """Steps of an episode."""
        return len(self.mdp.backbone.sites)

    def reset_tensor(self, lanes: Tensor | None = None) -> Tensor:
        """Draw new sequences: observations (num_envs, size), float32.

        Raises:
            ValueError: If only some lanes shall restart; they end together.
        """
        if lanes is not None:
            raise ValueError("lanes must be None, as all lanes start together, got a tensor")
        return self.begin_tensor(self.draw_batch())

    def draw_batch(self) -> TokenBatch:
        """Draw the sequences and prices of an episode: the part of a reset that the host takes part in."""
        return self.mdp.draw(self.generator)

    def begin_tensor(self, batch: TokenBatch) -> Tensor:
        """Stand before the first site of an episode: observations (num_envs, size), float32."""
        self._returns = torch.zeros_like(self._returns)
        self._running = True
        return self.mdp.begin(batch)

    def step_tensor(self, actions: Tensor) -> Step:
        """Run the current site; at the last one the observation returned is that of the end, and nothing restarts.

        Args:
            actions: bool or of zeros and ones (num_envs, max_units); int64 (num_envs,) for the count codec,
                (num_envs, ranked_units) for the ranked one, where nothing checks that the units differ.

        Raises:
            ResetNeeded: Before the first reset and after the last site.
        """
        if not self._running:
            raise ResetNeeded("reset must be called before step: before the first episode and after each last site")
        step = self.mdp.step(actions.bool() if isinstance(self.action_space, spaces.MultiBinary) else actions)
        self._running = not step.terminated
        self._returns = self._returns + step.reward
        return step

    def reset(self) -> np.ndarray:
        """Draw new sequences: observations (num_envs, size), float32."""
        if self._seeds[0] is not None:
            self.generator = np.random.default_rng(self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        return self.reset_tensor().cpu().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = action_tensor(actions, self.action_space, self.num_envs, self.mdp.device)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Run the current site; after the last one all lanes start again in the same step."""
        step = self.step_tensor(self._actions)
        infos = self._infos(step)
        observation = step.observation
        if step.terminated:
            observation = self.reset_tensor()
        dones = np.full(self.num_envs, step.terminated)
        return observation.cpu().numpy(), step.reward.cpu().numpy(), dones, infos

    def _infos(self, step: Step) -> list[dict[str, Any]]:
        """Full only at the end of an episode: thousands of lanes make dictionaries the dearest part of a step."""
        if not step.terminated:
            return [{} for _ in range(self.num_envs)]
        arrays = step_info(step, self.mdp.price)
        returns, terminal = self._returns.cpu().numpy(), step.observation.cpu().numpy()
        return [
            {name: values[lane] for name, values in arrays.items()}
            | {"terminal_observation": terminal[lane], "episode": {"r": float(returns[lane]), "l": self.num_sites}}
            for lane in range(self.num_envs)
        ]

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, once for every lane asked for."""
        return [getattr(self, attr_name)] * len(self._lanes(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set the attribute; lanes share it."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call the method once; its result stands for every lane asked for."""
        return [getattr(self, method_name)(*args, **kwargs)] * len(self._lanes(indices))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """No lane is wrapped."""
        return [False] * len(self._lanes(indices))

    def _lanes(self, indices: int | Iterable[int] | None) -> list[int]:
        return list(self._get_indices(indices))

"""A batched environment that costs next to nothing, with a numpy face and a tensor face that do the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor


class LaneStep(NamedTuple):
    """Outcome of one step, see `policies.tensor_rollouts.LaneStep`."""

    observation: Tensor
    reward: Tensor
    terminated: Tensor | bool
    truncated: Tensor | bool


class TrivialVecEnv(VecEnv):
    """Observes rows of a fixed random table; the reward is the action's mean times the first column.

    Args:
        num_envs: Lanes.
        size: Length of an observation.
        action_space: Any space of SB3's PPO; `MultiBinary(8)` if None.
        length: Steps of an episode.
        stagger: Lane `i` runs `i % stagger` steps longer, so that lanes end at different times.
        truncate: Whether an episode is cut off at its end, or over.
        device: Where the tensors live.
    """

    def __init__(
        self,
        num_envs: int = 1024,
        size: int = 64,
        action_space: spaces.Space[Any] | None = None,
        *,
        length: int = 8,
        stagger: int = 1,
        truncate: bool = False,
        device: str = "cpu",
    ) -> None:
        table = torch.randn(4 * num_envs, size, generator=torch.Generator().manual_seed(0))
        self.table = table.clamp(-4, 4).to(device)
        self.lengths = length + torch.arange(num_envs, device=device) % stagger
        self.stagger, self.truncate, self.length = stagger, truncate, length
        self.clock, self.age = 0, torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.render_mode: str | None = None
        super().__init__(num_envs, spaces.Box(-4.0, 4.0, (size,), np.float32), action_space or spaces.MultiBinary(8))

    def _look(self) -> Tensor:
        first = 7 * self.clock % (3 * self.num_envs)
        return self.table[first : first + self.num_envs]

    def reset_tensor(self, lanes: Tensor | None = None) -> Tensor:
        """Start new episodes everywhere or in some lanes: observations (num_envs, size), float32."""
        self.age = torch.zeros_like(self.age) if lanes is None else self.age.masked_fill(lanes, 0)
        observation = self._look()
        return observation if lanes is None else observation - 0.5 * lanes.unsqueeze(1)

    def step_tensor(self, actions: Tensor) -> LaneStep:
        """One step of every lane; nothing restarts."""
        reward = self._look()[:, 0] * (actions.reshape(self.num_envs, -1).float().mean(1) - 0.4)
        self.clock += 1
        self.age = self.age + 1
        ended: Tensor | bool = self.age >= self.lengths
        if self.stagger == 1:  # all lanes alike, so the host can know
            ended = self.clock % self.length == 0
        return LaneStep(self._look(), reward, *((False, ended) if self.truncate else (ended, False)))

    def reset(self) -> np.ndarray:
        """Start new episodes everywhere."""
        self.clock = 0
        self._returns = np.zeros(self.num_envs, dtype=np.float32)
        return self.reset_tensor().cpu().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = torch.as_tensor(actions, device=self.table.device)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """One step of every lane; those that ended start again, as SB3 wants it."""
        step = self.step_tensor(self._actions)
        reward = step.reward.cpu().numpy()
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = step.truncated if self.truncate else step.terminated
        dones = np.full(self.num_envs, ended) if isinstance(ended, bool) else ended.cpu().numpy()
        self._returns = self._returns + reward
        terminal = step.observation.cpu().numpy()
        if not dones.any():
            return terminal, reward, dones, infos
        ages = self.age.cpu().numpy()
        for lane in dones.nonzero()[0]:
            episode = {"r": float(self._returns[lane]), "l": int(ages[lane]), "t": 0.0}
            ending = {"terminal_observation": terminal[lane], "TimeLimit.truncated": self.truncate}
            infos[lane] = ending | {"episode": episode}
        self._returns = self._returns * ~dones
        return self.reset_tensor(ended if isinstance(ended, Tensor) else None).cpu().numpy(), reward, dones, infos

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, once for every lane; lanes share it."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set the attribute for all lanes."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call the method once for all lanes."""
        return [getattr(self, method_name)(*args, **kwargs)] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """No lane is wrapped."""
        return [False] * len(list(self._get_indices(indices)))

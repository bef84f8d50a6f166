"""What a rollout that stays on the device is made of: the environment's tensor face, a buffer, episode figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, overload

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

Flag = Tensor | bool
"""bool (num_envs,), or one bool for all lanes where the host knows it without asking the device."""


class LaneStep(Protocol):
    """Outcome of one step for all lanes."""

    @property
    def observation(self) -> Tensor:
        """(num_envs, ...), float32; where a lane ended, of its end."""

    @property
    def reward(self) -> Tensor:
        """(num_envs,), float32."""

    @property
    def terminated(self) -> Flag:
        """Lanes whose episode is over."""

    @property
    def truncated(self) -> Flag:
        """Lanes whose episode was cut off, and would have gone on."""


class TensorEnv(Protocol):
    """The face without numpy that a `VecEnv` may have beside its own; lanes that ended wait to be restarted."""

    num_envs: int

    def reset_tensor(self, lanes: Tensor | None = None) -> Tensor:
        """Start new episodes, in all lanes or where `lanes`, bool (num_envs,), says so: observations of all lanes."""
        ...

    def step_tensor(self, actions: Tensor) -> LaneStep:
        """One step of every lane; actions as the policy gives them, Box actions clipped to the space."""
        ...


def has_tensor_face(env: VecEnv | None) -> bool:
    """Whether the environment itself speaks tensors: not one inside a wrapper, or that a subclass changes in numpy."""
    kinds = type(env).__mro__
    tensor, reset, stock = (
        next((place for place, kind in enumerate(kinds) if name in vars(kind)), None)
        for name in ("step_tensor", "reset_tensor", "step_wait")
    )
    return tensor is not None and reset is not None and (stock is None or tensor <= stock)


def either(one: Flag, other: Flag) -> Flag:
    """Where one of two flags is up."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one | other
    if isinstance(one, bool) and isinstance(other, bool):
        return one or other
    known, tensor = (one, other) if isinstance(one, bool) else (other, one)
    return True if known else tensor


def restart(env: TensorEnv, observation: Tensor, ended: Flag) -> Tensor:
    """Observations with new episodes in the lanes that ended."""
    if isinstance(ended, bool):
        return env.reset_tensor() if ended else observation
    return env.reset_tensor(ended)


class TensorRollout:
    """Transitions of one update, and what SB3's `RolloutBuffer` computes from them, to the bit.

    Args:
        shape: (num_steps, num_envs).
        observation_space: `Box`.
        action_space: Any that SB3's PPO takes.
        device: Of the policy.

    Attributes:
        observations: (num_steps, num_envs, ...), dtype of the space.
        actions: (num_steps, num_envs, ...), as the policy gave them.
        values: Critic's estimates (num_steps, num_envs), float32; likewise log_probs, advantages and returns.
        rewards: As the environment gave them, float32.
        bootstrap: Discounted value of what a truncation cut off, float32.
        episodes: Return so far, length so far, and 1 where the episode ended (num_steps, 3, num_envs), float32.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        observation_space: spaces.Box,
        action_space: spaces.Space[Any],
        device: torch.device,
    ) -> None:
        num_steps, num_envs = self.shape = shape
        dtype = torch.from_numpy(np.empty(0, observation_space.dtype)).dtype
        self.observations = torch.zeros(*shape, *observation_space.shape, dtype=dtype, device=device)
        self.actions = torch.zeros(*shape, 0, device=device)
        self.scalars = torch.zeros(4, *shape, device=device)
        self.values, self.log_probs, self.advantages, self.returns = self.scalars
        self.rewards, self.bootstrap = torch.zeros(2, *shape, device=device)
        self.episodes = torch.zeros(num_steps, 3, num_envs, device=device)
        self.running = torch.zeros(2, num_envs, device=device)
        # SB3 counts transitions lane after lane, tensors lie step after step.
        self.place = torch.arange(num_steps * num_envs, device=device).view(shape).t().reshape(-1)
        self.bounds: tuple[Tensor, Tensor] | None = None
        if isinstance(action_space, spaces.Box):
            low, high = torch.as_tensor(np.stack((action_space.low, action_space.high)), device=device)
            self.bounds = (low, high)

    def legal(self, actions: Tensor) -> Tensor:
        """Box actions clipped, as Gaussian samples may lie outside; others as they are."""
        return actions if self.bounds is None else torch.clamp(actions, *self.bounds)

    def add(self, step: int, observation: Tensor, actions: Tensor, values: Tensor, log_probs: Tensor) -> None:
        """Keep what the policy saw and did."""
        if self.actions.shape[2:] != actions.shape[1:] or self.actions.dtype != actions.dtype:
            self.actions = actions.new_zeros(*self.shape, *actions.shape[1:])
        self.observations[step] = observation
        self.actions[step] = actions
        self.values[step] = values.flatten()
        self.log_probs[step] = log_probs

    def add_outcome(self, step: int, reward: Tensor, ended: Flag) -> None:
        """Keep what the environment answered, and count episodes."""
        episodes = self.episodes[step]
        self.rewards[step] = reward
        episodes[2] = ended
        torch.add(self.running[0], reward, out=episodes[0])
        torch.add(self.running[1], 1, out=episodes[1])
        if isinstance(ended, bool):
            self.running = torch.zeros_like(self.running) if ended else episodes[:2]
        else:
            self.running = episodes[:2].masked_fill(ended, 0.0)

    def close(self, last_values: Tensor, gamma: float, gae_lambda: float) -> None:
        """Advantages and returns (arXiv:1506.02438), in the order of operations of SB3.

        Args:
            last_values: Of the observation after the last step (num_envs,); does not count where a lane ended.
            gamma: Discount.
            gae_lambda: Discount of longer estimates.
        """
        going_on = 1.0 - self.episodes[:, 2]
        next_values = torch.cat((self.values[1:], last_values.view(1, -1)))
        deltas = self.rewards + self.bootstrap + gamma * next_values * going_on - self.values
        discounts = gamma * gae_lambda * going_on
        self.advantages[-1] = deltas[-1]
        for step in reversed(range(len(deltas) - 1)):
            self.advantages[step] = deltas[step] + discounts[step] * self.advantages[step + 1]
        torch.add(self.advantages, self.values, out=self.returns)

    def minibatches(self, batch_size: int) -> Iterator[RolloutBufferSamples]:
        """Every transition once, in the order that SB3 draws from NumPy's global generator."""
        order = torch.from_numpy(np.random.permutation(len(self.place)))
        if self.place.is_cuda:  # from pinned memory the host need not wait for the copy
            order = order.pin_memory().to(self.place.device, non_blocking=True)
        observations, actions = self.observations.flatten(0, 1), self.actions.flatten(0, 1)
        for rows in self.place[order].split(batch_size):
            values, log_probs, advantages, returns = self.scalars.flatten(1).index_select(1, rows)
            seen, done = observations.index_select(0, rows), actions.index_select(0, rows)
            yield RolloutBufferSamples(seen, done, values, log_probs, advantages, returns)

    def finished_episodes(self, most: int) -> list[tuple[float, int]]:
        """Return and length of the `most` episodes that ended last, in the order in which they ended; one read."""
        returns, lengths, ended = self.episodes.transpose(0, 1).flatten(1).cpu().numpy()
        last = ended.nonzero()[0][-most:]
        return [(float(returns[index]), int(lengths[index])) for index in last]


class LazyInfos(Sequence[dict[str, Any]]):
    """SB3's list of info dictionaries, each built only when a callback asks for it.

    Args:
        step: What the environment answered.
        episodes: Of the same step, see `TensorRollout` (3, num_envs).
    """

    def __init__(self, step: LaneStep, episodes: Tensor) -> None:
        self.step, self.episodes = step, episodes

    def __len__(self) -> int:
        return self.episodes.shape[1]

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[lane] for lane in range(*index.indices(len(self)))]
        returned, length, ended = self.episodes[:, index].tolist()
        if not ended:
            return {}
        terminated = self.step.terminated
        return {
            "terminal_observation": self.step.observation[index].cpu().numpy(),
            "TimeLimit.truncated": not (terminated if isinstance(terminated, bool) else bool(terminated[index])),
            "episode": {"r": returned, "l": int(length), "t": 0.0},
        }

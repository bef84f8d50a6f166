"""SB3's PPO with tensors from environment to update: the same weights to the bit, without the way through numpy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional as F

from moe_backbone.precision import Precision, autocast
from policies.lean_adam import LeanAdam
from policies.tensor_rollouts import Flag, LaneStep, LazyInfos, TensorRollout, either, has_tensor_face, restart


@contextmanager
def unvalidated() -> Iterator[None]:
    """Distributions do not check their arguments meanwhile: each check reads the device."""
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)


FIGURES = ("approx_kl", "clip_fraction", "policy_gradient_loss", "value_loss", "entropy_loss", "loss")
"""Scalars of one minibatch, under SB3's names."""


class TensorPPO(PPO):
    """PPO (arXiv:1707.06347) as SB3 has it, for environments with a tensor face (`TensorEnv`).

    Weights and logged scalars of one `learn` equal stock `PPO` to the bit on the CPU, but for the value of a truncated
    episode's end: it comes from one call for all lanes instead of one a lane, and a product of many rows may round
    otherwise.
    `infos` of callbacks is lazy; `rewards`, `dones` and the like are tensors. An environment without the face, wrapped,
    or with other than `Box` observations takes SB3's own way, and so does state-dependent exploration.

    Attributes:
        precision: Of the forward passes of environment and policy, and of the gradients; `fp16` needs a loss scaler,
            which is not here.
    """

    precision: Precision = "fp32"
    _rollout: TensorRollout | None = None
    _ended: Flag = False

    def _excluded_save_params(self) -> list[str]:
        unsaved = ["_rollout", "_ended", "_last_obs", "_last_episode_starts"]
        return [*super()._excluded_save_params(), *unsaved]

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ActorCriticPolicy") -> None:
        """SB3's advice holds for rollouts that pass through numpy."""
        if not has_tensor_face(self.env):
            super()._maybe_recommend_cpu(mlp_class_name)

    def _stays_on_device(self, env: VecEnv) -> bool:
        return has_tensor_face(env) and isinstance(self.observation_space, spaces.Box) and not self.use_sde

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Take `n_rollout_steps` in every lane; False if a callback asks to stop."""
        if not self._stays_on_device(env):
            self._rollout = None
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        self.policy.set_training_mode(False)
        rollout = self._rollout = self._fresh_rollout((n_rollout_steps, env.num_envs))
        callback.on_rollout_start()
        for n_steps in range(n_rollout_steps):
            with self._lowered():
                observation = self._last_obs = restart(env, self._last_obs, self._ended)  # type: ignore[arg-type, assignment]
            actions, values, log_probs = self._act(observation)
            rollout.add(n_steps, observation, actions, values, log_probs)
            with self._lowered():
                step: LaneStep = env.step_tensor(rollout.legal(actions))  # type: ignore[attr-defined]
            dones = either(step.terminated, step.truncated)
            rollout.add_outcome(n_steps, step.reward, dones)
            self._add_bootstrap(rollout.bootstrap[n_steps], step)
            self.num_timesteps += env.num_envs
            new_obs, rewards, infos = step.observation, step.reward, LazyInfos(step, rollout.episodes[n_steps])
            self._last_obs, self._ended = new_obs, dones  # type: ignore[assignment]
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        rollout.close(self._values(new_obs), self.gamma, self.gae_lambda)
        self._keep_episodes(rollout)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _fresh_rollout(self, shape: tuple[int, int]) -> TensorRollout:
        """The buffer for one more rollout, and SB3's first observation as a tensor."""
        assert isinstance(self.observation_space, spaces.Box)
        rollout = self._rollout
        if rollout is None or rollout.shape != shape:
            rollout = TensorRollout(shape, self.observation_space, self.action_space, self.device)
        if isinstance(self._last_obs, np.ndarray):  # `learn` has reset the environment
            self._last_obs = torch.as_tensor(self._last_obs, device=self.device)  # type: ignore[assignment]
            self._ended = False
            rollout.running = torch.zeros_like(rollout.running)
        rollout.bootstrap.zero_()
        return rollout

    def _lowered(self) -> AbstractContextManager[object]:
        """Forward passes run in the wanted precision meanwhile."""
        return autocast(self.precision, self.device)

    @torch.no_grad()
    def _act(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with unvalidated(), self._lowered():
            return self.policy(observation)

    @torch.no_grad()
    def _values(self, observation: Tensor) -> Tensor:
        with self._lowered():
            return self.policy.predict_values(observation).flatten().float()

    def _add_bootstrap(self, bootstrap: Tensor, step: LaneStep) -> None:
        """What a cut off episode would still have earned, in one call for all lanes."""
        truncated = step.truncated
        if isinstance(truncated, Tensor) and truncated.device.type == "cpu" and not truncated.any():
            truncated = False
        if truncated is not False:
            values = self.gamma * self._values(step.observation)
            bootstrap.copy_(values if truncated is True else values.where(truncated, 0.0))

    def _keep_episodes(self, rollout: TensorRollout) -> None:
        """Give SB3's logger the last episodes, in one read."""
        episodes = self.ep_info_buffer
        assert episodes is not None
        elapsed = round((time.time_ns() - self.start_time) / 1e9, 6)
        finished = rollout.finished_episodes(self._stats_window_size)
        episodes.extend({"r": returned, "l": length, "t": elapsed} for returned, length in finished)

    def train(self) -> None:
        """Update the policy with the rollout collected last; figures are read from the device once, at the end."""
        if self._rollout is None:
            return super().train()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        descent = LeanAdam(self.policy.optimizer, list(self.policy.parameters()), self.max_grad_norm)
        epochs = []
        for _ in range(self.n_epochs):
            with unvalidated():
                figures, goes_on = self._epoch(self._rollout, descent)
            epochs.append(figures)
            self._n_updates += 1
            if not goes_on:
                break
        self._log_training(self._rollout, epochs)
        return None

    def _epoch(self, rollout: TensorRollout, descent: LeanAdam) -> tuple[list[Tensor], bool]:
        """Update by every minibatch: the figures of each, and False if the policy has moved too far."""
        figures: list[Tensor] = []
        for batch in rollout.minibatches(self.batch_size):
            loss, numbers = self._batch_loss(batch)
            figures.append(numbers)
            if self.target_kl is not None and numbers[0].cpu().numpy() > 1.5 * self.target_kl:
                if self.verbose >= 1:
                    print(f"Early stopping due to reaching max kl: {numbers[0]:.2f}")
                return figures, False
            descent.zero_grad()
            loss.backward()
            descent.step()
        return figures, True

    def _batch_loss(self, batch: RolloutBufferSamples) -> tuple[Tensor, Tensor]:
        """SB3's loss in SB3's order of operations, and what `FIGURES` names."""
        clip, clip_values = self._clips()
        with self._lowered():
            values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, batch.actions)
        values, advantages = values.flatten().float(), batch.advantages
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_ratio = log_prob - batch.old_log_prob
        ratio = log_ratio.exp()
        policy_loss = -torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
        if clip_values is not None:
            values = batch.old_values + (values - batch.old_values).clamp(-clip_values, clip_values)
        value_loss = F.mse_loss(batch.returns, values)
        entropy_loss = -torch.mean(-log_prob) if entropy is None else -torch.mean(entropy)
        # Nothing is taken back through an entropy that weighs nothing.
        weighed = policy_loss + self.ent_coef * entropy_loss if self.ent_coef else policy_loss
        loss = weighed + self.vf_coef * value_loss
        with torch.no_grad():
            divergence = ((ratio - 1) - log_ratio).mean()
            clipped = ((ratio - 1).abs() > clip).float().mean()
            figures = torch.stack((divergence, clipped, policy_loss, value_loss, entropy_loss, loss))
        return loss, figures

    def _clips(self) -> tuple[float, float | None]:
        remaining = self._current_progress_remaining
        clip_values = None if self.clip_range_vf is None else self.clip_range_vf(remaining)  # type: ignore[operator]
        return self.clip_range(remaining), clip_values  # type: ignore[operator]

    def _log_training(self, rollout: TensorRollout, epochs: list[list[Tensor]]) -> None:
        """SB3's scalars, all read at once."""
        figures = torch.stack([numbers for epoch in epochs for numbers in epoch])
        kept = (figures.flatten(), rollout.values.t().flatten(), rollout.returns.t().flatten())
        read = torch.cat(kept).cpu().numpy()
        numbers, values, returns = np.split(read, np.cumsum([len(part) for part in kept[:2]]))
        numbers = np.ascontiguousarray(numbers.reshape(-1, len(FIGURES)).T)
        for name, row in zip(FIGURES, numbers, strict=True):
            self.logger.record(f"train/{name}", np.mean(row.astype(np.float64)))
        self.logger.record("train/approx_kl", np.mean(numbers[0, -len(epochs[-1]) :]))
        self.logger.record("train/loss", float(numbers[-1, -1]))
        self.logger.record("train/explained_variance", explained_variance(values, returns))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", torch.exp(self.policy.log_std).mean().item())
        clip, clip_values = self._clips()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip)
        if clip_values is not None:
            self.logger.record("train/clip_range_vf", clip_values)

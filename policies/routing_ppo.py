"""SB3's PPO with leave-one-out advantages over groups of rollouts of the same tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn import functional as F

from policies.router_policy import RouterPolicy


class _Step(Protocol):
    observation: Tensor
    reward: Tensor
    quality: Tensor


class Episode(NamedTuple):
    """Rollouts of one update; every tensor is (num_sites, num_lanes, ...)."""

    inputs: Tensor
    priors: Tensor
    log_price: Tensor
    actions: Tensor
    """bool (num_sites, num_lanes, max_units)."""
    log_probs: Tensor
    """Of the actions when they were taken (num_sites, num_lanes), nats."""
    advantages: Tensor
    """Without the cost of the site's own units (num_sites, num_lanes), nats."""
    unit_price: Tensor
    """What one unit costs (num_sites, num_lanes), nats."""
    weight: Tensor
    """How much a lane counts (num_sites, num_lanes)."""


class RoutingPPO(PPO):
    """PPO (arXiv:1707.06347) whose advantage compares rollouts of the same tokens.

    With `advantage="leave_one_out"` an update runs whole episodes of the environment's groups. The advantage of a
    lane at a site is its return to go minus the mean of the other rollouts of the same token (arXiv:1803.08475); no
    critic is trained and gamma is 1. Costs enter as expectations under the policy, not as sampled: those of later
    sites in the return, that of the site itself as a differentiable term of the loss. That leaves the gradient's
    mean as it is and takes noise out of it. Tensors stay where the environment has them. With `advantage="gae"`
    everything is SB3's own.

    Args:
        policy: `RouterPolicy`, or for `gae` any SB3 policy.
        env: `RoutingVecEnv`; for `leave_one_out` with at least two rollouts a sequence.
        advantage: See above.
        batch_size: Transitions of a minibatch; whole lanes with all their sites.
        price_balance: Lanes count in proportion to `price ** -price_balance`; without it high prices, whose returns
            vary most, would drown the low ones.
        **kwargs: SB3's arguments of PPO. Defaults that differ: n_steps = sites of the environment, n_epochs 3,
            gamma 1, gae_lambda 1 and vf_coef 0 for `leave_one_out`.

    Raises:
        ValueError: If policy or environment do not fit the advantage.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {**PPO.policy_aliases, "RouterPolicy": RouterPolicy}

    def __init__(
        self,
        policy: str | type[RouterPolicy] = "RouterPolicy",
        env: VecEnv | None = None,
        *,
        advantage: Literal["leave_one_out", "gae"] = "leave_one_out",
        batch_size: int = 4096,
        price_balance: float = 0.5,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        if advantage not in ("leave_one_out", "gae"):
            raise ValueError(f"advantage must be 'leave_one_out' or 'gae', got {advantage!r}")
        self.advantage = advantage
        self.price_balance = price_balance
        if env is not None and hasattr(env, "num_sites"):
            kwargs.setdefault("n_steps", env.num_sites)
        if advantage == "leave_one_out":
            kwargs = {"n_epochs": 3, "gamma": 1.0, "gae_lambda": 1.0, "vf_coef": 0.0} | kwargs
        super().__init__(policy, env, batch_size=batch_size, _init_setup_model=_init_setup_model, **kwargs)  # type: ignore[arg-type]

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.advantage == "leave_one_out" and self.env is not None:  # loaded without one to predict only
            self._check_groups()

    def _check_groups(self) -> None:
        copies = self._copies()
        if copies < 2:
            raise ValueError(f"rollouts_per_sequence must be at least 2 for leave_one_out, got {copies}")
        if not isinstance(self.policy, RouterPolicy):
            raise ValueError(f"policy must be RouterPolicy for leave_one_out, got {type(self.policy).__name__}")
        if self.gamma != 1.0:
            raise ValueError(f"gamma must be 1 for leave_one_out, got {self.gamma}")

    def _copies(self) -> int:
        mdp = getattr(self.env, "mdp", None)
        return 1 if mdp is None else mdp.config.rollouts_per_sequence

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_episode"]

    def keep_generators(self) -> None:
        """Put the state of all generators into attributes, so that `save` writes them too."""
        self.generator_states = {
            "torch": torch.get_rng_state().tolist(),
            "env": self.env.generator.bit_generator.state if hasattr(self.env, "generator") else None,  # type: ignore[union-attr]
        }

    def restore_generators(self) -> None:
        """Go on with the generators where `keep_generators` saw them."""
        torch.set_rng_state(torch.tensor(self.generator_states["torch"], dtype=torch.uint8))
        if self.generator_states["env"] is not None:
            self._last_obs = self.env.reset()  # type: ignore[union-attr, assignment]  # or `learn` would, and seed it
            self.env.generator.bit_generator.state = self.generator_states["env"]  # type: ignore[union-attr]

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Run one episode of every lane; False if a callback asks to stop."""
        if self.advantage == "gae":
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        assert isinstance(self.policy, RouterPolicy)
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        observation = env.reset_tensor()  # type: ignore[attr-defined]
        observations, actions, log_probs, unit_prices, steps, expected_costs = [], [], [], [], [], []
        for site in range(env.num_sites):  # type: ignore[attr-defined]
            with torch.no_grad():
                logits = self.policy.step_logits(observation, site)
                action = torch.rand_like(logits) < logits.sigmoid()
                log_probs.append(bits_log_prob(logits, action))
                unit_prices.append(env.mdp.unit_price)  # type: ignore[attr-defined]
                expected_costs.append(unit_prices[-1] * logits.sigmoid().sum(1))
            step: _Step = env.step_tensor(action)  # type: ignore[attr-defined]
            observations.append(observation)
            actions.append(action)
            steps.append(step)
            observation = step.observation
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        later_costs = torch.stack([*expected_costs[1:], torch.zeros_like(expected_costs[0])])
        gains = torch.stack([step.quality for step in steps]) - later_costs
        seq_len = env.num_envs // (env.mdp.num_sequences * self._copies())  # type: ignore[attr-defined]
        inputs, priors, log_price = self.policy.episode_inputs(torch.stack(observations))
        self._episode = Episode(
            inputs,
            priors,
            log_price,
            torch.stack(actions),
            torch.stack(log_probs),
            leave_one_out(gains, self._copies(), seq_len),
            torch.stack(unit_prices),
            (-self.price_balance * log_price.squeeze(2)).exp(),
        )
        self._log_episode(torch.stack([step.reward for step in steps]))
        callback.on_rollout_end()
        return True

    def _log_episode(self, reward: Tensor) -> None:
        episode_return, advantages = reward.sum(0), self._episode.advantages
        assert self.ep_info_buffer is not None
        self.ep_info_buffer.append({"r": episode_return.mean().item(), "l": len(reward), "t": 0.0})
        explained = 1 - advantages[0].var() / episode_return.var().clamp_min(1e-12)
        self.logger.record("train/explained_variance", explained.item())
        self.logger.record("train/advantage_std", advantages.std().item())

    def train(self) -> None:
        """Update the policy on the episode collected last, with SB3's clipped objective."""
        if self.advantage == "gae":
            return super().train()
        assert isinstance(self.policy, RouterPolicy)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        episode = self._episode
        num_sites, num_lanes = episode.actions.shape[:2]
        lanes = min(num_lanes, max(1, self.batch_size // num_sites))
        before = self._decisions(episode)
        stats: list[Tensor] = []
        for _ in range(self.n_epochs):
            for rows in torch.randperm(num_lanes, device=episode.actions.device).split(lanes):
                loss, numbers = self._loss(Episode(*(part[:, rows] for part in episode)))
                if self.target_kl is not None and numbers[0] > 1.5 * self.target_kl:
                    break
                stats.append(torch.stack((*numbers, loss.detach(), self._descend(loss))))
            else:
                self._n_updates += 1
                continue
            break
        flips = (before != self._decisions(episode)).float().mean()
        self._log_update(torch.stack(stats).mean(0) if stats else torch.zeros(5), flips)
        return None

    def _loss(self, lanes: Episode) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Clipped surrogate minus entropy bonus plus own cost; KL estimate, clip fraction and entropy beside it."""
        assert isinstance(self.policy, RouterPolicy)
        logits = self.policy.router.site_logits(lanes.inputs, lanes.priors, lanes.log_price)
        advantages = lanes.weight * lanes.advantages
        cost = (lanes.weight * lanes.unit_price * logits.sigmoid().sum(-1)).mean()
        if self.normalize_advantage:
            scale = advantages.std() + 1e-8
            advantages, cost = (advantages - advantages.mean()) / scale, cost / scale
        clip = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        log_ratio = bits_log_prob(logits, lanes.actions) - lanes.log_probs
        ratio = log_ratio.exp()
        surrogate = torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
        entropy = bits_entropy(logits).mean()
        with torch.no_grad():
            divergence = (ratio - 1 - log_ratio).mean()
            clipped = ((ratio - 1).abs() > clip).float().mean()
        return cost - surrogate - self.ent_coef * entropy, (divergence, clipped, entropy.detach())

    def _descend(self, loss: Tensor) -> Tensor:
        """One optimiser step; the gradient's norm before clipping."""
        assert isinstance(self.policy, RouterPolicy)
        self.policy.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.router.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()
        return norm

    @torch.no_grad()
    def _decisions(self, episode: Episode) -> Tensor:
        assert isinstance(self.policy, RouterPolicy)
        return self.policy.router.site_logits(episode.inputs, episode.priors, episode.log_price) > 0

    def _log_update(self, stats: Tensor, flips: Tensor) -> None:
        names = ("approx_kl", "clip_fraction", "entropy", "loss", "gradient_norm")
        for name, value in zip(names, stats.tolist(), strict=True):
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/entropy_loss", -stats[2].item())
        self.logger.record("train/flip_rate", flips.item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")


def leave_one_out(rewards: Tensor, copies: int, seq_len: int) -> Tensor:
    """Return to go of each lane minus the mean of the other rollouts of the same token.

    Args:
        rewards: (num_sites, num_lanes), float32; lanes are ordered sequence, copy, token.
        copies: Rollouts of each sequence, at least 2.
        seq_len: Tokens of a sequence.

    Returns:
        Advantages, same shape.

    Example: two copies of one token at one site with rewards 1 and 3 get -2 and 2.
    Source: arXiv:1803.08475; the baseline does not depend on the lane's own actions, so the gradient is unbiased.
    """
    returns = rewards.flip(0).cumsum(0).flip(0)
    grouped = returns.unflatten(1, (-1, copies, seq_len))
    others = (grouped.sum(2, keepdim=True) - grouped) / (copies - 1)
    return (grouped - others).flatten(1)


def bits_log_prob(logits: Tensor, bits: Tensor) -> Tensor:
    """Log-probability of independent bits, summed over the last dimension; bits is bool of the same shape."""
    return (logits * bits - F.softplus(logits)).sum(-1)


def bits_entropy(logits: Tensor) -> Tensor:
    """Entropy of independent bits in nats, summed over the last dimension."""
    return (F.softplus(logits) - logits * logits.sigmoid()).sum(-1)

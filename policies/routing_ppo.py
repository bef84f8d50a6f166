"""SB3's PPO with leave-one-out advantages over groups of rollouts of the same tokens."""

from __future__ import annotations

import json
import math
from collections import deque
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from moe_backbone import ranks
from moe_backbone.checks import require_finite
from moe_backbone.precision import Precision, loss_scaler, require_precision
from policies.bits import bits_log_prob, bits_terms
from policies.episode_graph import EpisodeGraph
from policies.router_policy import RouterPolicy
from policies.tensor_ppo import TensorPPO

COUNTERS = ("num_timesteps", "_n_updates", "_current_progress_remaining", "lagrangian_multiplier")
"""Plain values that a model goes on with; the last only where a budget is held."""


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
    """What one unit costs (num_sites, num_lanes), nats; (num_sites, num_lanes, max_units) where units differ."""
    weight: Tensor
    """How much a lane counts (num_sites, num_lanes)."""
    chosen: Tensor
    """What the router decided without chance, bool (num_sites, num_lanes, max_units)."""


class RoutingPPO(TensorPPO):
    """PPO (arXiv:1707.06347) whose advantage compares rollouts of the same tokens.

    With `advantage="leave_one_out"` an update runs whole episodes of the environment's groups. The advantage of a
    lane at a site is its return to go minus the mean of the other rollouts of the same token (arXiv:1803.08475); no
    critic is trained and gamma is 1. Costs enter as expectations under the policy, not as sampled: those of later
    sites in the return, that of the site itself as a differentiable term of the loss. That leaves the gradient's
    mean as it is and takes noise out of it. What a unit costs may depend on what other lanes drew, as a share of the
    load does; that is taken as given. Tensors stay where the environment has them. Under torchrun every rank has lanes
    of its own, and `num_timesteps` counts those of all; gradients are averaged, advantages scaled by their spread on
    each rank. With `advantage="gae"` it is SB3's own PPO, see `TensorPPO`.

    Args:
        policy: `RouterPolicy`, or for `gae` any SB3 policy.
        env: `RoutingVecEnv`; for `leave_one_out` with at least two rollouts a sequence.
        advantage: See above.
        batch_size: Transitions of a minibatch; whole lanes with all their sites.
        price_balance: Lanes count in proportion to `price ** -price_balance`; without it high prices, whose returns
            vary most, would drown the low ones.
        cuda_graph: Whether a GPU runs an episode of `leave_one_out` as one CUDA graph; an environment that cannot be
            captured raises.
        precision: Of the forward passes of rollouts, native ones among them, and of the policy in the update; weights,
            probabilities, rewards and optimiser stay float32. `fp16` is for `leave_one_out`.
        **kwargs: SB3's arguments of PPO. Defaults that differ: n_steps = sites of the environment, n_epochs 3,
            gamma 1, gae_lambda 1 and vf_coef 0 for `leave_one_out`.

    Raises:
        ValueError: If policy or environment do not fit the advantage.
    """

    _graph: EpisodeGraph[tuple[Episode, Tensor]] | None = None
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {**PPO.policy_aliases, "RouterPolicy": RouterPolicy}

    def __init__(
        self,
        policy: str | type[RouterPolicy] = "RouterPolicy",
        env: VecEnv | None = None,
        *,
        advantage: Literal["leave_one_out", "gae"] = "leave_one_out",
        batch_size: int = 4096,
        price_balance: float = 0.5,
        cuda_graph: bool = True,
        precision: Precision = "fp32",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        if advantage not in ("leave_one_out", "gae"):
            raise ValueError(f"advantage must be 'leave_one_out' or 'gae', got {advantage!r}")
        require_precision(precision)
        if precision == "fp16" and advantage == "gae":
            raise ValueError("precision must be 'fp32' or 'bf16' for gae, whose update scales no loss, got 'fp16'")
        self.advantage, self.precision = advantage, precision
        self.price_balance = price_balance
        self.cuda_graph = cuda_graph
        if env is not None and hasattr(env, "num_sites"):
            kwargs.setdefault("n_steps", env.num_sites)
        if advantage == "leave_one_out":
            kwargs = {"n_epochs": 3, "gamma": 1.0, "gae_lambda": 1.0, "vf_coef": 0.0} | kwargs
        super().__init__(policy, env, batch_size=batch_size, _init_setup_model=_init_setup_model, **kwargs)  # type: ignore[arg-type]

    def _setup_model(self) -> None:
        super()._setup_model()
        if isinstance(self.policy, RouterPolicy) and hasattr(self.env, "mdp"):
            self.env.mdp.compensation = self.policy.router.compensation  # type: ignore[union-attr]
        if self.advantage == "gae":
            return
        if isinstance(self.policy.optimizer, torch.optim.Adam):  # before a zip brings its state
            self.policy.optimizer.param_groups[0].update(fused=True, foreach=False)
        self.scaler = loss_scaler(self.precision, self.device)
        if self.env is not None:  # loaded without one to predict only
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
        return [*super()._excluded_save_params(), "_episode", "_graph", "scaler"]

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on to the bit, on all ranks: tensors and plain values, which load without code."""
        algorithm, keys, *place = np.random.get_state(legacy=True)
        generators = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "numpy": [algorithm, np.asarray(keys).tolist(), *place],
            "env": json.dumps(self.env.generator.bit_generator.state) if hasattr(self.env, "generator") else None,  # type: ignore[union-attr]
            "windows": self._source.left.tolist() if hasattr(self._source, "left") else None,
        }
        learned = {"policy": self.policy.state_dict(), "optimizer": self.policy.optimizer.state_dict()}
        scaler = self.scaler.state_dict() if self.precision == "fp16" else None
        counted = {name: getattr(self, name) for name in COUNTERS if hasattr(self, name)}
        episodes = list(self.ep_info_buffer or ())
        return {
            **learned,
            "scaler": scaler,
            "counters": counted,
            "episodes": episodes,
            "draws": ranks.gather(generators),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, in an environment of the same rules."""
        self.policy.load_state_dict(state["policy"])
        self.policy.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.ep_info_buffer = deque(state["episodes"], maxlen=self._stats_window_size)
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if (draws := ranks.own_part(state["draws"])) is not None:
            self._restore_generators(draws)

    def _restore_generators(self, states: dict[str, Any]) -> None:
        if states["env"] is not None:
            observation = self.env.reset()  # type: ignore[union-attr]  # or `learn` would, and seed it
            self._last_obs, self._ended = torch.as_tensor(observation, device=self.device), True  # type: ignore[assignment]
            self.env.generator.bit_generator.state = json.loads(states["env"])  # type: ignore[union-attr]
        torch.set_rng_state(states["torch"].cpu())
        if states["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)
        algorithm, keys, *place = states["numpy"]
        np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *place))
        if states["windows"] is not None:
            self._source.left = np.array(states["windows"], dtype=np.int64)

    @property
    def _source(self) -> Any:
        """Where the environment's text comes from."""
        return getattr(getattr(self.env, "mdp", None), "source", None)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Run one episode of every lane; False if a callback asks to stop.

        Callbacks hear of the steps when the episode is over: on the way nobody could act on what they say.
        """
        if self.advantage == "gae":
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        with self._lowered():
            self._episode, rewards = self._run_episode(env)
        for _ in rewards:
            self.num_timesteps += env.num_envs * ranks.world_size()
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        self._log_episode(rewards)
        callback.on_rollout_end()
        return True

    def _run_episode(self, env: Any) -> tuple[Episode, Tensor]:
        if not self.cuda_graph or self.device.type != "cuda":
            return self._play(env, env.draw_batch())
        if self._graph is None or self._graph.env is not env:
            self._graph = EpisodeGraph(env, partial(self._play, env))
        return self._graph()

    @torch.no_grad()
    def _play(self, env: Any, batch: Any) -> tuple[Episode, Tensor]:
        """Run one episode of every lane, and its rewards (num_sites, num_lanes); nothing is read from the device."""
        assert isinstance(self.policy, RouterPolicy)
        decisions, qualities, costs, rewards = [], [], [], []
        observation = env.begin_tensor(batch)
        router = self.policy.router
        inputs = observation.new_empty(env.num_sites, env.num_envs, router.spec.num_inputs)
        for site in range(env.num_sites):
            _, prior, log_price = seen = self.policy.step_inputs(observation, site, inputs[site])
            logits = router.one_site_logits(site, *seen)
            chance = logits.sigmoid()
            actions = torch.rand_like(logits) < chance
            unit_price = env.mdp.unit_prices(actions) if env.mdp.prices_follow_draws else env.mdp.unit_price
            decisions.append((prior, log_price, actions, bits_log_prob(logits, actions), unit_price, logits > 0))
            costs.append(expected_cost(unit_price, chance))
            step = env.step_tensor(actions)
            qualities.append(step.quality)
            rewards.append(step.reward)
            observation = step.observation
        stacked = [torch.stack(parts) for parts in zip(*decisions, strict=True)]
        priors, log_prices, taken, log_probs, unit_prices, chosen = stacked
        later_costs = torch.stack([*costs[1:], torch.zeros_like(costs[0])])
        seq_len = env.num_envs // (env.mdp.num_sequences * self._copies())
        advantages = leave_one_out(torch.stack(qualities) - later_costs, self._copies(), seq_len)
        weight = (-self.price_balance * log_prices.squeeze(2)).exp()
        episode = Episode(inputs, priors, log_prices, taken, log_probs, advantages, unit_prices, weight, chosen)
        return episode, torch.stack(rewards)

    def _log_episode(self, rewards: Tensor) -> None:
        episode_return, advantages = rewards.sum(0), self._episode.advantages
        explained = 1 - advantages[0].var() / episode_return.var().clamp_min(1e-12)
        figures = torch.stack((episode_return.mean(), explained, advantages.std()))
        mean_return, explained_variance, advantage_std = figures.tolist()
        place = f"timestep {self.num_timesteps}"
        require_finite([mean_return], "return of an episode", lambda _: place, "look at the backbone")
        assert self.ep_info_buffer is not None
        self.ep_info_buffer.append({"r": mean_return, "l": len(rewards), "t": 0.0})
        self.logger.record("train/explained_variance", explained_variance)
        self.logger.record("train/advantage_std", advantage_std)

    def train(self) -> None:
        """Update the policy on the episode collected last, with SB3's clipped objective."""
        if self.advantage == "gae":
            return super().train()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        stats: list[Tensor] = []
        for _ in range(self.n_epochs):
            if not self._learn_epoch(stats):
                break
            self._n_updates += 1
        figures = torch.stack(stats) if stats else self._episode.weight.new_zeros(1, 5)
        self._log_update(figures, self._flip_rate())
        return None

    def _learn_epoch(self, stats: list[Tensor]) -> bool:
        """Update by every lane once, some lanes at a time; False if the policy has moved too far."""
        episode = self._episode
        num_sites, num_lanes = episode.actions.shape[:2]
        lanes = min(num_lanes, max(1, self.batch_size // num_sites))
        for rows in torch.randperm(num_lanes, device=episode.actions.device).split(lanes):
            loss, numbers = self._loss(Episode(*(part.index_select(1, rows) for part in episode)))
            if self.target_kl is not None and ranks.average(numbers[0]) > 1.5 * self.target_kl:
                return False
            stats.append(torch.stack((*numbers, loss.detach(), self._descend(loss))))
        return True

    def _loss(self, lanes: Episode) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Clipped surrogate minus entropy bonus plus own cost; KL estimate, clip fraction and entropy beside it."""
        assert isinstance(self.policy, RouterPolicy)
        with self._lowered():
            logits = self.policy.router.site_logits(lanes.inputs, lanes.priors, lanes.log_price)
        log_prob, entropy, count = bits_terms(logits, lanes.actions)
        advantages = lanes.weight * lanes.advantages
        if lanes.unit_price.dim() == count.dim():
            cost = (lanes.weight * lanes.unit_price * count).mean()
        else:
            cost = (lanes.weight * expected_cost(lanes.unit_price, logits.sigmoid())).mean()
        if self.normalize_advantage:
            scale = advantages.std() + 1e-8
            advantages, cost = (advantages - advantages.mean()) / scale, cost / scale
        clip = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        log_ratio = log_prob - lanes.log_probs
        ratio = log_ratio.exp()
        surrogate = torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
        loss = cost - surrogate
        if self.ent_coef:
            loss = loss - self.ent_coef * entropy.mean()
        with torch.no_grad():
            divergence = (ratio - 1 - log_ratio).mean()
            clipped = ((ratio - 1).abs() > clip).float().mean()
            return loss, (divergence, clipped, entropy.mean())

    def _descend(self, loss: Tensor) -> Tensor:
        """One optimiser step; the gradient's norm before clipping."""
        assert isinstance(self.policy, RouterPolicy)
        self.policy.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        ranks.average_gradients(self.policy.optimizer.param_groups[0]["params"])
        self.scaler.unscale_(self.policy.optimizer)
        weights = self.policy.optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(weights, self.max_grad_norm, foreach=True)
        self.scaler.step(self.policy.optimizer)
        self.scaler.update()
        return norm

    @torch.no_grad()
    def _flip_rate(self) -> Tensor:
        """Share of decisions that the update turned round."""
        assert isinstance(self.policy, RouterPolicy)
        inputs, priors, log_price, *_, chosen = self._episode
        with self._lowered():
            logits = self.policy.router.site_logits(inputs, priors, log_price)
        return ((logits > 0) != chosen).float().mean()

    def _log_update(self, stats: Tensor, flips: Tensor) -> None:
        """Log means over minibatches, of which `stats` has a row each.

        Raises:
            ValueError: If a loss was not finite.
        """
        names = ("approx_kl", "clip_fraction", "entropy", "loss", "gradient_norm", "flip_rate")
        figures = dict(zip(names, torch.cat((stats.mean(0), flips.view(1))).tolist(), strict=True))
        if not math.isfinite(figures["loss"]):
            place = f"timestep {self.num_timesteps}, minibatch"
            where = partial("{} {} of the update".format, place)
            require_finite(stats[:, 3].tolist(), "PPO's loss", where, "lower ppo.learning_rate")
        for name, value in figures.items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/entropy_loss", -figures["entropy"])
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")


def expected_cost(unit_price: Tensor, chance: Tensor) -> Tensor:
    """What units cost that are used by chance (..., num_units): nats (...).

    `unit_price` has the shape of `chance`, or lacks the last dimension where all units of a lane cost the same.
    """
    if unit_price.dim() < chance.dim():
        return unit_price * chance.sum(-1)
    return (unit_price * chance).sum(-1)


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

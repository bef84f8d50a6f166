"""What TensorBoard shows of a training run, beside SB3's own scalars."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, HParam
from torch import Tensor
from tqdm import tqdm

from moe_backbone import ranks
from moe_backbone.quality import mean_scored, token_correct, token_log_likelihood
from moe_backbone.sites import RoutingSite
from policies.gating import GateTrainer


class RoutingMetrics(BaseCallback):
    """Logs what the routed episodes of an update were worth and what they used.

    Args:
        hyperparameters: Shown in TensorBoard's HPARAMS tab.
        every: Updates between two looks.
    """

    def __init__(self, hyperparameters: dict[str, bool | str | float | int | None], every: int = 5) -> None:
        super().__init__()
        self.hyperparameters = hyperparameters
        self.every = every
        self._updates = 0

    def _on_training_start(self) -> None:
        metrics: dict[str, float | int] = {"rollout/ep_rew_mean": 0, "routing/compute": 0, "eval/loss_at_60_compute": 0}
        self.logger.record("hparams", HParam(self.hyperparameters, metrics), exclude=("stdout", "log", "json", "csv"))

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._updates += 1
        mdp = self.training_env.mdp  # type: ignore[attr-defined]
        if self._updates % self.every or len(mdp.subsets) < len(mdp.backbone.sites):  # amid an episode
            return
        for name, value in episode_metrics(mdp).items():
            self.logger.record(name, value)


@torch.no_grad()
def episode_metrics(mdp: Any) -> dict[str, float]:
    """Scalars of the episode that an MDP ended last, means over lanes.

    Names: `reward/...` nats, `routing/...` counts and fractions, `quality/...` nats and fractions against native.
    """
    batch, sites, logits = mdp.batch, mdp.backbone.sites, mdp.logits
    positions, price = mdp.state.positions, mdp.price
    compute = sum(mdp.meter.compute(index, subset, positions) for index, subset in enumerate(mdp.subsets))
    native_logits, targets = batch.native_logits, batch.targets
    routed = mean_scored(token_log_likelihood(logits, targets), targets)
    native = mean_scored(token_log_likelihood(native_logits, targets), targets)
    correct = mean_scored(token_correct(logits, targets), targets)
    native_correct = mean_scored(token_correct(native_logits, targets), targets)
    cost, extra = compute, {}
    if mdp.drops_keys:
        kept = sum(mdp.meter.cache_bytes(*place) for place in enumerate(mdp.subsets)) / mdp.meter.native_cache_bytes
        cost, extra["routing/cache"] = compute + mdp.config.cache_price * kept, kept.mean()
    if mdp.load_prices.any:
        extra["reward/balance"] = -sum(mdp.balance(*place).mean() for place in enumerate(mdp.subsets))
    metrics = {
        "reward/cost": -(price * cost).mean(),
        "reward/quality": mdp.quality.mean(),
        "routing/compute": compute.mean(),
        "routing/price": price.log().mean().exp(),
        "quality/log_likelihood": routed,
        "quality/log_likelihood_minus_native": routed - native,
        "quality/accuracy": correct,
        "quality/accuracy_minus_native": correct - native_correct,
    }
    metrics |= load_metrics(sites, mdp.subsets) | extra
    return dict(zip(metrics, torch.stack([value.double() for value in metrics.values()]).tolist(), strict=True))


def load_metrics(sites: tuple[RoutingSite, ...], subsets: list[Tensor]) -> dict[str, Tensor]:
    """Units a token uses at each site, coefficient of variation of expert load, and units nobody used.

    Args:
        sites: In running order.
        subsets: What ran at each, bool (num_lanes, num_units).

    Returns:
        Scalars of any dtype, not yet read from the device.
    """
    loads = [subset.float().mean(0) for subset in subsets]
    metrics = {f"units_per_token/{site.name}": load.sum() for site, load in zip(sites, loads, strict=True)}
    experts = [load for site, load in zip(sites, loads, strict=True) if site.kind == "experts"]
    spread = [load.std(correction=0) / load.mean().clamp_min(1e-9) for load in experts]
    metrics["routing/load_cv"] = torch.stack(spread).mean() if spread else loads[0].new_zeros(())
    metrics["routing/dead_units"] = torch.cat(loads).eq(0).sum()
    return metrics


class ProgressBar(BaseCallback):
    """Shows decisions learned from, time left and the mean return of an episode.

    Args:
        total_timesteps: Where the training ends.
    """

    def __init__(self, total_timesteps: int) -> None:
        super().__init__()
        self.total_timesteps = total_timesteps
        self._bar: tqdm[Any] | None = None

    def _on_training_start(self) -> None:
        self._bar = ranks.bar(
            total=self.total_timesteps,
            initial=self.model.num_timesteps,
            desc="training",
            unit="decision",
            unit_scale=True,
        )

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert self.model.ep_info_buffer is not None and self._bar is not None
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        self._bar.set_postfix({"return": f"{sum(returns) / max(1, len(returns)):.3f}"}, refresh=False)
        self._bar.update(self.model.num_timesteps - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is; to be called however the training ends."""
        if self._bar is not None:
            self._bar.close()


class GateSteps(BaseCallback):
    """Trains the router by back-propagation too, between the updates of PPO.

    The gradient has little noise and a bias, PPO's has no bias and much noise. What gates learn of the compensation is
    learned on the routing of now.

    Args:
        trainer: Of the model's router.
        per_update: Steps between two updates.
    """

    def __init__(self, trainer: GateTrainer, per_update: int) -> None:
        super().__init__()
        self.trainer = trainer
        self.per_update = per_update
        self._first = True

    def _on_training_start(self) -> None:
        self._first = self.model.num_timesteps == 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        figures = {} if self._first else self.trainer.train(self.per_update)
        self._first = False
        for name, value in figures.items():
            self.logger.record(f"gates/{name}", value)


class PeriodicEvaluation(BaseCallback):
    """Calls an evaluation a few times during training and logs what it returns.

    Args:
        evaluate: Returns scalars and figures by name.
        times: Evaluations spread over the training run.
    """

    def __init__(self, evaluate: Callable[[], tuple[dict[str, float], dict[str, Any]]], times: int) -> None:
        super().__init__()
        self.evaluate = evaluate
        self.times = times
        self._done = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        progress = 1 - self.model._current_progress_remaining
        if progress * (self.times + 1) < self._done + 1:
            return
        self._done = int(progress * (self.times + 1))
        scalars, figures = self.evaluate()
        for name, value in scalars.items():
            self.logger.record(name, value)
        for name, figure in figures.items():
            self.logger.record(name, Figure(figure, close=False), exclude=("stdout", "log", "json", "csv"))


class PeriodicSave(BaseCallback):
    """Calls `save` between updates: every so many, and when a stop was asked for on any rank, which ends the training.

    Raises:
        KeyboardInterrupt: After saving, if `stop_requested` was set.

    Args:
        save: Writes a checkpoint.
        every: Updates between two.
    """

    def __init__(self, save: Callable[[], None], every: int) -> None:
        super().__init__()
        self.save = save
        self.every = every
        self.stop_requested = False
        self._updates = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        stop = ranks.any_rank(self.stop_requested)
        if stop or (self._updates and self._updates % self.every == 0):
            self.save()
        if stop:
            raise KeyboardInterrupt
        self._updates += 1


@contextmanager
def asked_to_stop(saver: PeriodicSave) -> Iterator[None]:
    """While open, the first SIGINT or SIGTERM asks `saver` to stop; the next one acts as it always does.

    Only in the main thread, as signals reach no other: elsewhere whoever started the thread is to stop it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        saver.stop_requested = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

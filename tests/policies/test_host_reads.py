"""What a host would have to wait for: reads of the device, and an episode replayed as one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.trivial_env import TrivialVecEnv
from envs import RoutingVecEnv
from envs.planted import PLANTED_RULES, PlantedSource, planted_backbone
from policies.episode_graph import EpisodeGraph, record_cuda
from policies.linear_router import RouterSpec
from policies.routing_ppo import RoutingPPO
from policies.tensor_ppo import TensorPPO

HOST_READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "__array__"}


class CountReads(TorchFunctionMode):
    """Counts calls that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every call on."""
        name = getattr(func, "__name__", "")
        if name in HOST_READS or (name == "__getitem__" and any(_is_mask(part) for part in args)):
            self.reads.append(name)
        return func(*args, **kwargs or {})


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim > 0


class Replayed:
    """An environment that answers what another one once answered: the host's reads left are the algorithm's own."""

    prices_follow_draws = False

    def __init__(self, env: RoutingVecEnv) -> None:
        self.num_envs, self.num_sites, self.generator = env.num_envs, env.num_sites, env.generator
        self.batch = self.drawn = env.draw_batch()
        self.first, self.steps, self.unit_prices = env.begin_tensor(self.batch), [], []
        for _ in range(env.num_sites):
            self.unit_prices.append(env.mdp.unit_price)
            self.steps.append(env.step_tensor(torch.rand_like(self.first[:, :4]) < 0.5))
        self.mdp, self.num_sequences, self.config = self, env.mdp.num_sequences, env.mdp.config

    def draw_batch(self) -> Any:
        """Always the same."""
        return self.drawn

    def begin_tensor(self, batch: Any) -> Tensor:
        """The first observation."""
        self.site, self.batch = 0, batch
        return self.first

    def step_tensor(self, actions: Tensor) -> Any:
        """The next answer, whatever the actions."""
        self.site += 1
        return self.steps[self.site - 1]

    @property
    def unit_price(self) -> Tensor:
        """Of the current site."""
        return self.unit_prices[self.site]


def _leave_one_out(device: str = "cpu") -> RoutingPPO:
    env = RoutingVecEnv(64, planted_backbone().to(device), PlantedSource(), PLANTED_RULES)
    spec = RouterSpec(hidden_size=32, sites=env.mdp.backbone.sites, price_low=0.5, price_high=0.5)
    kwargs = {"router_spec": spec.to_json(), "critic": False}
    return RoutingPPO("RouterPolicy", env, batch_size=32, seed=0, device=device, policy_kwargs=kwargs)


def _weights(model: PPO) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.policy.parameters()])


def _begin(model: PPO) -> BaseCallback:
    return model._setup_learn(1, CallbackList([]))[1]


def test_leave_one_out_reads_the_device_twice_an_iteration() -> None:
    """Once for the episodes' figures, once for the update's; never while it plays or learns."""
    model = _leave_one_out()
    callback, env = _begin(model), Replayed(model.env)
    with CountReads() as playing:
        model._play(env, env.draw_batch())
    assert playing.reads == []
    with CountReads() as whole:
        model.collect_rollouts(env, callback, model.rollout_buffer, env.num_sites)
        model.train()
    assert whole.reads == ["tolist", "tolist"]


def test_gae_reads_the_device_twice_an_iteration() -> None:
    """Whatever the number of steps and minibatches; a bound on the divergence costs one read a minibatch."""
    for target_kl, minibatches in ((None, 0), (1e9, 8)):
        env = TrivialVecEnv(24, 12)
        model = TensorPPO("MlpPolicy", env, n_steps=8, batch_size=48, n_epochs=2, target_kl=target_kl, device="cpu")
        model.policy.optimizer.step = lambda: None  # it counts its steps on the host, whatever the device
        callback = _begin(model)
        with CountReads() as counter:
            model.collect_rollouts(env, callback, model.rollout_buffer, 8)
            model.train()
        assert counter.reads.count("cpu") == 2 + minibatches
        assert set(counter.reads) <= {"cpu", "numpy"}


def test_a_read_is_counted() -> None:
    """Validated distributions read the device, and the counter sees it."""
    with CountReads() as counter:
        torch.distributions.Bernoulli(logits=torch.zeros(3))
    assert counter.reads


# An episode as one graph


class FakeGraph:
    """Records by running, replays by running again into the recorded tensors."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """As `record_cuda`."""
        self.recorded += 1
        state = torch.get_rng_state()
        outcome = run()
        torch.set_rng_state(state)

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(_tensors(outcome), _tensors(run()), strict=True):
                old.copy_(new)

        return replay, outcome


def _tensors(outcome: Any) -> list[Tensor]:
    episode, rewards = outcome
    return [*episode, rewards]


def _graph_run(model: RoutingPPO, fake: FakeGraph | None, iterations: int = 4) -> Tensor:
    """Weights after some iterations, with or without a graph."""
    callback, env = _begin(model), model.env
    if fake is not None:
        graph = EpisodeGraph(env, partial(model._play, env), fake)
        model._run_episode = lambda env: graph()  # type: ignore[method-assign]
    for _ in range(iterations):
        model.collect_rollouts(env, callback, model.rollout_buffer, env.num_sites)
        model.train()
    return _weights(model)


def test_a_graph_is_recorded_once_and_replayed_for_every_episode() -> None:
    """Same weights as without it, so each replay saw its own batch and its own random numbers."""
    fake = FakeGraph()
    assert torch.equal(_graph_run(_leave_one_out(), fake), _graph_run(_leave_one_out(), None))
    assert (fake.recorded, fake.replayed) == (1, 4)


def test_a_batch_that_is_not_copied_into_the_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the graph goes on with the first batch."""
    whole = _graph_run(_leave_one_out(), None)
    monkeypatch.setattr(Tensor, "copy_", lambda self, other: self if other.dtype == torch.int64 else self.set_(other))
    assert not torch.equal(_graph_run(_leave_one_out(), FakeGraph()), whole)


@dataclass(frozen=True, kw_only=True)
class Words:
    """A batch."""

    tokens: Tensor


class WordsEnv:
    """Draws as many tokens as asked, one higher each time."""

    def __init__(self) -> None:
        self.size, self.draws, self.mdp, self.batch = 3, 0, self, None

    def draw_batch(self) -> Words:
        """A new batch."""
        self.draws += 1
        return Words(tokens=torch.full((self.size,), self.draws))

    def play(self, batch: Words) -> tuple[list[Tensor], Tensor]:
        """Twice the tokens."""
        self.batch = batch
        return [2 * batch.tokens], batch.tokens


def test_a_graph_is_recorded_anew_when_it_no_longer_fits() -> None:
    """When another episode was begun in between, and when shapes differ; not otherwise."""
    env, fake = WordsEnv(), FakeGraph()
    graph = EpisodeGraph(env, env.play, fake)
    recorded = []
    for change in ("none", "none", "begun", "none", "size", "none"):
        if change == "begun":
            env.play(env.draw_batch())
        if change == "size":
            env.size = 5
        (doubled,), _ = graph()
        assert doubled.tolist() == [2 * env.draws] * env.size
        recorded.append(fake.recorded)
    assert recorded == [1, 1, 2, 2, 3, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_draws_the_random_numbers_of_eager_runs() -> None:
    """Three episodes, and the host never waits for the device while one is replayed."""
    model = _leave_one_out("cuda")
    env = Replayed(model.env)
    graph = EpisodeGraph(env, partial(model._play, env))
    torch.cuda.manual_seed(3)
    eager = [model._play(env, env.draw_batch())[0].actions for _ in range(3)]
    torch.cuda.manual_seed(3)
    graphed = [graph()[0].actions.clone()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed += [graph()[0].actions.clone() for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(eager[0], eager[1])
    for one, other in zip(graphed, eager, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_that_reads_the_device_cannot_be_recorded() -> None:
    """The message says what to do; nothing runs eagerly in silence."""
    with pytest.raises(RuntimeError, match="cuda_graph=False"):
        record_cuda(lambda: torch.zeros(1, device="cuda").item(), torch.device("cuda"))

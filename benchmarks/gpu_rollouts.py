"""Rollouts that stay on the GPU: waits of the host, what the loop adds to the kernels, and stock Stable-Baselines3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from stable_baselines3 import PPO
from torch import Tensor

from benchmarks.gpu_machine import Machine
from benchmarks.measure import Row, interleave, milliseconds
from benchmarks.trivial_env import TrivialVecEnv
from envs import EnvConfig, FixedSource, RoutingVecEnv
from moe_backbone import BackboneConfig, MoETransformer
from policies.linear_router import RouterSpec
from policies.routing_ppo import RoutingPPO
from policies.tensor_ppo import TensorPPO

LANES, STEPS, COPIES = 4096, 8, 4
SETTINGS: dict[str, Any] = {"n_steps": STEPS, "batch_size": 8192, "n_epochs": 4, "seed": 0}
BACKBONE = BackboneConfig()
BLOCKING_CALLS, LOOP_SHARE, STOCK = 4, 0.10, 3.0
"""Most waits of an iteration; most of its time outside kernels; stock PPO's time over ours."""
WARM_UPS = 3
SAME_WAY = 0.05
"""Distance of both weights, relative to the way from the start; another seed goes a way of its own, about 1."""


def rollouts(machine: Machine) -> Iterator[Row]:
    """Leave-one-out on a real backbone, then PPO on an environment that costs next to nothing."""
    yield from _leave_one_out(machine)
    machine.release()
    yield from _trivial(machine)


def _leave_one_out(machine: Machine) -> Iterator[Row]:
    model = _routing_ppo(machine.device)
    env: Any = model.get_env()
    decisions = LANES * env.num_sites
    learn = partial(model.learn, decisions, reset_num_timesteps=False)
    for _ in range(WARM_UPS):
        learn()
    yield _no_reads(machine, model, env)
    learn()  # records the episode anew, as another one was begun
    yield from _iteration(machine, "leave-one-out", learn, {"lanes": LANES, "decisions": decisions})


def _no_reads(machine: Machine, model: RoutingPPO, env: Any) -> Row:
    batch, error = env.draw_batch(), ""
    try:
        with machine.no_host_reads():
            model._play(env, batch)
    except RuntimeError as raised:
        error = str(raised)
    return machine.row("rollouts/no-reads", float(not error), 1.0, error=error, lanes=LANES)


def _iteration(machine: Machine, name: str, learn: Callable[[], object], sizes: dict[str, int]) -> Iterator[Row]:
    """Waits of one iteration, and the share of its time in which the device has nothing to do."""
    trace, (seconds,) = machine.trace(learn), interleave([_awaited(learn)], seconds=2.0)
    waits = max(1, trace.blocking)
    kernels = len(trace.kernels)
    yield machine.row(f"rollouts/{name}-waits", BLOCKING_CALLS / waits, 1.0, waits=trace.blocking, sizes=sizes)
    share = max(0.0, 1 - trace.busy / (1e6 * seconds))
    times: dict[str, Any] = {"iteration_ms": milliseconds(seconds), "busy_ms": trace.busy / 1e3, "kernels": kernels}
    ratio = LOOP_SHARE / max(share, 1e-3)
    yield machine.row(f"rollouts/{name}-loop-tax", ratio, 1.0, share_outside_kernels=share, sizes=sizes, **times)


def _awaited(function: Callable[[], object]) -> Callable[[], None]:
    """Until the device is done."""

    def run() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _routing_ppo(device: torch.device) -> RoutingPPO:
    """A router that stays as it starts, so that every iteration does the same work."""
    torch.manual_seed(0)
    backbone = MoETransformer(BACKBONE).requires_grad_(False).eval().to(device)
    text = torch.randint(BACKBONE.vocab_size, (LANES // BACKBONE.seq_len, BACKBONE.seq_len + 1)).to(device)
    config = EnvConfig(rollouts_per_sequence=COPIES)
    env = RoutingVecEnv(LANES, backbone, FixedSource(text[:, :-1], text[:, 1:]), config)
    spec = RouterSpec(hidden_size=backbone.hidden_size, sites=tuple(backbone.sites))
    kwargs = {"router_spec": spec.to_json(), "critic": False}
    return RoutingPPO("RouterPolicy", env, learning_rate=1e-9, seed=0, device=device, policy_kwargs=kwargs)


def _trivial(machine: Machine) -> Iterator[Row]:
    (stock_model, stock_way), (model, way) = (_trained(kind, str(machine.device)) for kind in (PPO, TensorPPO))
    apart = float((way - stock_way).norm() / stock_way.norm())
    learners = (stock_model, model)
    iterations = [_awaited(partial(learner.learn, LANES * STEPS, reset_num_timesteps=False)) for learner in learners]
    stock, own = interleave(iterations, seconds=6.0)
    traces = [machine.trace(iteration) for iteration in iterations]
    detail: dict[str, Any] = {"stock_ms": milliseconds(stock), "ours_ms": milliseconds(own), "apart": apart}
    detail |= {"stock_waits": traces[0].blocking, "waits": traces[1].blocking, "lanes": LANES, "settings": SETTINGS}
    yield machine.row("rollouts/stock-sb3", stock / own, STOCK, equal=apart <= SAME_WAY, **detail)
    waits = max(1, traces[1].blocking)
    yield machine.row("rollouts/gae-waits", BLOCKING_CALLS / waits, 1.0, **detail)


def _trained(kind: type[PPO], device: str) -> tuple[PPO, Tensor]:
    """After one iteration, with the way that the weights went in it."""
    env = TrivialVecEnv(LANES, length=STEPS, device=device)
    model = kind("MlpPolicy", env, device=device, **SETTINGS)  # seeds the global generators
    start = _weights(model)
    model.learn(LANES * STEPS)
    return model, _weights(model) - start


def _weights(model: PPO) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.policy.parameters()])

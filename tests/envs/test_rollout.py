"""Blocks of sequences and unit costs worked out once: what is fast gives what is plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from envs import EnvConfig, RoutingMDP, RoutingVectorEnv, TokenSource
from envs.actions import action_tensor
from moe_backbone import MoETransformer

CPU = torch.device("cpu")
SEED = 7
SEQ_LEN, NUM_SITES, MAX_UNITS = 8, 4, 4
TOLERANCE = 1e-5
"""Absolute, float32: matrices of few rows go through other kernels, which may round the last bit another way."""


def _episode(env: RoutingVectorEnv) -> list[np.ndarray]:
    """Observations, rewards, costs, unit prices, the state in between, and the logits of drawn actions."""
    env.action_space.seed(SEED)
    arrays = [env.reset(seed=SEED)[0]]
    for _ in range(NUM_SITES):
        state = env.mdp.state
        arrays += [tensor.numpy() for tensor in (env.mdp.unit_price, state.tokens, state.price, state.positions)]
        arrays += [state.hidden.numpy(), state.features.numpy()]
        step = env.mdp.step(action_tensor(env.action_space.sample(), env.single_action_space, env.num_envs, CPU))
        arrays += [tensor.numpy() for tensor in (step.observation, step.reward, step.cost, step.quality)]
    return [*arrays, env.mdp.logits.numpy()]


@pytest.mark.parametrize("rollouts_per_sequence", [1, 3])
@pytest.mark.parametrize("action", ["subset", "count"])
@pytest.mark.parametrize("quality", ["kl", "log_likelihood", "accuracy"])
def test_blocks_change_nothing(
    make_vector: Callable[..., RoutingVectorEnv],
    monkeypatch: pytest.MonkeyPatch,
    quality: Literal["kl", "log_likelihood", "accuracy"],
    action: Literal["subset", "count"],
    rollouts_per_sequence: int,
) -> None:
    """Seven groups at once, or in blocks of some and one at the end: the same data, joined in order."""
    config = EnvConfig(quality=quality, action=action, rollouts_per_sequence=rollouts_per_sequence)
    group = rollouts_per_sequence * SEQ_LEN
    episodes = []
    for block_tokens in (10_000, 2 * group + SEQ_LEN):
        monkeypatch.setattr("envs.rollout.BLOCK_TOKENS", block_tokens)
        episodes.append(_episode(make_vector(config, num_envs=7 * group)))
    for whole, blocks in zip(*episodes, strict=True):
        np.testing.assert_allclose(blocks, whole, rtol=0, atol=TOLERANCE)


def test_cost_is_that_of_the_meter(make_vector: Callable[..., RoutingVectorEnv]) -> None:
    """Unit costs are worked out once; each step charges what the meter would, to the bit."""
    env = make_vector()
    env.reset(seed=SEED)
    env.action_space.seed(SEED)
    for index in range(NUM_SITES):
        positions = env.mdp.state.positions
        action = env.action_space.sample()
        info = env.step(action)[4]
        subset = torch.from_numpy(action[:, : env.mdp.backbone.sites[index].num_units]).bool()
        expected = env.mdp.meter.compute(index, subset, positions)
        np.testing.assert_array_equal(info.get("final_info", info)["cost"], expected)


class _HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU, outside the backbone's own methods."""

    def __init__(self, backbone: MoETransformer, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False
        for name in ("begin", "advance", "finish", "run"):
            monkeypatch.setattr(backbone, name, self._excused(getattr(backbone, name)))

    def _excused(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.inside, before = True, self.inside
            result = method(*args)
            self.inside = before
            return result

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note its name if it waits."""
        name = func.overloadpacket.__name__
        boolean_index = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
        if not self.inside and (boolean_index or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("action", ["subset", "count"])
@pytest.mark.parametrize("quality", ["kl", "log_likelihood", "accuracy"])
def test_an_episode_never_makes_the_host_wait(
    backbone: MoETransformer,
    source: TokenSource,
    monkeypatch: pytest.MonkeyPatch,
    quality: Literal["kl", "log_likelihood", "accuracy"],
    action: Literal["subset", "count"],
) -> None:
    """From the draw to the last reward no value is read back; a planted read is seen."""
    mdp = RoutingMDP(backbone, source, EnvConfig(quality=quality, action=action), num_sequences=2)
    actions = torch.ones(mdp.num_lanes, MAX_UNITS, dtype=torch.bool)
    reads = _HostReads(backbone, monkeypatch)
    with reads:
        mdp.reset(np.random.default_rng(SEED))
        for _ in range(NUM_SITES):
            price = mdp.unit_price
            step = mdp.step(actions if action == "subset" else actions.sum(1))
        assert reads.names == []
        assert price.sum().item() > 0
        assert step.reward[step.reward < 0].numel()
    assert reads.names == ["_local_scalar_dense", "index"]

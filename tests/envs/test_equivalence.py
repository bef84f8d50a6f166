"""One MDP, two orders: token by token with a cache equals site by site with all tokens at once.

The proof that what is trained is what is deployed. The orders multiply the same numbers in matrices of other shapes,
so they agree up to float32 rounding; the two site-order doors run the same tensors and agree to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import EnvConfig, RoutingEnv, RoutingMDP, RoutingVecEnv, RoutingVectorEnv, TokenSource, rollout
from moe_backbone import MoETransformer
from moe_backbone.attention import KeyValueCache
from moe_backbone.kernels import count_rows
from moe_backbone.sites import HeadMeaning

SEED = 5
NUM_SEQUENCES = 2
TOLERANCE = 2e-5
"""Absolute, float32: observations and rewards are of the order of 1 after four sublayers."""
QUALITIES: tuple[Literal["kl", "log_likelihood", "accuracy"], ...] = ("kl", "log_likelihood", "accuracy")
MEANINGS: tuple[HeadMeaning, ...] = ("query", "query_key_value")
CODECS = ("subset", "count", "ranked")
INFO_NAMES = ("cost", "quality", "price", "vector_reward", "reward_weights")
FLAVOURS = {
    "plain": {},
    "keep, gated heads, shared expert": {"mixing": "keep", "head_gate": True, "shared_intermediate_size": 8},
}


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One episode of every lane; the first axis is the site, the second the lane."""

    observations: np.ndarray
    rewards: np.ndarray
    info: dict[str, np.ndarray]


def _random_actions(mdp: RoutingMDP, seed: int = SEED) -> np.ndarray:
    """Actions of every lane at every site; the first lane takes the empty subset everywhere, the second the full."""
    generator = np.random.default_rng(seed)
    shape = (len(mdp.backbone.sites), mdp.num_lanes)
    if mdp.config.action == "count":
        actions = generator.integers(0, mdp.layout.max_units + 1, shape)
        most = mdp.layout.max_units
    elif mdp.config.action == "ranked":
        order = generator.random((*shape, mdp.layout.max_units)).argsort(-1)
        return order[..., : mdp.config.ranked_units]
    else:
        actions = generator.integers(0, 2, (*shape, mdp.layout.max_units), dtype=np.int8)
        most = 1
    actions[:, 0], actions[:, 1] = 0, most
    return actions


def _vector_rollout(env: RoutingVectorEnv, actions: np.ndarray, seed: int = SEED) -> Rollout:
    observation, _ = env.reset(seed=seed)
    observations, rewards, infos = [observation], [], []
    for action in actions:
        observation, reward, terminated, _, info = env.step(action)
        observations.append(info["final_obs"] if terminated.all() else observation)
        rewards.append(reward)
        infos.append(info["final_info"] if terminated.all() else info)
    return _pack(observations, rewards, infos)


def _pack(observations: list[Any], rewards: list[Any], infos: list[dict[str, Any]]) -> Rollout:
    return Rollout(
        observations=np.stack(observations),
        rewards=np.stack(rewards),
        info={name: np.stack([info[name] for info in infos]) for name in INFO_NAMES},
    )


def _decoded_rollout(
    env: RoutingEnv, tokens: np.ndarray, targets: np.ndarray, prices: np.ndarray, actions: np.ndarray
) -> Rollout:
    """The same episodes token by token; lanes in the order of the vector environment."""
    lanes = []
    options: dict[str, Any] | None
    for row in range(len(tokens)):
        options = {"tokens": tokens[row], "targets": targets[row], "price": float(prices[row])}
        for position in range(tokens.shape[1]):
            observation, _ = env.reset(options=options)
            options = None
            observations, rewards, infos = [observation], [], []
            for action in actions[:, row * tokens.shape[1] + position]:
                observation, reward, terminated, truncated, info = env.step(action)
                observations.append(observation)
                rewards.append(reward)
                infos.append(info)
            assert (terminated, truncated) == (True, False)
            lanes.append(_pack(observations, rewards, infos))
    return Rollout(
        observations=np.stack([lane.observations for lane in lanes], 1),
        rewards=np.stack([lane.rewards for lane in lanes], 1),
        info={name: np.stack([lane.info[name] for lane in lanes], 1) for name in INFO_NAMES},
    )


def _both_orders(backbone: MoETransformer, source: TokenSource, config: EnvConfig) -> tuple[Rollout, Rollout]:
    """Site order and decode order on the same tokens, prices and actions."""
    lanes = NUM_SEQUENCES * source.seq_len
    vector = RoutingVectorEnv(lanes, backbone, source, config)
    vector.reset(seed=SEED)
    batch = vector.mdp.batch
    actions = _random_actions(vector.mdp)
    by_site = _vector_rollout(vector, actions)
    single = RoutingEnv(backbone, source, config)
    by_token = _decoded_rollout(single, batch.tokens.numpy(), batch.targets.numpy(), batch.price.numpy(), actions)
    return by_site, by_token


def check_orders_agree(by_site: Rollout, by_token: Rollout) -> None:
    """Costs to the bit, everything else up to rounding."""
    np.testing.assert_array_equal(by_token.info["cost"], by_site.info["cost"])
    np.testing.assert_allclose(by_token.observations, by_site.observations, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(by_token.rewards, by_site.rewards, rtol=0, atol=TOLERANCE)
    for name in INFO_NAMES:
        np.testing.assert_allclose(by_token.info[name], by_site.info[name], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("action", CODECS)
@pytest.mark.parametrize("quality", QUALITIES)
def test_decoding_equals_running_site_by_site(
    source: TokenSource,
    backbone: MoETransformer,
    quality: Literal["kl", "log_likelihood", "accuracy"],
    action: Literal["subset", "count", "ranked"],
    flavour: str,
    meaning: HeadMeaning,
) -> None:
    """Observations, rewards, costs and info of random per-token actions do not depend on the order of the walk."""
    backbone = MoETransformer(replace(backbone.config, **FLAVOURS[flavour])).requires_grad_(False).eval()
    backbone.head_meaning = meaning
    config = EnvConfig(quality=quality, action=action, cache_price=0.3 if meaning == "query_key_value" else 0.0)
    by_site, by_token = _both_orders(backbone, source, config)
    check_orders_agree(by_site, by_token)
    assert by_site.rewards.std() > 0.01


def test_the_comparison_sees_a_cache_that_forgets(
    source: TokenSource, backbone: MoETransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding without the keys and values of earlier tokens is another MDP, and the check says so."""
    monkeypatch.setattr(KeyValueCache, "extend", lambda self, layer, keys, values: (keys, values))
    with pytest.raises(AssertionError):
        check_orders_agree(*_both_orders(backbone, source, EnvConfig()))


def test_the_comparison_sees_a_cache_that_miscounts_its_keys(
    source: TokenSource, backbone: MoETransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where keys are dropped, costs depend on how many earlier tokens kept."""
    backbone.head_meaning = "query_key_value"
    monkeypatch.setattr(rollout.Rollout, "earlier_keys", property(lambda self: None))
    with pytest.raises(AssertionError):
        check_orders_agree(*_both_orders(backbone, source, EnvConfig()))


def test_the_comparison_sees_a_token_that_reads_the_wrong_action(
    source: TokenSource, backbone: MoETransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifting the actions of the site-order walk by one lane is found."""
    decode = RoutingMDP.decode
    monkeypatch.setattr(RoutingMDP, "decode", lambda self, action: decode(self, action.roll(1, 0)))
    with pytest.raises(AssertionError):
        check_orders_agree(*_both_orders(backbone, source, EnvConfig()))


def test_same_seed_decodes_the_text_of_a_vector_environment_of_one_sequence(
    source: TokenSource, backbone: MoETransformer
) -> None:
    """Seed for seed the doors draw the same tokens and the same price, to the bit."""
    vector = RoutingVectorEnv(source.seq_len, backbone, source)
    vector.reset(seed=SEED)
    single = RoutingEnv(backbone, source)
    for position in range(source.seq_len):
        single.reset(seed=SEED if position == 0 else None)
        assert single.mdp.batch.tokens.tolist() == [[vector.mdp.batch.tokens[0, position]]]
        assert torch.equal(single.mdp.batch.price, vector.mdp.batch.price)
        for action in np.ones((len(backbone.sites), 4), dtype=np.int8):
            single.step(action)


@pytest.mark.parametrize(("rollouts_per_sequence", "balance_price"), [(1, 0.0), (2, 0.0), (2, 0.3)])
@pytest.mark.parametrize("credit", ["token", "sequence"])
@pytest.mark.parametrize("action", CODECS)
def test_both_vector_doors_agree_to_the_bit(
    source: TokenSource,
    backbone: MoETransformer,
    action: Literal["subset", "count", "ranked"],
    credit: Literal["token", "sequence"],
    rollouts_per_sequence: int,
    balance_price: float,
) -> None:
    """Same seed, same actions: equal observations, rewards, ends and infos over three episodes with restarts."""
    rules: dict[str, Any] = {"rollouts_per_sequence": rollouts_per_sequence, "balance_price": balance_price}
    config = EnvConfig(action=action, credit=credit, **rules)
    lanes = NUM_SEQUENCES * rollouts_per_sequence * source.seq_len
    vector = RoutingVectorEnv(lanes, backbone, source, config)
    sb3 = RoutingVecEnv(lanes, backbone, source, config)
    sb3.seed(SEED)
    np.testing.assert_array_equal(vector.reset(seed=SEED)[0], sb3.reset())
    for episode in range(3):
        for actions in _random_actions(vector.mdp, seed=episode):
            observation, reward, terminated, truncated, info = vector.step(actions)
            sb3_observation, sb3_reward, dones, sb3_infos = sb3.step(actions)
            np.testing.assert_array_equal(observation, sb3_observation)
            np.testing.assert_array_equal(reward, sb3_reward)
            np.testing.assert_array_equal(terminated, dones)
            assert not truncated.any()
        np.testing.assert_array_equal(info["final_obs"], [info["terminal_observation"] for info in sb3_infos])
        for name in (*INFO_NAMES, *(["balance"] if balance_price else [])):
            np.testing.assert_array_equal(info["final_info"][name], [info[name] for info in sb3_infos])


def test_reported_cost_is_the_rows_that_ran(source: TokenSource, backbone: MoETransformer) -> None:
    """At each step the kernels run one row for each chosen unit, and the cost is these rows' FLOPs, exactly."""
    backbone.backend = "compact"
    env = RoutingEnv(backbone, source)
    actions = np.random.default_rng(SEED).integers(0, 2, (source.seq_len, len(backbone.sites), 4), dtype=np.int8)
    for position in range(source.seq_len):
        env.reset(seed=SEED if position == 0 else None)
        for site, action in zip(backbone.sites, actions[position], strict=True):
            with count_rows() as rows:
                *_, info = env.step(action)
            assert set(rows) <= {site.kind}
            assert rows[site.kind] == action[: site.num_units].sum()
            flops = rows[site.kind] * (site.unit_flops + site.unit_flops_per_key * (position + 1))
            assert info["cost"] == np.float32(flops / env.mdp.meter.native_flops)


def test_cost_of_all_lanes_is_the_rows_that_ran(source: TokenSource, backbone: MoETransformer) -> None:
    """Site by site too: expert rows times their FLOPs are what the lanes are charged together."""
    backbone.backend = "compact"
    mdp = RoutingMDP(backbone, source, EnvConfig(), num_sequences=NUM_SEQUENCES)
    mdp.reset(np.random.default_rng(SEED))
    for site, action in zip(backbone.sites, _random_actions(mdp), strict=True):
        with count_rows() as rows:
            cost: Tensor = mdp.step(torch.from_numpy(action).bool()).cost
        assert rows[site.kind] == action[:, : site.num_units].sum()
        if site.kind == "experts":
            flops = rows[site.kind] * site.unit_flops
            np.testing.assert_allclose(cost.double().sum() * mdp.meter.native_flops, flops, rtol=1e-6)

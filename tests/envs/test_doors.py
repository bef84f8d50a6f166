"""Each door keeps the contract of its library: Gymnasium, gymnasium.vector, Stable-Baselines3."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from envs import EnvConfig, ObservationLayout, RoutingEnv, RoutingVecEnv, RoutingVectorEnv, TokenSource
from moe_backbone import MoETransformer, SiteView

ID = "routegym/TokenRouting-v0"
SEED = 3
NUM_SITES, MAX_UNITS, SEQ_LEN = 4, 4, 8
LANES = 2 * SEQ_LEN
CODECS: tuple[Literal["subset", "count"], ...] = ("subset", "count")
ALL_UNITS = np.ones((LANES, MAX_UNITS), dtype=np.int8)


def _drawn_actions(space: gym.Space[Any], steps: int) -> list[Any]:
    space.seed(SEED)
    return [space.sample() for _ in range(steps)]


@pytest.mark.parametrize("action", CODECS)
def test_gymnasium_checker_has_nothing_to_say(
    backbone: MoETransformer, source: TokenSource, action: Literal["subset", "count"]
) -> None:
    """`check_env` of the made environment, every render mode included, passes without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(ID, backbone=backbone, source=source, config=EnvConfig(action=action))
        check_env(env.unwrapped)


@pytest.mark.parametrize("action", CODECS)
def test_sb3_checker_has_nothing_to_say(
    make_env: Callable[..., RoutingEnv], action: Literal["subset", "count"]
) -> None:
    """SB3's checker, which is another one, passes without a warning too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check_env(make_env(EnvConfig(action=action)))


def test_make_gives_the_single_door_and_make_vec_the_vector_door(backbone: MoETransformer, source: TokenSource) -> None:
    """The id opens both doors, and the passive checker of `make` does not warn over two tokens."""
    env = gym.make(ID, backbone=backbone, source=source)
    assert isinstance(env.unwrapped, RoutingEnv)
    for token in range(2):
        env.reset(seed=SEED if token == 0 else None)
        for action in _drawn_actions(env.action_space, NUM_SITES):
            env.step(action)
    vector = gym.make_vec(ID, num_envs=LANES, backbone=backbone, source=source)
    assert isinstance(vector.unwrapped, RoutingVectorEnv)
    assert vector.num_envs == LANES


def test_spec_is_text() -> None:
    """Entry points are strings, so the spec can be written down and read back."""
    spec = gym.spec(ID)
    assert spec.vector_entry_point == "envs.vector_env:RoutingVectorEnv"
    assert json.loads(spec.to_json())["id"] == ID
    assert not spec.nondeterministic


def test_spaces_are_those_of_the_layout(
    make_env: Callable[..., RoutingEnv], make_vector: Callable[..., RoutingVectorEnv]
) -> None:
    """Finite float32 boxes; one bit a unit, or a count from none to all; batched as Gymnasium batches them."""
    env, vector = make_env(), make_vector()
    assert env.observation_space.shape == (32 + MAX_UNITS + NUM_SITES + 1,)
    assert env.observation_space.dtype == np.float32
    assert np.isfinite(env.observation_space.low).all()
    assert env.action_space == gym.spaces.MultiBinary(MAX_UNITS)
    assert make_env(EnvConfig(action="count")).action_space == gym.spaces.Discrete(MAX_UNITS + 1)
    assert vector.single_action_space == env.action_space
    assert vector.action_space == batch_space(env.action_space, LANES)
    assert vector.observation_space == batch_space(env.observation_space, LANES)


def test_observation_parts_lie_where_the_layout_says(
    make_env: Callable[..., RoutingEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features, scores and price of what a router sees, found by name; one-hot of the site; all zero at the end."""
    views: list[SiteView] = []
    fill = ObservationLayout.fill
    monkeypatch.setattr(
        ObservationLayout, "fill", lambda self, rows, view: views.append(view) or fill(self, rows, view)
    )
    env = make_env()
    layout = env.mdp.layout
    observation, _ = env.reset(seed=SEED, options={"price": 0.5})
    for site, units in enumerate((2, 4, 2, 4)):
        np.testing.assert_array_equal(observation[layout.features], views[site].features[0])
        np.testing.assert_array_equal(observation[layout.scores][:units], views[site].scores[0])
        assert (observation[layout.scores][units:] == 0).all()
        assert observation[layout.site].tolist() == np.eye(NUM_SITES)[site].tolist()
        np.testing.assert_allclose(observation[layout.log_price], np.log(0.5), rtol=1e-6)
        assert env.observation_space.contains(observation)
        observation, *_ = env.step(ALL_UNITS[0])
    assert (observation[layout.site] == 0).all()
    assert (observation[layout.scores] == 0).all()
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize("action", CODECS)
def test_twin_environments_walk_the_same_way(
    make_env: Callable[..., RoutingEnv],
    make_vector: Callable[..., RoutingVectorEnv],
    action: Literal["subset", "count"],
) -> None:
    """Same seed, same actions: 50 steps with restarts are equal to the bit; another seed is not."""
    config = EnvConfig(action=action)

    def walk(env: Any, seed: int) -> list[Any]:
        seen = [env.reset(seed=seed)[0]]
        for actions in _drawn_actions(env.action_space, 50):
            observation, reward, terminated, *_ = env.step(actions)
            seen += [observation, reward]
            if not isinstance(env, VectorEnv) and terminated:
                seen.append(env.reset()[0])
        return seen

    for make in (make_env, make_vector):
        first, second = walk(make(config), SEED), walk(make(config), SEED)
        assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
        other = walk(make(config), SEED + 1)
        assert not any(np.array_equal(one, other) for one, other in zip(first[:1], other[:1], strict=True))


def test_sb3_seed_is_used_once_at_the_next_reset(make_sb3: Callable[..., RoutingVecEnv]) -> None:
    """`seed` makes the next reset repeat itself; the reset after it goes on with new text."""
    env = make_sb3()
    env.seed(SEED)
    first, second = env.reset(), env.reset()
    env.seed(SEED)
    np.testing.assert_array_equal(env.reset(), first)
    np.testing.assert_array_equal(env.reset(), second)
    assert not np.array_equal(first, second)


def test_vector_lanes_end_together_and_start_again_in_the_same_step(
    make_vector: Callable[..., RoutingVectorEnv],
) -> None:
    """SAME_STEP: the last site's step returns the end under `final_*` and the first observation of new text."""
    env = make_vector()
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    layout = env.mdp.layout
    env.reset(seed=SEED)
    for episode in range(2):
        old_tokens = env.mdp.batch.tokens
        for site in range(NUM_SITES):
            observation, _, terminated, truncated, info = env.step(ALL_UNITS)
            assert terminated.tolist() == [site == NUM_SITES - 1] * LANES, episode
            assert not truncated.any()
            assert ("final_obs" in info) == terminated.all()
        assert info["_final_obs"].all()
        assert info["_final_info"].all()
        assert (info["final_obs"][:, layout.site] == 0).all()
        assert set(info["final_info"]) >= {"cost", "vector_reward", "reward_weights"}
        assert (observation[:, layout.site] == np.eye(NUM_SITES)[0]).all()
        assert not torch.equal(env.mdp.batch.tokens, old_tokens)


def test_sb3_lanes_restart_with_the_end_in_the_info(make_sb3: Callable[..., RoutingVecEnv]) -> None:
    """`terminal_observation` is the end, `episode` the undiscounted return, and no time limit is claimed."""
    env = make_sb3()
    env.seed(SEED)
    env.reset()
    total = np.zeros(LANES)
    for _ in range(NUM_SITES):
        observation, reward, dones, infos = env.step(ALL_UNITS)
        total += reward
    assert dones.all()
    layout = env.mdp.layout
    for lane, info in enumerate(infos):
        assert (info["terminal_observation"][layout.site] == 0).all()
        assert info["episode"]["r"] == pytest.approx(total[lane], abs=1e-6)
        assert info["episode"]["l"] == NUM_SITES
        assert not info.get("TimeLimit.truncated", False)
    assert (observation[:, layout.site] == np.eye(NUM_SITES)[0]).all()


def _arrays(value: Any) -> list[np.ndarray]:
    """All arrays inside nested results."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [array for item in value for array in _arrays(item)] if isinstance(value, list | tuple) else []


def test_no_array_is_handed_out_twice(
    make_env: Callable[..., RoutingEnv],
    make_vector: Callable[..., RoutingVectorEnv],
    make_sb3: Callable[..., RoutingVecEnv],
) -> None:
    """What a step returned never changes behind the caller's back: no memory is shared between two calls."""
    for env, actions in ((make_env(), ALL_UNITS[0]), (make_vector(), ALL_UNITS), (make_sb3(), ALL_UNITS)):
        results = [_arrays(env.reset())]
        for _ in range(2 * NUM_SITES):
            result = env.step(actions)
            results.append(_arrays(result))
            if isinstance(env, RoutingEnv) and result[2]:
                results.append(_arrays(env.reset()))
        for number, earlier in enumerate(results):
            for later in results[number + 1 :]:
                assert not any(np.shares_memory(one, other) for one in earlier for other in later), type(env)


def test_options_route_given_text_at_a_given_price(
    make_env: Callable[..., RoutingEnv], make_vector: Callable[..., RoutingVectorEnv]
) -> None:
    """Arrays of tokens and targets, and the price, are what the episode holds."""
    tokens = np.arange(LANES).reshape(2, SEQ_LEN)
    vector = make_vector()
    vector.reset(options={"tokens": tokens, "targets": tokens + 1, "price": 0.25})
    assert vector.mdp.batch.tokens.tolist() == tokens.tolist()
    assert vector.mdp.batch.targets.tolist() == (tokens + 1).tolist()
    assert vector.mdp.batch.price.tolist() == [0.25, 0.25]
    env = make_env()
    _, info = env.reset(options={"tokens": tokens[0], "targets": tokens[0] + 1, "price": 0.25})
    assert info == {"price": 0.25, "site": 0, "position": 0}
    assert env.mdp.batch.tokens.tolist() == [[0]]


def test_tokens_follow_each_other_until_the_sequence_ends(make_env: Callable[..., RoutingEnv]) -> None:
    """`reset` moves to the next token; leaving a token half-way starts a new sequence, as its keys are missing."""
    env = make_env()
    positions = []
    for _ in range(SEQ_LEN + 2):
        positions.append(env.reset()[1]["position"])
        for _ in range(NUM_SITES):
            env.step(ALL_UNITS[0])
    assert positions == [*range(SEQ_LEN), 0, 1]
    assert env.reset()[1]["position"] == 2
    env.step(ALL_UNITS[0])
    assert env.reset()[1]["position"] == 0


def test_render_draws_the_units_of_the_token_that_ran(make_env: Callable[..., RoutingEnv]) -> None:
    """One line a site, `#` for a unit that ran; without a render mode there is nothing."""
    env = make_env(render_mode="ansi")
    with pytest.raises(ResetNeeded, match="reset must be called before render"):
        env.render()
    env.reset(seed=SEED)
    assert env.render() == "token 0"
    for action in ([1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]):
        env.step(np.array(action, dtype=np.int8))
    lines = (env.render() or "").splitlines()
    assert lines[0] == "token 0"
    assert [line.split() for line in lines[1:]] == [
        ["layer0.heads", "#."],
        ["layer0.experts", ".##."],
        ["layer1.heads", ".."],
        ["layer1.experts", "####"],
    ]
    env.reset()
    assert env.render() == "token 1"
    assert make_env().render() is None

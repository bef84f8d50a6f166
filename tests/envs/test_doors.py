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
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.evaluation import evaluate_policy

from envs import EnvConfig, ObservationLayout, RoutingEnv, RoutingVecEnv, RoutingVectorEnv, TokenSource
from moe_backbone import MoETransformer, SiteView

ID = "routegym/TokenRouting-v0"
SEED = 3
NUM_SITES, MAX_UNITS, NUM_HEADS, SEQ_LEN = 4, 4, 2, 8
LANES = 2 * SEQ_LEN
CODECS: tuple[Literal["subset", "count"], ...] = ("subset", "count")
ALL_UNITS = np.ones((LANES, MAX_UNITS), dtype=np.int8)


@pytest.fixture
def make_env(backbone: MoETransformer, source: TokenSource) -> Callable[..., RoutingEnv]:
    """One lane, token by token."""

    def make(config: EnvConfig | None = None, **kwargs: Any) -> RoutingEnv:
        return RoutingEnv(backbone, source, config, **kwargs)

    return make


@pytest.fixture
def make_vector(backbone: MoETransformer, source: TokenSource) -> Callable[..., RoutingVectorEnv]:
    """Two sequences, site by site."""

    def make(config: EnvConfig | None = None, num_envs: int = LANES) -> RoutingVectorEnv:
        return RoutingVectorEnv(num_envs, backbone, source, config)

    return make


@pytest.fixture
def make_sb3(backbone: MoETransformer, source: TokenSource) -> Callable[..., RoutingVecEnv]:
    """The same for Stable-Baselines3."""

    def make(config: EnvConfig | None = None, num_envs: int = LANES) -> RoutingVecEnv:
        return RoutingVecEnv(num_envs, backbone, source, config)

    return make


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
    pack = ObservationLayout.pack
    monkeypatch.setattr(ObservationLayout, "pack", lambda self, view: views.append(view) or pack(self, view))
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


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.ones(3, dtype=np.int8), r"shape \(1, 4\), got \(1, 3\)"),
        (np.ones((1, 4), dtype=np.int8), r"shape \(1, 4\), got \(1, 1, 4\)"),
        (1, r"shape \(1, 4\), got \(1,\)"),
        (np.full(4, 2), r"whole numbers in \[0, 1\]"),
        (np.full(4, -1), r"whole numbers in \[0, 1\]"),
        (np.full(4, 0.5), r"whole numbers in \[0, 1\], got float64"),
        (np.full(4, np.nan), r"whole numbers in \[0, 1\], got float64"),
        (np.array(["1"] * 4), r"whole numbers in \[0, 1\], got <U1"),
        (np.array([None] * 4), r"whole numbers in \[0, 1\], got object"),
        (np.full(4, 1j), r"whole numbers in \[0, 1\], got complex128"),
    ],
    ids=["short", "one axis more", "scalar", "two", "negative", "half", "nan", "text", "none", "complex"],
)
def test_impossible_subset_is_refused(make_env: Callable[..., RoutingEnv], action: Any, message: str) -> None:
    """The message names the rule and what was given, and the environment still stands where it stood."""
    env = make_env()
    env.reset(seed=SEED)
    with pytest.raises(InvalidAction, match=message):
        env.step(action)
    assert env.step(ALL_UNITS[0])[4]["site"] == 1


@pytest.mark.parametrize("action", [-1, 5, 1.5, np.array([1]), float("inf")], ids=str)
def test_impossible_count_is_refused(make_env: Callable[..., RoutingEnv], action: Any) -> None:
    """A count must be a whole number from none to all units."""
    env = make_env(EnvConfig(action="count"))
    env.reset(seed=SEED)
    with pytest.raises(InvalidAction, match=r"whole numbers in \[0, 4\]|shape \(1,\)"):
        env.step(action)


def test_vector_doors_refuse_impossible_actions(
    make_vector: Callable[..., RoutingVectorEnv], make_sb3: Callable[..., RoutingVecEnv]
) -> None:
    """One row a lane, entries 0 and 1."""
    for env in (make_vector(), make_sb3()):
        env.reset()
        with pytest.raises(InvalidAction, match=r"shape \(16, 4\), got \(15, 4\)"):
            env.step(ALL_UNITS[1:])
        with pytest.raises(InvalidAction, match=r"whole numbers in \[0, 1\]"):
            env.step(3 * ALL_UNITS)


def test_step_needs_a_reset(
    make_env: Callable[..., RoutingEnv],
    make_vector: Callable[..., RoutingVectorEnv],
    make_sb3: Callable[..., RoutingVecEnv],
) -> None:
    """Before the first reset at every door, and after the last site where nothing restarts by itself."""
    env = make_env()
    for door, actions in ((env, ALL_UNITS[0]), (make_vector(), ALL_UNITS), (make_sb3(), ALL_UNITS)):
        with pytest.raises(ResetNeeded, match="reset must be called before"):
            door.step(actions)
    env.reset(seed=SEED)
    for _ in range(NUM_SITES):
        env.step(ALL_UNITS[0])
    with pytest.raises(ResetNeeded, match="after each last site"):
        env.step(ALL_UNITS[0])
    env.reset()
    env.step(ALL_UNITS[0])


@pytest.mark.parametrize("price", [float("nan"), -1.0, 0.0, float("inf"), 1e-60, 1e60], ids=str)
def test_impossible_price_is_refused(
    make_env: Callable[..., RoutingEnv], make_vector: Callable[..., RoutingVectorEnv], price: float
) -> None:
    """At reset, at both doors: a price must be positive and finite, in float32 too, or observations would not be."""
    for env in (make_env(), make_vector()):
        with pytest.raises(ValueError, match="price must be positive and finite, got"):
            env.reset(options={"price": price})


@pytest.mark.parametrize("price", [float("nan"), -1.0, 0.0, float("inf")], ids=str)
def test_impossible_price_range_is_refused(price: float) -> None:
    """In the rules as well, each end by its name."""
    with pytest.raises(ValueError, match="price_low must be positive and finite, got"):
        EnvConfig(price_low=price)
    with pytest.raises(ValueError, match="price_high must be positive and finite, got"):
        EnvConfig(price_high=price)


def test_impossible_rules_are_refused() -> None:
    """Each message gives name, rule and value."""
    with pytest.raises(ValueError, match=r"price_high must be at least price_low=0.5, got 0.1"):
        EnvConfig(price_low=0.5, price_high=0.1)
    with pytest.raises(ValueError, match="rollouts_per_sequence must be at least 1, got 0"):
        EnvConfig(rollouts_per_sequence=0)
    for name in ("quality", "credit", "action"):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'else'"):
            EnvConfig(**{name: "else"})


@pytest.mark.parametrize("num_envs", [0, -8, 7, 24], ids=str)
def test_lanes_must_fill_whole_groups(
    make_vector: Callable[..., RoutingVectorEnv], make_sb3: Callable[..., RoutingVecEnv], num_envs: int
) -> None:
    """A lane is a token, so their number is a multiple of sequence length times copies."""
    config = EnvConfig(rollouts_per_sequence=2)
    for make in (make_vector, make_sb3):
        with pytest.raises(ValueError, match=rf"num_envs must be a positive multiple of .*=16 .*, got {num_envs}"):
            make(config, num_envs=num_envs)


def test_rules_that_do_not_fit_decoding_are_refused(make_env: Callable[..., RoutingEnv]) -> None:
    """A mean over the sequence is not known while it is decoded, and one lane holds no copies."""
    with pytest.raises(ValueError, match="credit must be 'token' when tokens are decoded one by one, got 'sequence'"):
        make_env(EnvConfig(credit="sequence"))
    with pytest.raises(ValueError, match="rollouts_per_sequence must be 1 for one lane, got 4"):
        make_env(EnvConfig(rollouts_per_sequence=4))
    with pytest.raises(ValueError, match="render_mode must be None or 'ansi', got 'human'"):
        make_env(render_mode="human")


def test_unknown_options_are_refused(
    make_env: Callable[..., RoutingEnv], make_vector: Callable[..., RoutingVectorEnv]
) -> None:
    """A misspelt option is not silently ignored, and tokens need their next tokens."""
    for env in (make_env(), make_vector()):
        with pytest.raises(ValueError, match="options must be among tokens, targets, price, got cost"):
            env.reset(options={"cost": 1.0})
        with pytest.raises(ValueError, match="tokens and targets must both have shape"):
            env.reset(options={"tokens": np.zeros((env.mdp.num_sequences, SEQ_LEN), dtype=np.int64)})
        for token in (-1, 32, 1.5):
            tokens = np.full((env.mdp.num_sequences, SEQ_LEN), token)
            with pytest.raises(ValueError, match=r"tokens must hold whole numbers in \[0, vocab_size=32\)"):
                env.reset(options={"tokens": tokens, "targets": tokens})


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


def test_units_beyond_the_sites_own_are_ignored(make_env: Callable[..., RoutingEnv]) -> None:
    """Bits 2 and 3 mean nothing at a site of two heads: same observation, reward and cost."""
    outcomes = []
    for spare in (0, 1):
        env = make_env()
        env.reset(seed=SEED)
        observation, reward, _, _, info = env.step(np.array([1, 0, spare, spare], dtype=np.int8))
        outcomes.append((observation.tolist(), reward, info["cost"]))
    assert outcomes[0] == outcomes[1]


def test_counts_beyond_the_sites_own_mean_all_of_them(make_env: Callable[..., RoutingEnv]) -> None:
    """Four of two heads are two heads."""
    costs = []
    for count in range(MAX_UNITS + 1):
        env = make_env(EnvConfig(action="count"))
        env.reset(seed=SEED)
        costs.append(env.step(count)[4]["cost"])
    np.testing.assert_allclose(np.array(costs) / costs[1], [0, 1, 2, 2, 2], rtol=1e-6)


@pytest.mark.parametrize("action", CODECS)
def test_empty_subset_costs_nothing_and_passes_the_token_on(
    make_env: Callable[..., RoutingEnv], action: Literal["subset", "count"]
) -> None:
    """Nothing runs anywhere: no cost, no reward but the quality lost, and the residual stream is the embedding."""
    env = make_env(EnvConfig(action=action))
    env.reset(seed=SEED)
    embedded = env.mdp.state.hidden.clone()
    nothing: Any = np.zeros(MAX_UNITS, dtype=np.int8) if action == "subset" else 0
    steps = [env.step(nothing) for _ in range(NUM_SITES)]
    assert [step[4]["cost"] for step in steps] == [0.0] * NUM_SITES
    assert [step[1] for step in steps[:-1]] == [0.0] * (NUM_SITES - 1)
    assert steps[-1][1] == steps[-1][4]["quality"] < 0
    assert torch.equal(env.mdp.state.hidden, embedded)


@pytest.mark.parametrize("action", CODECS)
def test_reward_is_the_weighted_vector_reward(
    make_env: Callable[..., RoutingEnv],
    make_vector: Callable[..., RoutingVectorEnv],
    action: Literal["subset", "count"],
) -> None:
    """`vector_reward @ reward_weights`, with quality and minus cost in it, at every step of both doors."""
    env, vector = make_env(EnvConfig(action=action)), make_vector(EnvConfig(action=action))
    env.reset(seed=SEED)
    vector.reset(seed=SEED)
    for single_action, actions in zip(
        _drawn_actions(env.action_space, NUM_SITES), _drawn_actions(vector.action_space, NUM_SITES), strict=True
    ):
        _, reward, _, _, info = env.step(single_action)
        assert reward == pytest.approx(info["vector_reward"] @ info["reward_weights"], abs=1e-6)
        assert info["vector_reward"].tolist() == [info["quality"], -info["cost"]]
        assert info["reward_weights"].tolist() == [1.0, info["price"]]
        _, rewards, terminated, _, infos = vector.step(actions)
        infos = infos["final_info"] if terminated.all() else infos
        expected = (infos["vector_reward"] * infos["reward_weights"]).sum(1)
        np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-6)
        assert infos["cost"].shape == (LANES,)


def _weights(model: BaseAlgorithm) -> list[torch.Tensor]:
    return [weight.clone() for weight in model.policy.state_dict().values()]


ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], Literal["subset", "count"], dict[str, Any]]] = {
    "ppo": (PPO, "subset", {"n_steps": NUM_SITES, "batch_size": NUM_SITES, "n_epochs": 1}),
    "a2c": (A2C, "subset", {"n_steps": NUM_SITES}),
    "dqn": (DQN, "count", {"learning_starts": LANES, "batch_size": LANES, "train_freq": 1, "buffer_size": 256}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("door", ["sb3", "single"])
def test_stock_algorithms_train_unmodified(
    make_env: Callable[..., RoutingEnv], make_sb3: Callable[..., RoutingVecEnv], name: str, door: str
) -> None:
    """SB3's own algorithms with their own networks learn from both doors: finite weights that moved."""
    algorithm, action, settings = ALGORITHMS[name]
    config = EnvConfig(action=action)
    env = make_sb3(config) if door == "sb3" else make_env(config)
    model = algorithm("MlpPolicy", env, seed=SEED, policy_kwargs={"net_arch": [8]}, **settings)
    before = _weights(model)
    model.learn(4 * NUM_SITES * LANES if door == "sb3" else 12 * NUM_SITES)
    after = _weights(model)
    assert all(weight.isfinite().all() for weight in after)
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert {episode["l"] for episode in model.ep_info_buffer or []} == {NUM_SITES}


def test_sb3_evaluates_a_policy_on_the_vector_door(make_sb3: Callable[..., RoutingVecEnv]) -> None:
    """`evaluate_policy` sees every lane's episode end after all sites."""
    env = make_sb3()
    model = PPO("MlpPolicy", env, n_steps=NUM_SITES, batch_size=LANES, policy_kwargs={"net_arch": [8]})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Evaluation environment is not wrapped with a ``Monitor`` wrapper")
        returns, lengths = evaluate_policy(model, env, n_eval_episodes=LANES, return_episode_rewards=True)
    assert lengths == [NUM_SITES] * LANES
    assert np.isfinite(returns).all()

"""What cannot be is refused, with a message that gives name, rule and actual value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded

from envs import EnvConfig, RoutingEnv, RoutingMDP, RoutingVecEnv, RoutingVectorEnv, TokenSource
from moe_backbone import MoETransformer

SEED = 3
NUM_SITES, MAX_UNITS, SEQ_LEN = 4, 4, 8
LANES = 2 * SEQ_LEN
ALL_UNITS = np.ones((LANES, MAX_UNITS), dtype=np.int8)


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
    for price in (-0.5, float("nan")):
        with pytest.raises(ValueError, match=f"balance_price must be at least 0, got {price}"):
            EnvConfig(balance_price=price)
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
    with pytest.raises(ValueError, match=r"balance_price must be 0 for one lane, .* means nothing, got 0\.5"):
        make_env(EnvConfig(balance_price=0.5))
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


def test_a_price_of_the_cache_needs_keys_that_can_be_dropped(backbone: MoETransformer, source: TokenSource) -> None:
    """Under the other head meaning every token leaves the same."""
    with pytest.raises(ValueError, match=r"cache_price must be 0 where every token leaves .*, got 0\.5"):
        RoutingMDP(backbone, source, EnvConfig(cache_price=0.5))
    with pytest.raises(ValueError, match=r"cache_price must be at least 0, got -1"):
        EnvConfig(cache_price=-1)

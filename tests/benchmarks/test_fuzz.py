"""Damaged and hostile files: every reader reads them or refuses with one line; and actions that are none."""

from __future__ import annotations

import io
import json
import pickle
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from benchmarks import fuzz
from benchmarks.fuzz import TARGETS, attack, seed_input
from envs import EnvConfig, RoutingVectorEnv
from envs.planted import PlantedSource, planted_backbone

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LANES = 8


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A good file with a part of it cut out, doubled or overwritten; or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 40)))
    return (
        whole[:start] + draw(st.sampled_from([b"", whole[start:end] * 2, draw(st.binary(max_size=40))])) + whole[end:]
    )


@pytest.mark.parametrize("name", TARGETS)
@QUICK
@given(data=st.data())
def test_readers_read_or_refuse(name: str, data: st.DataObject) -> None:
    """No other exception, no message of several lines."""
    attack(name, data.draw(damaged(seed_input(name))))


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_are_read(name: str) -> None:
    """What is attacked works without the attack."""
    assert attack(name, seed_input(name))


class _Payload:
    """Shows itself where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code from data was run",))


def _changed(name: str, **changes: Any) -> bytes:
    """A good JSON file with other values."""
    content = json.loads(seed_input(name))
    for path, value in changes.items():
        place = content
        *way, last = path.split("__")
        for part in way:
            place = place[part]
        place[last] = value
    return json.dumps(content).encode()


def _bomb() -> bytes:
    """A checkpoint of a gigabyte of zeros, packed into one megabyte."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("last/data.pkl", "w") as entry:
        for _ in range(64):
            entry.write(bytes(2**24))
    return file.getvalue()


def _hostile() -> Iterator[tuple[str, bytes]]:
    for name in ("checkpoint", "router", "router-weights", "backbone", "backbone-weights", "config", "trace"):
        yield name, pickle.dumps(_Payload())
    for name in ("router", "backbone", "config"):
        yield name, b"[" * 100_000
        yield name, b'{"a":' * 100_000
    for name, value in {"hidden_size": 2**40, "num_layers": 2**40, "seq_len": 2**40, "num_experts": 1.5}.items():
        yield "backbone", _changed("backbone", **{f"config__{name}": value})
    yield "router", _changed("router", router__hidden_size=2**40)
    yield "config", _changed("config", total_timesteps=1.5)
    yield "config", _changed("config", env__price_low=float("nan"))
    yield "config", _changed("config", corpus="text")
    yield "config", _changed("config", order="backwards")
    yield "checkpoint", _bomb()


def test_hostile_files_are_refused() -> None:
    """Pickles, deep nesting, sizes beyond all memory, types that are none, a packed gigabyte: at once."""
    for name, data in _hostile():
        started = time.monotonic()
        assert not attack(name, data), f"{name}: {data[:80]!r}"
        assert time.monotonic() - started < fuzz.HANG


@QUICK
@given(
    action=arrays.arrays(
        dtype=st.sampled_from([np.bool_, np.int8, np.int64, np.float32, object]),
        shape=st.sampled_from([(LANES, 4), (LANES, 3), (LANES,), (4,), (), (0, 4), (LANES, 4, 1)]),
        elements=st.sampled_from([0, 1]),
    ),
    wrong=st.sampled_from([0, 1, 2, -1]),
)
def test_actions_run_or_are_refused(action: Any, wrong: int) -> None:
    """Zeros and ones of the right shape run; everything else is an `InvalidAction` and the episode stays as it was."""
    env = RoutingVectorEnv(LANES, planted_backbone(), PlantedSource(), EnvConfig())
    env.reset(seed=0)
    if action.dtype != np.bool_ and action.size:
        action.flat[0] = wrong
    try:
        observation, *_ = env.step(action)
    except InvalidAction as error:
        assert "\n" not in str(error)
        observation, *_ = env.step(np.zeros((LANES, 4), dtype=np.int8))
    assert observation.shape == env.observation_space.shape
    assert torch.from_numpy(observation).isfinite().all()

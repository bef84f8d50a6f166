"""Impossible settings are refused in one line: name, rule, actual value."""

from __future__ import annotations

from typing import Any

import pytest

from moe_backbone import BackboneConfig
from moe_backbone.pretrain import PretrainConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"vocab_size": 0}, "vocab_size must be at least 1, got 0", id="vocab_size"),
        pytest.param({"hidden_size": 0}, "hidden_size must be at least 1, got 0", id="hidden_size"),
        pytest.param({"num_layers": -1}, "num_layers must be at least 1, got -1", id="num_layers"),
        pytest.param({"num_heads": 0}, "num_heads must be at least 1, got 0", id="num_heads"),
        pytest.param({"num_experts": 0}, "num_experts must be at least 1, got 0", id="num_experts"),
        pytest.param({"intermediate_size": 0}, "intermediate_size must be at least 1, got 0", id="intermediate_size"),
        pytest.param({"seq_len": 1}, "seq_len must lie in [2, 1048576], got 1", id="seq_len"),
        pytest.param({"top_k": 17}, "top_k must lie in [1, num_experts=16], got 17", id="top_k above"),
        pytest.param({"top_k": 0}, "top_k must lie in [1, num_experts=16], got 0", id="top_k below"),
        pytest.param(
            {"hidden_size": 40}, "hidden_size must be a multiple of 2 * num_heads=16, got 40", id="odd head size"
        ),
        pytest.param(
            {"shared_intermediate_size": -1}, "shared_intermediate_size must be at least 0, got -1", id="shared"
        ),
        pytest.param({"rope_theta": 0.0}, "rope_theta must be positive, got 0.0", id="rope_theta"),
        pytest.param(
            {"mixing": "sum"}, "mixing must be 'renormalize', 'keep' or 'gate_vector', got 'sum'", id="mixing"
        ),
    ],
)
def test_backbone_config_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    """The message of a refused size is exactly name, rule and actual value."""
    with pytest.raises(ValueError) as error:
        BackboneConfig(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"steps": 0}, "steps must be at least 1, got 0", id="steps"),
        pytest.param({"sequences": 0}, "sequences must be at least 1, got 0", id="sequences"),
        pytest.param({"eval_every": 0}, "eval_every must be at least 1, got 0", id="eval_every"),
        pytest.param({"patience": 0}, "patience must be at least 1, got 0", id="patience"),
        pytest.param({"random_routing": 1.5}, "random_routing must lie in [0, 1], got 1.5", id="random_routing"),
        pytest.param({"random_from": -0.5}, "random_from must lie in [0, 1], got -0.5", id="random_from"),
        pytest.param({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0", id="learning_rate"),
        pytest.param({"learning_rate": float("nan")}, "learning_rate must be positive, got nan", id="nan"),
    ],
)
def test_pretrain_config_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    """The message of a refused training setting is exactly name, rule and actual value."""
    with pytest.raises(ValueError) as error:
        PretrainConfig(**changes)
    assert str(error.value) == message


def test_max_units_is_the_width_of_the_largest_site() -> None:
    """An action must hold the heads and the experts, whichever are more."""
    assert BackboneConfig(num_heads=4, num_experts=8).max_units == 8
    assert BackboneConfig(num_heads=8, num_experts=4).max_units == 8


def test_the_default_backbone_keeps_its_name() -> None:
    """Its hash and the key of its cached weights are made from this text: a new field would train it again."""
    assert repr(BackboneConfig()) == (
        "BackboneConfig(vocab_size=256, hidden_size=128, num_layers=4, num_heads=8, num_experts=16, top_k=4, "
        "intermediate_size=96, shared_intermediate_size=0, head_gate=False, mixing='renormalize', seq_len=128, "
        "rope_theta=10000.0)"
    )

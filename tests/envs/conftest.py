"""A backbone whose sites differ in width, and random text for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import EnvConfig, RoutingEnv, RoutingVecEnv, RoutingVectorEnv, TokenSource
from moe_backbone import BackboneConfig, MoETransformer

CONFIG = BackboneConfig(
    vocab_size=32, hidden_size=32, num_layers=2, num_heads=2, num_experts=4, top_k=2, intermediate_size=16, seq_len=8
)
"""Two heads and four experts: an action has units that head sites do not have."""
LANES = 2 * CONFIG.seq_len


class UniformSource:
    """Every token equally likely, from the generator it is given."""

    seq_len = CONFIG.seq_len

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens, each (count, seq_len), int64."""
        text = torch.from_numpy(generator.integers(0, CONFIG.vocab_size, (count, self.seq_len + 1)))
        return text[:, :-1], text[:, 1:]


@pytest.fixture
def backbone(seed: int) -> MoETransformer:
    """Seeded random weights, frozen."""
    return MoETransformer(CONFIG).requires_grad_(False).eval()


@pytest.fixture
def source() -> TokenSource:
    """Random text that follows the generator."""
    return UniformSource()


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

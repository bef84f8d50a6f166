"""The routing MDP and its three doors. Importing this package registers the Gymnasium ids."""

from gymnasium.envs.registration import register, registry

from envs.checker import check_vector_env
from envs.config import EnvConfig
from envs.layout import ObservationLayout
from envs.mdp import RoutingMDP, Step, TokenBatch
from envs.routing_env import RoutingEnv
from envs.sb3_env import RoutingVecEnv
from envs.token_source import CorpusSource, FixedSource, TokenSource
from envs.vector_env import RoutingVectorEnv

if "routegym/TokenRouting-v0" not in registry:
    register(
        id="routegym/TokenRouting-v0",
        entry_point="envs.routing_env:RoutingEnv",
        vector_entry_point="envs.vector_env:RoutingVectorEnv",
    )

__all__ = [
    "CorpusSource",
    "EnvConfig",
    "FixedSource",
    "ObservationLayout",
    "RoutingEnv",
    "RoutingMDP",
    "RoutingVecEnv",
    "RoutingVectorEnv",
    "Step",
    "TokenBatch",
    "TokenSource",
    "check_vector_env",
]

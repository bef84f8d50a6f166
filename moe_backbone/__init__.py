"""Mixture-of-experts transformer whose routing comes from outside; knows nothing of reinforcement learning."""

from moe_backbone.compute import ComputeMeter, fixed_flops, native_shares
from moe_backbone.config import BackboneConfig
from moe_backbone.quality import token_correct, token_divergence, token_log_likelihood
from moe_backbone.sites import Backbone, NativeRouter, Router, RoutingSite, SiteView, best_units
from moe_backbone.transformer import MoETransformer, RoutingState

__all__ = [
    "Backbone",
    "BackboneConfig",
    "ComputeMeter",
    "MoETransformer",
    "NativeRouter",
    "Router",
    "RoutingSite",
    "RoutingState",
    "SiteView",
    "best_units",
    "fixed_flops",
    "native_shares",
    "token_correct",
    "token_divergence",
    "token_log_likelihood",
]

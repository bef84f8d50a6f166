"""What families of fixed routers measure on training text, each thing once and only if one asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor

from moe_backbone.sites import Backbone
from policies.baselines.attention_score import UnitKeys, fit_unit_keys
from policies.baselines.pruning import expert_importance, head_importance, routing_mass


class Calibration:
    """A backbone, the training text that routers are fitted on, and what is known of both.

    Args:
        backbone: What the routers are for.
        tokens: Training text (num_sequences, seq_len), int64.
        targets: Next tokens, same shape.
        seed: Seed of the random routers.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor, targets: Tensor, seed: int) -> None:
        self.backbone, self.tokens, self.targets, self.seed = backbone, tokens, targets, seed
        self.expert_sites = [site for site in backbone.sites if site.kind == "experts"]
        self.head_sites = [site for site in backbone.sites if site.kind == "heads"]

    @property
    def fewest_experts(self) -> int:
        """Experts of the smallest site."""
        return min(site.num_units for site in self.expert_sites)

    @property
    def native_experts(self) -> int:
        """Experts of a token at the site with the fewest; 1 where there are only heads, which no count then changes."""
        return min((site.native_units for site in self.expert_sites), default=1)

    @property
    def halved_experts(self) -> tuple[int, ...]:
        """The native number of experts and half of it."""
        return tuple(sorted({self.native_experts, max(1, self.native_experts // 2)}, reverse=True))

    def head_counts(self, shares: Sequence[float]) -> list[int]:
        """Heads of the smallest site that make up each share, at least one, none twice."""
        fewest = min(site.num_units for site in self.head_sites)
        return sorted({max(1, round(share * fewest)) for share in shares}, reverse=True)

    @cached_property
    def head_importance(self) -> Mapping[int, Tensor]:
        """See `pruning.head_importance`."""
        return head_importance(self.backbone, self.tokens, self.targets)

    @cached_property
    def expert_importance(self) -> Mapping[int, Tensor]:
        """See `pruning.expert_importance`."""
        return expert_importance(self.backbone, self.tokens, self.targets)

    @cached_property
    def routing_mass(self) -> Mapping[int, Tensor]:
        """See `pruning.routing_mass`."""
        return routing_mass(self.backbone, self.tokens)

    @cached_property
    def expert_keys(self) -> Mapping[int, UnitKeys]:
        """Keys of the experts; see `attention_score.fit_unit_keys`."""
        return fit_unit_keys(self.backbone, self.tokens, self.targets, heads=False)

    @cached_property
    def unit_keys(self) -> Mapping[int, UnitKeys]:
        """The same with keys of the heads."""
        return fit_unit_keys(self.backbone, self.tokens, self.targets, heads=True)

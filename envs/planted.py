"""A planted problem: a tiny backbone whose best subset is known for every token.

Four experts each know the right answer for one class of tokens and are wrong on the others; the native gate always
picks a wrong one, and the heads do nothing. One layer, so no token's routing touches another token, and the best of
all subsets can be found by trying them.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from envs.config import EnvConfig
from envs.mdp import RoutingMDP, TokenBatch
from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.experts import ExpertLayer

VOCAB, EXPERTS, CONSTANT, ANSWERS, WIDTH = 8, 4, 8, 16, 32
PLANTED_CONFIG = BackboneConfig(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_layers=1,
    num_heads=2,
    num_experts=EXPERTS,
    top_k=1,
    intermediate_size=VOCAB,
    seq_len=8,
)
PLANTED_RULES = EnvConfig(quality="log_likelihood", price_low=0.5, price_high=0.5, rollouts_per_sequence=4)
"""Quality that can exceed native, one fixed price."""


class PlantedSource:
    """Uniform tokens; the next token to predict is three further on in the vocabulary."""

    seq_len = PLANTED_CONFIG.seq_len

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens, each (count, seq_len), int64."""
        tokens = torch.from_numpy(generator.integers(0, VOCAB, (count, self.seq_len)))
        return tokens, (tokens + 3) % VOCAB


@torch.no_grad()
def planted_backbone() -> MoETransformer:
    """The backbone: token `t` has class `t % 4`; expert `t % 4` answers `t + 3`, the others `t + 4`."""
    backbone = MoETransformer(PLANTED_CONFIG)
    for name, parameter in backbone.named_parameters():
        parameter.fill_(1.0 if name.startswith("norms") else 0.0)
    tokens = torch.arange(VOCAB)
    backbone.embedding.weight[tokens, tokens] = 1.0
    backbone.embedding.weight[:, CONSTANT] = 1.0
    experts = backbone.expert_layers[0]
    assert isinstance(experts, ExpertLayer)
    for expert in range(EXPERTS):
        experts.gate_up[expert, CONSTANT, :VOCAB] = 1.0
        experts.gate_up[expert, tokens, VOCAB + tokens] = 1.0
        answer = torch.where(tokens % EXPERTS == expert, tokens + 3, tokens + 4) % VOCAB
        experts.down[expert, tokens, ANSWERS + answer] = 0.1
    experts.gate.weight[(tokens + 1) % EXPERTS, tokens] = 0.25
    backbone.output_head.weight[tokens, ANSWERS + tokens] = 1.0
    return backbone.requires_grad_(False).eval()


def oracle_return(mdp: RoutingMDP, batch: TokenBatch) -> Tensor:
    """Return of the best subset of every token, by trying all of them (num_lanes,), float32."""
    units = [site.num_units for site in mdp.backbone.sites]
    best = torch.full((batch.tokens.numel(),), -torch.inf)
    for bits in itertools.product(*(itertools.product((False, True), repeat=count) for count in units)):
        best = torch.maximum(best, episode_return(mdp, batch, [torch.tensor(site) for site in bits]))
    return best


def episode_return(mdp: RoutingMDP, batch: TokenBatch, subsets: list[Tensor]) -> Tensor:
    """Return of one subset a site, the same for all lanes; each bool (num_units,) or (num_lanes, num_units)."""
    mdp.begin(batch)
    total = torch.zeros(batch.tokens.numel())
    for subset in subsets:
        action = torch.zeros(len(total), mdp.layout.max_units, dtype=torch.bool)
        action[:, : subset.shape[-1]] = subset
        total += mdp.step(action).reward
    return total

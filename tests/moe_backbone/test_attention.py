"""The attention sublayer against a textbook one, and its head gate."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.attention import Attention, rotation_table
from moe_backbone.kernels import rotate


def _update(backbone: MoETransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Features before the first site, and what attention with all heads adds there."""
    state = backbone.begin(tokens)
    after = backbone.advance(state, torch.ones(tokens.numel(), backbone.config.num_heads, dtype=torch.bool))
    return state.features, after.hidden - state.hidden


def test_attention_with_all_heads_is_textbook_attention(tiny_backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """Queries and keys are both rotated to their positions, and every head counts once."""
    features, update = _update(tiny_backbone, tiny_tokens)
    attention, config = tiny_backbone.attentions[0], tiny_backbone.config
    assert isinstance(attention, Attention)
    rotation = rotation_table(config)
    keys, values = (features @ attention.key_value).split(config.hidden_size, dim=-1)
    expected = torch.zeros_like(update)
    for head in range(config.num_heads):
        part = slice(head * config.head_size, (head + 1) * config.head_size)
        query, key = rotate(features @ attention.query[head], rotation), rotate(keys[..., part], rotation)
        mixed = F.scaled_dot_product_attention(query, key, values[..., part], is_causal=True)
        expected += mixed @ attention.output[head]
    torch.testing.assert_close(update, expected)


def test_rotation_table_starts_at_no_turn_and_slows_down(tiny_config: BackboneConfig) -> None:
    """Position p turns pair i by p * theta ** (-i / pairs) radians; head_size 8 has four pairs."""
    cosine, sine = rotation_table(tiny_config)
    assert torch.equal(cosine[0], torch.ones(4))
    assert torch.equal(sine[0], torch.zeros(4))
    torch.testing.assert_close(sine[3], torch.tensor([3.0, 0.3, 0.03, 0.003]).sin())


def test_undecided_head_gate_is_no_gate(tiny_config: BackboneConfig, tiny_tokens: Tensor) -> None:
    """Probabilities times num_heads: equal ones weight each head by 1, as without a gate."""
    gated = MoETransformer(replace(tiny_config, head_gate=True)).requires_grad_(False)
    plain = MoETransformer(tiny_config).requires_grad_(False)
    plain.load_state_dict(gated.state_dict(), strict=False)
    attention = gated.attentions[0]
    assert isinstance(attention, Attention)
    assert attention.gate is not None
    decided = _update(gated, tiny_tokens)[1]
    attention.gate.weight.zero_()
    expected = _update(plain, tiny_tokens)[1]
    torch.testing.assert_close(_update(gated, tiny_tokens)[1], expected)
    assert not torch.allclose(decided, expected)

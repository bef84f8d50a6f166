"""Causality, decoding equal to prefill, empty subsets, balance: what must hold under any routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer, NativeRouter, Router, SiteView
from moe_backbone.experts import ExpertLayer
from moe_backbone.kernels import Backend
from moe_backbone.transformer import RoutingState, balance_loss

BACKENDS: tuple[Backend, ...] = ("reference", "compact")
CHANGED = 9
"""Position of the token that is changed in tests of causality."""


class _Fixed:
    """Router that replays subsets, one for each site (num_tokens, num_units)."""

    def __init__(self, subsets: Sequence[Tensor]) -> None:
        self.subsets = subsets

    def select(self, view: SiteView) -> Tensor:
        return self.subsets[view.index]


class _Empty:
    """Router that chooses nothing."""

    def select(self, view: SiteView) -> Tensor:
        return torch.zeros_like(view.scores, dtype=torch.bool)


def _at(subsets: Sequence[Tensor], position: int, num_sequences: int) -> list[Tensor]:
    """The rows of one position of every sequence."""
    return [subset.unflatten(0, (num_sequences, -1))[:, position] for subset in subsets]


def _observed(backbone: MoETransformer, state: RoutingState, subsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features at every site (num_sites, num_sequences, seq_len, hidden_size), and the logits at the end."""
    seen = []
    for subset in subsets:
        seen.append(backbone.observe(state).features.view_as(state.hidden))
        state = backbone.advance(state, subset)
    return torch.stack(seen), backbone.finish(state)


def test_run_under_the_native_router_is_forward(tiny_backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """Routing from outside with the native choice is the plain model."""
    logits, subsets = tiny_backbone.run(tiny_tokens, NativeRouter())
    torch.testing.assert_close(logits, tiny_backbone(tiny_tokens))
    replayed, _ = tiny_backbone.run(tiny_tokens, _Fixed(subsets))
    torch.testing.assert_close(replayed, logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_token_never_changes_earlier_logits(
    backend: Backend, tiny_backbone: MoETransformer, tiny_tokens: Tensor, random_subsets: Router
) -> None:
    """Under random subsets, a changed token shows at its own position and after it, nowhere before."""
    tiny_backbone.backend = backend
    before, subsets = tiny_backbone.run(tiny_tokens, random_subsets)
    changed = tiny_tokens.clone()
    changed[:, CHANGED] = (changed[:, CHANGED] + 1) % tiny_backbone.config.vocab_size
    after, _ = tiny_backbone.run(changed, _Fixed(subsets))
    torch.testing.assert_close(after[:, :CHANGED], before[:, :CHANGED])
    assert (after - before)[:, CHANGED:].abs().amax(-1).gt(1e-4).all()


def test_later_subsets_never_change_earlier_logits(
    tiny_backbone: MoETransformer, tiny_tokens: Tensor, random_subsets: Router
) -> None:
    """How a token is routed is no business of the tokens before it."""
    before, subsets = tiny_backbone.run(tiny_tokens, random_subsets)
    late = tiny_backbone.begin(tiny_tokens).positions.ge(CHANGED).unsqueeze(1)
    after, _ = tiny_backbone.run(tiny_tokens, _Fixed([subset ^ late for subset in subsets]))
    torch.testing.assert_close(after[:, :CHANGED], before[:, :CHANGED])
    assert (after - before)[:, CHANGED:].abs().amax(-1).gt(1e-4).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_gate", [False, True], ids=["plain heads", "gated heads"])
@pytest.mark.parametrize("routing", ["native", "random"])
def test_site_by_site_equals_token_by_token(
    routing: str,
    head_gate: bool,
    backend: Backend,
    tiny_config: BackboneConfig,
    tiny_tokens: Tensor,
    random_subsets: Router,
) -> None:
    """Decoding with a cache shows the same features at every site and ends in the same logits as prefill."""
    config = replace(tiny_config, head_gate=head_gate, shared_intermediate_size=8)
    backbone = MoETransformer(config).requires_grad_(False)
    backbone.backend = backend
    _, subsets = backbone.run(tiny_tokens, NativeRouter() if routing == "native" else random_subsets)
    features, logits = _observed(backbone, backbone.begin(tiny_tokens), subsets)
    cache = backbone.new_cache()
    for position in range(config.seq_len):
        state = backbone.begin(tiny_tokens[:, position : position + 1], cache=cache)
        assert state.positions.eq(position).all()
        seen, decoded = _observed(backbone, state, _at(subsets, position, len(tiny_tokens)))
        torch.testing.assert_close(seen, features[:, :, position : position + 1])
        torch.testing.assert_close(decoded, logits[:, position : position + 1])


def test_decoding_under_the_native_router_equals_prefill(tiny_backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """The gate chooses the same units from a cache, in pieces of any length."""
    expected = tiny_backbone(tiny_tokens)
    cache = tiny_backbone.new_cache()
    pieces = [tiny_backbone.run(piece, NativeRouter(), cache=cache)[0] for piece in tiny_tokens.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
    assert cache.length == tiny_backbone.config.seq_len


def test_sequences_do_not_see_each_other(
    tiny_backbone: MoETransformer, tiny_tokens: Tensor, random_subsets: Router
) -> None:
    """A sequence gives the same logits alone as in a batch."""
    logits, subsets = tiny_backbone.run(tiny_tokens, random_subsets)
    alone, _ = tiny_backbone.run(tiny_tokens[1:2], _Fixed([subset.chunk(len(tiny_tokens))[1] for subset in subsets]))
    torch.testing.assert_close(alone, logits[1:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_subsets_leave_the_residual_stream_unchanged(
    backend: Backend, tiny_backbone: MoETransformer, tiny_tokens: Tensor
) -> None:
    """With nothing chosen anywhere, what reaches the output head is the embedding, to the bit."""
    tiny_backbone.backend = backend
    state = tiny_backbone.begin(tiny_tokens)
    while state.site_index < len(tiny_backbone.sites):
        state = tiny_backbone.advance(state, _Empty().select(tiny_backbone.observe(state)))
    assert torch.equal(state.hidden, tiny_backbone.embedding(tiny_tokens))


def test_units_of_every_site_change_the_logits(tiny_backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """No site is decoration: emptying any one of them shows."""
    logits, subsets = tiny_backbone.run(tiny_tokens, NativeRouter())
    for index in range(len(subsets)):
        emptied = [torch.zeros_like(subset) if site == index else subset for site, subset in enumerate(subsets)]
        assert (tiny_backbone.run(tiny_tokens, _Fixed(emptied))[0] - logits).abs().max() > 1e-3


def test_price_is_shown_and_changes_nothing_else(tiny_backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """The router sees the price of its token; the model does not compute with it."""
    price = torch.rand(tiny_tokens.numel())
    state = tiny_backbone.begin(tiny_tokens, price)
    assert torch.equal(tiny_backbone.observe(state).price, price)
    logits, _ = tiny_backbone.run(tiny_tokens, NativeRouter(), price)
    torch.testing.assert_close(logits, tiny_backbone(tiny_tokens))


def test_hash_follows_every_weight_and_setting(tiny_config: BackboneConfig, seed: int) -> None:
    """Equal models have equal hashes; one changed weight or setting gives another."""
    one = MoETransformer(tiny_config).requires_grad_(False)
    torch.manual_seed(seed)
    twin = MoETransformer(tiny_config).requires_grad_(False)
    assert twin.sha256() == one.sha256()
    other_rule = MoETransformer(replace(tiny_config, mixing="keep"))
    other_rule.load_state_dict(one.state_dict())
    assert other_rule.sha256() != one.sha256()
    twin.embedding.weight[0, 0] += 1
    assert twin.sha256() != one.sha256()


def test_tokens_of_a_wrong_shape_are_refused(tiny_backbone: MoETransformer) -> None:
    """Name, rule, actual; with a cache the earlier tokens count."""
    with pytest.raises(ValueError, match=r"tokens must have shape \(num_sequences, seq_len\), got \(16,\)"):
        tiny_backbone.begin(torch.zeros(16, dtype=torch.int64))
    with pytest.raises(ValueError, match="sequence length must be at most 16, got 17"):
        tiny_backbone.begin(torch.zeros(1, 17, dtype=torch.int64))
    cache = tiny_backbone.new_cache()
    tiny_backbone.run(torch.zeros(1, 16, dtype=torch.int64), NativeRouter(), cache=cache)
    with pytest.raises(ValueError, match="sequence length must be at most 16, got 17"):
        tiny_backbone.begin(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_balance_loss_is_one_when_balanced() -> None:
    """Rows and probabilities spread evenly, at every site."""
    scores = torch.full((8, 4), 0.25).log()
    subset = torch.eye(4, dtype=torch.bool).repeat(2, 1)
    torch.testing.assert_close(balance_loss([scores, scores], [subset, subset]), torch.tensor(1.0))


def test_balance_loss_is_num_experts_when_one_expert_takes_all() -> None:
    """All rows and all probability on expert 0; beside a balanced site the mean counts."""
    scores = torch.tensor([[0.0, -100.0, -100.0, -100.0]] * 8).log_softmax(1)
    subset = torch.tensor([[True, False, False, False]] * 8)
    torch.testing.assert_close(balance_loss([scores], [subset]), torch.tensor(4.0))
    balanced = torch.full((8, 4), 0.25).log(), torch.eye(4, dtype=torch.bool).repeat(2, 1)
    mixed = balance_loss([scores, balanced[0]], [subset, balanced[1]])
    torch.testing.assert_close(mixed, torch.tensor(2.5))


def test_balance_loss_pushes_the_gate_away_from_the_busy_expert(tiny_config: BackboneConfig) -> None:
    """Its gradient reaches the gate's weights, and a step against it lowers the busy expert's probability."""
    layer = ExpertLayer(tiny_config)
    features = torch.randn(32, tiny_config.hidden_size)
    subset = torch.tensor([[True, False, False, False]] * 32)
    scores = layer.scores(features)
    balance_loss([scores], [subset]).backward()
    gradient = layer.gate.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        layer.gate.weight -= gradient
        assert layer.scores(features)[:, 0].exp().mean() < scores[:, 0].exp().mean()

"""Heads under `query_key_value`: a token that does not use a head is no key there, and is neither paid nor cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_backbone import BackboneConfig, ComputeMeter, MoETransformer, NativeRouter, Router, SiteView, fixed_flops
from moe_backbone.compute import attended_keys, earlier_keys
from moe_backbone.kernels import Backend, count_rows, kept_head_attention, rotate

BACKENDS: tuple[Backend, ...] = ("reference", "compact")
NUM_SEQUENCES, NUM_TOKENS, NUM_HEADS, WIDTH, HEAD_SIZE = 2, 6, 3, 5, 4
THREE_TOKENS = torch.tensor([[True, True], [False, True], [True, False]])
"""Subset of three tokens and two heads: head 0 keeps tokens 0 and 2, head 1 tokens 0 and 1."""


class _Replay:
    """Router that replays subsets, one for each site (num_tokens, num_units)."""

    def __init__(self, subsets: Sequence[Tensor]) -> None:
        self.subsets = subsets

    def select(self, view: SiteView) -> Tensor:
        return self.subsets[view.index]


@pytest.fixture
def backbone(tiny_backbone: MoETransformer) -> MoETransformer:
    """The tiny backbone, in which a token drops out of the heads that it does not use."""
    tiny_backbone.head_meaning = "query_key_value"
    return tiny_backbone


def _arguments(subset: Tensor) -> list[Tensor]:
    """Of `kept_head_attention`, up to the rotation: float64, with gradients."""
    angles = torch.outer(torch.arange(NUM_TOKENS), torch.tensor([1.0, 0.1])).double()
    shapes = ((NUM_SEQUENCES, NUM_TOKENS, WIDTH), (NUM_SEQUENCES, NUM_TOKENS, NUM_HEADS))
    hidden, weights = (torch.randn(shape).double().requires_grad_() for shape in shapes)
    projection = torch.randn(NUM_HEADS, WIDTH, 3 * HEAD_SIZE).double().requires_grad_()
    output = torch.randn(NUM_HEADS, HEAD_SIZE, WIDTH).double().requires_grad_()
    return [hidden, weights, subset, projection, output, torch.stack((angles.cos(), angles.sin()))]


def _looped(
    hidden: Tensor, weights: Tensor, subset: Tensor, projection: Tensor, output: Tensor, rotation: Tensor
) -> Tensor:
    """The definition, one token and head at a time."""
    sequences = []
    for sequence in range(NUM_SEQUENCES):
        rows = [torch.zeros(WIDTH, dtype=hidden.dtype) for _ in range(NUM_TOKENS)]
        for head in range(NUM_HEADS):
            keys: list[Tensor] = []
            values: list[Tensor] = []
            for token in subset[sequence, :, head].nonzero().flatten().tolist():
                query, key, value = (hidden[sequence, token] @ projection[head]).split(HEAD_SIZE)
                turn = rotation[:, token : token + 1]
                keys.append(rotate(key.unsqueeze(0), turn)[0])
                values.append(value)
                scores = torch.stack(keys) @ rotate(query.unsqueeze(0), turn)[0] / HEAD_SIZE**0.5
                mixed = scores.softmax(0) @ torch.stack(values)
                rows[token] = rows[token] + weights[sequence, token, head] * (mixed @ output[head])
        sequences.append(torch.stack(rows))
    return torch.stack(sequences)


def _subset(pattern: str) -> Tensor:
    subset = torch.rand(NUM_SEQUENCES, NUM_TOKENS, NUM_HEADS) < 0.5
    subset[0, 2] = False
    subset[:, :, 1] &= pattern != "one head unused"
    return {"all": torch.ones_like(subset), "none": torch.zeros_like(subset)}.get(pattern, subset)


@pytest.mark.parametrize("pattern", ["random", "all", "none", "one head unused"])
def test_ops_equal_a_loop_over_tokens_and_heads(pattern: str) -> None:
    """Output of both, gradients of the reference, and rows that ran."""
    *arguments, rotation = _arguments(_subset(pattern))
    inputs = [argument for argument in arguments if argument.requires_grad]
    direction = torch.randn(NUM_SEQUENCES, NUM_TOKENS, WIDTH).double()
    expected = _looped(*arguments, rotation)
    update, _ = kept_head_attention(*arguments, rotation, [], backend="reference")
    torch.testing.assert_close(update, expected)
    losses = [((way * direction).sum() + sum(0 * tensor.sum() for tensor in inputs)) for way in (update, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs) for loss in losses))
    with torch.no_grad(), count_rows() as rows:
        compact, _ = kept_head_attention(*arguments, rotation, [], backend="compact")
    torch.testing.assert_close(compact, expected.detach())
    assert rows["heads"] == int(arguments[2].sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_go_on_from_what_was_kept(backend: Backend) -> None:
    """Heads and sequences have kept different numbers of keys, some of them none."""
    with torch.no_grad():
        *arguments, rotation = _arguments(_subset("random"))
        whole, all_rows = kept_head_attention(*arguments, rotation, [], backend=backend)
        hidden, weights, subset, *matrices = arguments
        first, past = kept_head_attention(
            hidden[:, :4], weights[:, :4], subset[:, :4], *matrices, rotation[:, :4], [], backend=backend
        )
        counts = subset[:, :4].sum(1).t().flatten().tolist()
        rest, rows = kept_head_attention(
            hidden[:, 4:],
            weights[:, 4:],
            subset[:, 4:],
            *matrices,
            rotation[:, 4:],
            past.split(counts, 1),
            backend=backend,
        )
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole)
    assert past.shape[1] + rows.shape[1] == all_rows.shape[1] == subset.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_gate", [False, True], ids=["plain heads", "gated heads"])
@pytest.mark.parametrize("piece", [1, 5])
def test_decoding_equals_prefill_under_random_subsets(
    piece: int,
    head_gate: bool,
    backend: Backend,
    tiny_config: BackboneConfig,
    tiny_tokens: Tensor,
    random_subsets: Router,
) -> None:
    """With a cache that holds less than the whole prompt, and in which a piece may be decoded again."""
    backbone = MoETransformer(replace(tiny_config, head_gate=head_gate)).requires_grad_(False)
    with backbone.using(backend, head_meaning="query_key_value"):
        logits, subsets = backbone.run(tiny_tokens, random_subsets)
        cache, decoded = backbone.new_cache(), []
        for start in range(0, tiny_config.seq_len, piece):
            part = slice(start, start + piece)
            rows = [subset.unflatten(0, (len(tiny_tokens), -1))[:, part].flatten(0, 1) for subset in subsets]
            state = backbone.begin(tiny_tokens[:, part], cache=cache)
            backbone.advance(state, ~rows[0])  # not taken: its keys must be forgotten
            decoded.append(backbone.run(tiny_tokens[:, part], _Replay(rows), cache=cache)[0])
    torch.testing.assert_close(torch.cat(decoded, dim=1), logits)


def test_all_heads_are_native_attention(backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """Where nobody drops out, the two meanings are one, from the same weights and with the same hash."""
    kept, before = backbone(tiny_tokens), backbone.sha256()
    with backbone.using(head_meaning="query"):
        torch.testing.assert_close(kept, backbone(tiny_tokens))
        assert backbone.sha256() == before


def test_frozen_and_learning_agree(backbone: MoETransformer, tiny_tokens: Tensor, random_subsets: Router) -> None:
    """`auto` gathers rows without gradients and masks with them."""
    frozen, subsets = backbone.run(tiny_tokens, random_subsets)
    learning, _ = backbone.requires_grad_().run(tiny_tokens, _Replay(subsets))
    assert learning.requires_grad
    torch.testing.assert_close(frozen, learning.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_heads_leaves_later_tokens_alone(
    backend: Backend, backbone: MoETransformer, tiny_tokens: Tensor
) -> None:
    """Another token in its place changes no later update of that layer; under `query` it does, by its key."""
    other = tiny_tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % backbone.config.vocab_size
    subset = torch.ones(*tiny_tokens.shape, backbone.config.num_heads, dtype=torch.bool)
    subset[:, 5] = False

    def update(tokens: Tensor) -> Tensor:
        state = backbone.begin(tokens)
        return backbone.advance(state, subset.flatten(0, 1)).hidden - state.hidden

    with backbone.using(backend):
        torch.testing.assert_close(update(other), update(tiny_tokens), rtol=0, atol=0)
        assert update(tiny_tokens)[:, 5].eq(0).all()
        backbone.head_meaning = "query"
        assert (update(other) - update(tiny_tokens))[:, 6:].abs().amax(-1).gt(1e-5).all()


def test_attended_keys_of_the_docstring_and_of_later_sequences() -> None:
    """1, 0, 2 in head 0; each sequence counts from its own start, or from what its cache keeps."""
    positions = torch.arange(3)
    keys = [[1, 1], [0, 2], [2, 0]]
    assert attended_keys(THREE_TOKENS, positions).tolist() == keys
    twice = torch.cat((THREE_TOKENS, THREE_TOKENS))
    assert attended_keys(twice, positions.repeat(2)).tolist() == keys + keys
    earlier = torch.tensor([[5, 0], [7, 1]])
    later = attended_keys(twice, 9 + positions.repeat(2), earlier)
    assert later.tolist() == [[6, 1], [0, 2], [7, 0], [8, 2], [0, 3], [9, 0]]


def test_compute_of_three_tokens_and_two_heads_by_hand() -> None:
    """hidden_size 8, head_size 4: a projection is 2 * 8 * 4 FLOPs, to score and mix a key 2 * 4 each."""
    config = BackboneConfig(hidden_size=8, num_heads=2, num_layers=1, seq_len=3)
    backbone, positions = MoETransformer(config).requires_grad_(False), torch.arange(3)
    plain = ComputeMeter(backbone.sites, 3)
    assert plain.flops(0, THREE_TOKENS, positions).tolist() == [2 * (2 * 64 + 16), 2 * 64 + 2 * 16, 2 * 64 + 3 * 16]
    backbone.head_meaning = "query_key_value"
    meter = ComputeMeter(backbone.sites, 3)
    assert meter.flops(0, THREE_TOKENS, positions).tolist() == [2 * (4 * 64 + 16), 4 * 64 + 2 * 16, 4 * 64 + 2 * 16]
    assert fixed_flops(config) - fixed_flops(config, "query_key_value") == 2 * 8 * (8 + 8)
    assert meter.native_flops - plain.native_flops == 2 * 8 * (8 + 8)


def test_expected_compute_of_three_tokens_by_hand() -> None:
    """A third token that uses head 0 by .5 finds .5 + .25 keys and its own there; chances of 0 and 1 are a subset."""
    config = BackboneConfig(hidden_size=8, num_heads=2, num_layers=1, seq_len=3)
    backbone, positions = MoETransformer(config).requires_grad_(False), torch.arange(3)
    backbone.head_meaning = "query_key_value"
    meter = ComputeMeter(backbone.sites, 3)
    chance = torch.tensor([[0.5, 0.0], [0.25, 0.0], [0.5, 1.0]])
    expected = [0.5 * (256 + 16), 0.25 * (256 + 1.5 * 16), 0.5 * (256 + 1.75 * 16) + 256 + 16]
    compute = meter.expected_compute(0, chance, positions)
    torch.testing.assert_close(compute, torch.tensor(expected) / meter.native_flops)
    assert meter.cache_bytes(0, chance).tolist() == [0.5 * 32, 0.25 * 32, 1.5 * 32]
    both, places = THREE_TOKENS.repeat(2, 1), positions.repeat(2)
    certain = meter.expected_compute(0, both.float(), places)
    torch.testing.assert_close(certain, meter.compute(0, both, places))
    assert earlier_keys(THREE_TOKENS, positions).tolist() == [[0, 0], [1, 1], [1, 2]]


def test_native_compute_is_exactly_one(backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """The unit of compute follows the meaning."""
    meter = ComputeMeter(backbone.sites, backbone.config.seq_len)
    _, subsets = backbone.run(tiny_tokens, NativeRouter())
    positions = backbone.begin(tiny_tokens).positions
    flops = torch.stack([meter.flops(index, subset, positions) for index, subset in enumerate(subsets)])
    assert flops.sum(0).mean().item() == meter.native_flops


def test_a_decoded_token_costs_what_it_costs_in_prefill(
    backbone: MoETransformer, tiny_tokens: Tensor, random_subsets: Router
) -> None:
    """The cache knows how many keys each head keeps, also while a later site runs."""
    meter = ComputeMeter(backbone.sites, backbone.config.seq_len)
    _, subsets = backbone.run(tiny_tokens, random_subsets)
    state = backbone.begin(tiny_tokens)
    expected = [meter.flops(index, subset, state.positions) for index, subset in enumerate(subsets)]
    assert state.earlier_keys is None
    cache, spent = backbone.new_cache(), []
    for position in range(backbone.config.seq_len):
        state = backbone.begin(tiny_tokens[:, position : position + 1], cache=cache)
        costs = []
        for index, subset in enumerate(subsets):
            rows = subset.unflatten(0, (len(tiny_tokens), -1))[:, position]
            costs.append(meter.flops(index, rows, state.positions, state.earlier_keys))
            state = backbone.advance(state, rows)
        backbone.finish(state)
        spent.append(torch.stack(costs))
    assert torch.equal(torch.stack(spent, dim=2).flatten(1), torch.stack(expected))


def test_bytes_of_the_cache_are_those_that_it_holds(
    backbone: MoETransformer, tiny_tokens: Tensor, random_subsets: Router
) -> None:
    """A key and a value of 8 numbers of 4 bytes for each used head; under `query` for every head."""
    meter, cache = ComputeMeter(backbone.sites, backbone.config.seq_len), backbone.new_cache()
    _, subsets = backbone.run(tiny_tokens, random_subsets, cache=cache)
    held = sum(rows.nbytes for layer in cache._rows for rows in layer)
    assert sum(meter.cache_bytes(index, subset).sum() for index, subset in enumerate(subsets)) == held
    assert meter.native_cache_bytes == 2 * 4 * (2 * 8 * 4)
    native = [torch.ones_like(subset) for subset in subsets]
    with backbone.using(head_meaning="query"):
        plain = ComputeMeter(backbone.sites, backbone.config.seq_len)
    for chosen, own in ((native, meter), (subsets, plain)):
        total = torch.stack([own.cache_bytes(index, subset) for index, subset in enumerate(chosen)]).sum(0)
        assert total.eq(own.native_cache_bytes).all()
    assert ComputeMeter(backbone.sites, 16, bytes_per_number=2).native_cache_bytes == meter.native_cache_bytes / 2


def test_counted_rows_are_the_used_heads(backbone: MoETransformer, tiny_tokens: Tensor, random_subsets: Router) -> None:
    """A row is a query, a key and a value: none of them is computed for a token that does not use the head."""
    with torch.no_grad(), count_rows() as rows:
        _, subsets = backbone.run(tiny_tokens, random_subsets)
    assert rows["heads"] == sum(int(subset.sum()) for subset in subsets[::2])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad], ids=["inference mode", "gradients"])
def test_a_prompt_in_another_mode_can_be_decoded(
    backbone: MoETransformer, tiny_tokens: Tensor, mode: type[torch.enable_grad]
) -> None:
    """A cache filled in inference mode or under gradients goes on without them, and one filled without under them."""
    expected = backbone(tiny_tokens[:, :6])
    for first, then in ((mode, torch.no_grad), (torch.no_grad, mode)):
        cache = backbone.new_cache()
        with first():
            backbone.requires_grad_(first is torch.enable_grad)
            backbone.run(tiny_tokens[:, :4], NativeRouter(), cache=cache)
        with then():
            backbone.requires_grad_(then is torch.enable_grad)
            rest, _ = backbone.run(tiny_tokens[:, 4:6], NativeRouter(), cache=cache)
        torch.testing.assert_close(rest.detach(), expected[:, 4:], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """Name, rule, actual; and nothing stays changed."""
    refusal = pytest.raises(ValueError, match="head_meaning must be 'query' or 'query_key_value', got 'key'")
    with refusal, backbone.using("reference", head_meaning="key"):  # type: ignore[arg-type]
        pass
    assert (backbone.backend, backbone.head_meaning) == ("auto", "query_key_value")
    with pytest.raises(ValueError, match="for kept_head_attention, got 'triton'"), backbone.using("triton"):
        backbone(tiny_tokens)
    cache = backbone.new_cache()
    backbone.run(tiny_tokens, NativeRouter(), cache=cache)
    cache.length = 4
    with pytest.raises(ValueError, match="cache must get the same 3 sequences again, got 1"):
        backbone.run(tiny_tokens[:1, :1], NativeRouter(), cache=cache)
    refusal = pytest.raises(ValueError, match="cache must be made under head_meaning 'query', got a KeptCache")
    with refusal, backbone.using(head_meaning="query"):
        backbone.begin(tiny_tokens[:, :1], cache=cache)

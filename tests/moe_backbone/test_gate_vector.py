"""The gate vector against a softmax in each dimension, by hand, in every state of its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer, NativeRouter, Router, fixed_flops
from moe_backbone.corpus import Corpus
from moe_backbone.experts import ExpertLayer, scaled_by_vector
from moe_backbone.kernels import Backend
from moe_backbone.pretrain import PretrainConfig, Pretraining

NUM_TOKENS, NUM_EXPERTS, WIDTH = 7, 3, 8
SUBSETS = {
    "random": torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(3)) < 0.5,
    "all experts": torch.ones(NUM_TOKENS, NUM_EXPERTS, dtype=torch.bool),
    "no expert": torch.zeros(NUM_TOKENS, NUM_EXPERTS, dtype=torch.bool),
    "one expert each": torch.arange(NUM_TOKENS).unsqueeze(1) % NUM_EXPERTS == torch.arange(NUM_EXPERTS),
}


@pytest.fixture
def config(tiny_config: BackboneConfig) -> BackboneConfig:
    """The tiny backbone, mixed by a gate vector."""
    return replace(tiny_config, mixing="gate_vector")


@pytest.fixture
def backbone(config: BackboneConfig, seed: int) -> MoETransformer:
    """Frozen, with vectors that count."""
    backbone = MoETransformer(config).requires_grad_(False).eval()
    for layer in backbone.expert_layers:
        layer.vector.normal_()  # type: ignore[union-attr, operator]
    return backbone


def _layer(dtype: torch.dtype = torch.float64) -> ExpertLayer:
    sizes = BackboneConfig(
        hidden_size=WIDTH, num_heads=2, num_experts=NUM_EXPERTS, top_k=1, intermediate_size=5, mixing="gate_vector"
    )
    layer = ExpertLayer(sizes).to(dtype)
    assert layer.vector is not None
    layer.vector.data.normal_()
    return layer


def _expected(layer: ExpertLayer, features: Tensor, scores: Tensor, subset: Tensor) -> Tensor:
    """The definition: a softmax over the chosen experts for every token and dimension."""
    gate, up = torch.einsum("tw,ewi->tei", features, layer.gate_up).chunk(2, dim=2)
    outputs = torch.einsum("tei,eiw->tew", gate * gate.sigmoid() * up, layer.down)
    assert layer.vector is not None
    logits = scores.unsqueeze(2) + layer.vector
    rows = []
    for chosen, logit, output in zip(subset, logits, outputs, strict=True):
        rows.append((logit[chosen].softmax(0) * output[chosen]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("name", SUBSETS)
def test_update_and_gradients_equal_a_softmax_in_each_dimension(name: str) -> None:
    """Output, and gradients of features, gate, experts and vector."""
    layer, subset = _layer(), SUBSETS[name]
    features = torch.randn(1, NUM_TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = [features, *layer.parameters()]
    direction = torch.randn(NUM_TOKENS, WIDTH, dtype=torch.float64)
    results = []
    for way in ("ours", "definition"):
        scores = layer.scores(features.flatten(0, 1))
        if way == "ours":
            update = layer(features, scores, subset).flatten(0, 1)
        else:
            update = _expected(layer, features.flatten(0, 1), scores, subset)
        loss = (update * direction).sum() + sum(0 * tensor.sum() for tensor in inputs)
        results.append((update, torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", ["auto", "reference", "compact"])
def test_backends_agree_and_empty_subsets_add_nothing(backend: Backend) -> None:
    """Without gradients too, also for a single token as in decoding."""
    layer = _layer(torch.float32).requires_grad_(False)
    features = torch.randn(1, NUM_TOKENS, WIDTH)
    for subset in SUBSETS.values():
        scores = layer.scores(features.flatten(0, 1))
        update = layer(features, scores, subset, backend)[0]
        torch.testing.assert_close(update, _expected(layer, features[0], scores, subset))
        assert update[~subset.any(1)].eq(0).all()
        torch.testing.assert_close(layer(features[:, :1], scores[:1], subset[:1], backend)[0, 0], update[0])


def test_factors_of_the_docstring() -> None:
    """Entries (0, log 4) count as (.25, 1), and the down projections are scaled by them."""
    down, factors = scaled_by_vector(torch.ones(2, 3, 1), torch.tensor([[1.0], [4.0]]).log())
    torch.testing.assert_close(factors, torch.tensor([[0.25], [1.0]]))
    torch.testing.assert_close(down, factors.unsqueeze(1).expand(2, 3, 1))


@pytest.mark.parametrize("size", [80.0, 1e30])
def test_a_vector_of_any_size_gives_finite_numbers(size: float) -> None:
    """Neither overflow nor a division by what has vanished, forwards or backwards."""
    layer = _layer(torch.float32)
    assert layer.vector is not None
    layer.vector.data = torch.tensor([[size], [-size], [0.0]]).expand(-1, WIDTH).contiguous()
    features = torch.randn(1, NUM_TOKENS, WIDTH, requires_grad=True)
    update = layer(features, layer.scores(features[0]), SUBSETS["one expert each"])
    update.sum().backward()
    assert update.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters() if weight.grad is not None)


def test_a_vector_of_zeros_is_renormalize(config: BackboneConfig, tiny_tokens: Tensor, random_subsets: Router) -> None:
    """Where training starts, and from the same weights: the vector draws no random numbers."""
    torch.manual_seed(0)
    plain = MoETransformer(replace(config, mixing="renormalize")).requires_grad_(False)
    torch.manual_seed(0)
    vector = MoETransformer(config).requires_grad_(False)
    assert plain.state_dict().keys() < vector.state_dict().keys()
    state, other = plain.begin(tiny_tokens), vector.begin(tiny_tokens)
    for _ in plain.sites:
        subset = random_subsets.select(plain.observe(state))
        state, other = plain.advance(state, subset), vector.advance(other, subset)
        torch.testing.assert_close(other.hidden, state.hidden, rtol=1e-6, atol=1e-6)


def test_decoding_equals_prefill_and_frozen_equals_learning(backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """A token at a time from a cache, and with gradients."""
    expected = backbone(tiny_tokens)
    cache = backbone.new_cache()
    pieces = [backbone.run(piece, NativeRouter(), cache=cache)[0] for piece in tiny_tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
    torch.testing.assert_close(backbone.requires_grad_()(tiny_tokens).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_vector_learned_or_loaded_later_is_used(backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """Scaled projections that were kept for evaluation must not outlive a change of the vector."""
    before = backbone(tiny_tokens)
    twin = MoETransformer(backbone.config).requires_grad_(False)
    twin(tiny_tokens)
    twin.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(twin(tiny_tokens), before)
    vector = backbone.expert_layers[0].vector
    assert isinstance(vector, Tensor)
    vector.data[0] += 1
    assert (backbone(tiny_tokens) - before).abs().max() > 1e-3


def test_fixed_flops_count_the_sum_of_the_weights(config: BackboneConfig) -> None:
    """For each of 2 layers, 4 experts times 32 dimensions, a multiplication and an addition."""
    assert fixed_flops(config) - fixed_flops(replace(config, mixing="renormalize")) == 2 * (2 * 4 * 32)


def test_pretraining_moves_the_vector(tiny_corpus: Corpus, config: BackboneConfig, tmp_path: Path) -> None:
    """It gets gradients from the loss, in every layer and for every expert."""
    trained = Pretraining(tiny_corpus, config, PretrainConfig(steps=6, sequences=4), "cpu", tmp_path / "partial").run()
    for layer in trained.expert_layers:
        assert layer.vector.abs().amax(1).gt(1e-4).all()  # type: ignore[union-attr, operator]

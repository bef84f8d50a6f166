"""Eight families of trained models: native routing, subsets against a masked reference, caches, batches and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("greenlet")

from trained_families import (
    FAMILIES,
    LARGEST_LOSS,
    ROUNDING,
    NothingAtSpaces,
    SomeUnits,
    Trained,
    bare_logits,
    difference,
    experts_and_gates,
    feature_router,
    masked,
    own_difference,
)

from moe_backbone import NativeRouter
from moe_backbone.huggingface import HuggingFaceBackbone
from moe_backbone.kernels import count_rows
from moe_backbone.sites import Router

WHOLE_RULE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "gpt_oss", "granitemoe")
"""Families whose documentation says what an expert weighs that the gate did not choose."""
BFLOAT16_ROUNDING = 2**-6
"""Two steps of that dtype at the largest logit, as a fraction of it."""
MATTERS = 0.01
"""What a change of routing must do at least, fraction of the largest logit."""


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, train_family: Callable[[str], Trained]) -> Trained:
    """Each family."""
    return train_family(request.param)


def _backbone(model: Any) -> HuggingFaceBackbone:
    return HuggingFaceBackbone(model, seq_len=24)


@torch.no_grad()
def _reference_steps(model: Trained, tokens: Tensor, subsets: list[Tensor], sizes: list[int]) -> float:
    """How far the masked model of transformers itself is from its whole pass, so many tokens at a time."""
    reference, rule = model.load(), model.family.rule
    assert rule is not None
    cache, logits, start = _backbone(model.load()).new_cache(), [], 0
    by_token = [subset.unflatten(0, tokens.shape) for subset in subsets]
    with masked(reference, rule, subsets, all_experts=True):
        whole = bare_logits(reference, tokens, "eager")
    for part in tokens.split(sizes, dim=1):
        now = [subset[:, start : start + part.shape[1]].flatten(0, 1) for subset in by_token]
        with masked(reference, rule, now, all_experts=True):
            logits.append(reference(input_ids=part, past_key_values=cache, use_cache=True).logits)
        start += part.shape[1]
    return difference(torch.cat(logits, dim=1), whole)


@torch.no_grad()
def _steps(backbone: Any, tokens: Tensor, router: Router, sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits and subsets of a run with a cache, so many tokens at a time."""
    cache, logits, subsets = backbone.new_cache(), [], []
    for part in tokens.split(sizes, dim=1):
        some, chosen = backbone.run(part, router, cache=cache)
        logits.append(some)
        subsets.append([subset.unflatten(0, part.shape) for subset in chosen])
    return torch.cat(logits, dim=1), [torch.cat(site, dim=1).flatten(0, 1) for site in zip(*subsets, strict=True)]


def test_training_has_taken_hold(model: Trained) -> None:
    """The text is learned, the gates prefer some experts, and the sites are the layers that have experts."""
    assert model.loss < LARGEST_LOSS
    loaded, tokens = model.load(), model.tokens()
    held_out = bare_logits(loaded, tokens)[:, :-1].flatten(0, 1)
    assert torch.nn.functional.cross_entropy(held_out, tokens[:, 1:].flatten()) < LARGEST_LOSS + 0.3
    gates = [gate for _, gate in experts_and_gates(loaded)]
    backbone = _backbone(loaded)
    assert len(backbone.sites) == len(gates) == 2
    _, subsets = backbone.run(tokens, NativeRouter())
    for site, subset in zip(backbone.sites, subsets, strict=True):
        assert set(subset.sum(1).tolist()) == {site.native_units}
        assert len(subset.unique(dim=0)) > 4, "gates must choose by token"


@torch.no_grad()
def test_native_routing_is_the_bare_model(model: Trained) -> None:
    """As near as transformers' own ways to run experts are to each other, or nearer than rounding."""
    tokens = model.tokens()
    bare, own = bare_logits(model.load(), tokens), own_difference(model.load(), tokens)
    logits, _ = _backbone(model.load()).run(tokens, NativeRouter())
    bound = max(ROUNDING, own)
    model.tell(f"native routing, transformers' own {own:.2e}", difference(logits, bare), bound)
    assert difference(logits, bare) <= bound


def _check_masked(model: Trained, *, native: bool) -> None:
    tokens, rule = model.tokens(), model.family.rule
    assert rule is not None
    backbone = _backbone(model.load())
    with count_rows() as rows, torch.no_grad():
        logits, subsets = backbone.run(tokens, SomeUnits(native=native))
    assert rows == {"experts": sum(int(subset.sum()) for subset in subsets)}
    reference = model.load()
    with masked(reference, rule, subsets, all_experts=not native):
        expected = bare_logits(reference, tokens, "eager")
        own = own_difference(reference, tokens)
    bound = max(ROUNDING, own)
    model.tell(f"{'native' if native else 'any'} subsets, masked", difference(logits, expected), bound)
    assert difference(logits, expected) <= bound
    assert difference(bare_logits(reference, tokens), expected) > MATTERS
    with torch.enable_grad():  # other code runs where a gradient may be wanted
        logits, _ = _backbone(model.load()).run(tokens, SomeUnits(native=native))
    assert difference(logits, expected) <= bound


def test_any_subset_of_the_native_choice_is_the_model_with_the_rest_masked(model: Trained) -> None:
    """All native experts computed by transformers and weighted by the documented rule, those left out with zero."""
    _check_masked(model, native=True)


@pytest.mark.parametrize("model", WHOLE_RULE, indirect=True)
def test_any_experts_at_all_are_the_model_with_all_but_them_masked(model: Trained) -> None:
    """Experts too that the gate did not choose, weighted by the documented rule."""
    _check_masked(model, native=False)


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1] * 24), (4, [9, 1, 1, 1, 7, 5])], ids=["one by one", "in pieces"])
def test_decoding_with_a_cache_is_the_whole_pass(model: Trained, batch: int, sizes: list[int]) -> None:
    """The same choices by a router of features, and the same logits: within rounding, or transformers' own of it."""
    backbone, tokens = _backbone(model.load()), model.tokens(batch)
    router = NothingAtSpaces(feature_router(backbone).at_price(0.3))
    with torch.no_grad():
        whole, subsets = backbone.run(tokens, router)
    logits, stepwise = _steps(backbone, tokens, router, sizes)
    own = _reference_steps(model, tokens, subsets, sizes)
    bound = max(ROUNDING, 2 * own)  # each of our two passes may be as far off as one of its
    model.tell(f"decoding in {len(sizes)} steps, masked model's own {own:.2e}", difference(logits, whole), bound)
    assert difference(logits, whole) <= bound
    assert all(torch.equal(one, other) for one, other in zip(subsets, stepwise, strict=True))
    assert 0.05 < torch.cat(subsets).float().mean() < 0.95
    assert not torch.cat(subsets)[(tokens == ord(" ")).flatten().repeat(2)].any(), "spaces run nothing"
    assert (tokens == ord(" ")).any()


@torch.no_grad()
def test_a_batch_is_its_sequences_one_by_one(model: Trained) -> None:
    backbone, tokens = _backbone(model.load()), model.tokens(num_sequences=5)
    router = feature_router(backbone).at_price(0.6)
    whole, subsets = backbone.run(tokens, router)
    for number, sequence in enumerate(tokens.split(1)):
        alone, chosen = backbone.run(sequence, router)
        assert difference(alone, whole[number : number + 1]) <= ROUNDING
        for subset, one in zip(subsets, chosen, strict=True):
            assert torch.equal(subset.view(5, 24, -1)[number], one)


def test_bfloat16_is_near_the_bare_model(model: Trained, tmp_path: Any) -> None:
    """Nine of ten tokens within rounding, and the fingerprint of the same weights in float32; others have another."""
    tokens, folder = model.tokens(), tmp_path / "bfloat16"
    original = model.load()
    original.to(torch.bfloat16).save_pretrained(folder)
    halved = Trained(name=model.name, folder=folder, loss=model.loss, text=model.text)
    half, full = _backbone(halved.load("bfloat16")), _backbone(halved.load())
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert half.sha256() == full.sha256() == _backbone(halved.load("auto")).sha256()
    assert _backbone(model.load("bfloat16")).sha256() == _backbone(model.load()).sha256()
    bare = bare_logits(halved.load("bfloat16"), tokens)
    with torch.no_grad():
        logits, _ = half.run(tokens, NativeRouter())
        some, subsets = half.run(tokens, feature_router(half).at_price(0.1))
    apart = (logits - bare).abs().amax(2).flatten() / bare.abs().max()
    usual = float(apart.quantile(0.9))  # where two experts are level, rounding may choose the other one
    model.tell(f"bfloat16, native routing, at most {float(apart.max()):.1e}, 9 of 10 tokens", usual, BFLOAT16_ROUNDING)
    assert usual <= BFLOAT16_ROUNDING
    assert some.isfinite().all()
    assert 0.1 < torch.cat(subsets).float().mean() < 0.9
    next(full.model.parameters()).data[:, 0] += 0.25
    assert _backbone(full.model).sha256() != half.sha256()

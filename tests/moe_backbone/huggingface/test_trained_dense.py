"""A trained model without experts: its heads are the sites, against a reference that masks before the projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("greenlet")

from trained_families import (
    LARGEST_LOSS,
    ROUNDING,
    NothingAtSpaces,
    SomeUnits,
    Trained,
    bare_logits,
    difference,
    feature_router,
)

from moe_backbone import NativeRouter
from moe_backbone.huggingface import HuggingFaceBackbone
from moe_backbone.kernels import count_rows

NUM_HEADS = 4


@pytest.fixture
def dense(train_family: Callable[[str], Trained]) -> Trained:
    """Qwen3 with three layers."""
    return train_family("qwen3")


@contextmanager
def _masked_heads(model: Any, subsets: Sequence[Tensor]) -> Iterator[None]:
    """Compute every head, and set those outside a subset to zero before the output projection."""

    def mask(subset: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            heads = args[0].unflatten(-1, (NUM_HEADS, -1))
            return ((heads * subset.view(*heads.shape[:-1], 1)).flatten(-2),)

        return hook

    layers = model.model.layers
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(mask(subset))
        for layer, subset in zip(layers, subsets, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_only_heads_are_sites(dense: Trained) -> None:
    """One of each layer, and native routing is the bare model to the bit."""
    assert dense.loss < LARGEST_LOSS
    backbone, tokens = HuggingFaceBackbone(dense.load(), seq_len=24), dense.tokens()
    found = [(site.kind, site.layer, site.num_units, site.native_units) for site in backbone.sites]
    assert found == [("heads", layer, NUM_HEADS, NUM_HEADS) for layer in range(3)]
    with torch.no_grad(), count_rows() as rows:
        logits, _ = backbone.run(tokens, NativeRouter())
    assert rows == {"heads": 3 * NUM_HEADS * tokens.numel()}
    assert torch.equal(logits, bare_logits(dense.load(), tokens))
    with pytest.raises(ValueError, match="model must have experts that transformers lets others run"):
        HuggingFaceBackbone(dense.load(), heads=False)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_skipped_heads_are_masked_heads(dense: Trained, attention: str) -> None:
    """And only the rows of heads that run are attended with."""
    backbone, tokens = HuggingFaceBackbone(dense.load(), seq_len=24), dense.tokens()
    with count_rows() as rows:
        logits, subsets = backbone.run(tokens, SomeUnits(native=False))
    assert rows == {"heads": sum(int(subset.sum()) for subset in subsets)}
    reference = dense.load()
    reference.set_attn_implementation(attention)
    with _masked_heads(reference, subsets):
        expected = bare_logits(reference, tokens)
    dense.tell(f"skipped heads, {attention}", difference(logits, expected), ROUNDING)
    assert difference(logits, expected) <= ROUNDING
    assert difference(bare_logits(reference, tokens), expected) > 0.01, "heads must matter"


@torch.no_grad()
@pytest.mark.parametrize(("batch", "sizes"), [(1, [1] * 24), (4, [9, 1, 1, 1, 7, 5])], ids=["one by one", "in pieces"])
def test_decoding_with_a_cache_is_the_whole_pass(dense: Trained, batch: int, sizes: list[int]) -> None:
    """A token that skipped a head is still a key there for later ones."""
    backbone, tokens = HuggingFaceBackbone(dense.load(), seq_len=24), dense.tokens(batch)
    router = NothingAtSpaces(feature_router(backbone).at_price(0.1))
    whole, subsets = backbone.run(tokens, router)
    cache, logits = backbone.new_cache(), []
    with count_rows() as rows:
        for part in tokens.split(sizes, dim=1):
            logits.append(backbone.run(part, router, cache=cache)[0])
    assert difference(torch.cat(logits, dim=1), whole) <= ROUNDING
    assert rows == {"heads": sum(int(subset.sum()) for subset in subsets)}
    assert 0.1 < torch.cat(subsets).float().mean() < 0.95

"""Traces of a trained checkpoint: layout, the same logits when replayed, and files and models that do not belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("greenlet")

from trained_families import NUM_EXPERTS, NothingAtSpaces, SomeUnits, Trained, feature_router

from moe_backbone import NativeRouter
from moe_backbone.huggingface import HuggingFaceBackbone
from policies.trace import NO_EXPERT, Trace, TraceRouter, record


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """As `record` runs."""
    with torch.no_grad():
        yield


@pytest.fixture
def olmoe(train_family: Callable[[str], Trained]) -> Trained:
    """Two layers of eight experts."""
    return train_family("olmoe")


@pytest.fixture
def backbone(olmoe: Trained) -> HuggingFaceBackbone:
    """The model, loaded."""
    return HuggingFaceBackbone(olmoe.load(), seq_len=24)


def _router(backbone: HuggingFaceBackbone) -> NothingAtSpaces:
    return NothingAtSpaces(feature_router(backbone).at_price(0.6))


def _run(backbone: HuggingFaceBackbone, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    return backbone.run(tokens, _router(backbone))


def test_layout_is_tokens_by_layers_by_experts(olmoe: Trained, backbone: HuggingFaceBackbone) -> None:
    """In rising order, then minus ones, and each row of each layer is what ran there."""
    tokens = olmoe.tokens()
    _, subsets = _run(backbone, tokens)
    trace = record(backbone, _router(backbone), tokens, batch_sequences=3)
    most = max(int(subset.sum(1).max()) for subset in subsets)
    assert trace.routed_experts.shape == (tokens.numel(), len(subsets), most)
    assert trace.routed_experts.dtype == np.int32
    assert trace.head_mask is None
    np.testing.assert_array_equal(trace.tokens, tokens.numpy())
    for layer, subset in enumerate(subsets):
        for row, chosen in zip(trace.routed_experts[:, layer], subset, strict=True):
            experts = chosen.nonzero().squeeze(1).tolist()
            assert row.tolist() == experts + [NO_EXPERT] * (most - len(experts))
    assert (trace.routed_experts == NO_EXPERT).all(2).any(), "some token must run nothing"


def test_native_routing_fills_every_place(olmoe: Trained, backbone: HuggingFaceBackbone) -> None:
    """As vLLM captures it: top-k of each layer and token."""
    trace = record(backbone, NativeRouter(), olmoe.tokens())
    assert trace.routed_experts.shape == (96, 2, 3)
    assert 0 <= trace.routed_experts.min() < trace.routed_experts.max() < NUM_EXPERTS


def test_replayed_from_a_file_it_gives_the_same_logits(
    olmoe: Trained, backbone: HuggingFaceBackbone, tmp_path: Path
) -> None:
    """In batches of any size and order, also where it names experts in another order."""
    tokens, path = olmoe.tokens(), tmp_path / "trace.npz"
    logits, subsets = _run(backbone, tokens)
    record(backbone, _router(backbone), tokens).save(path)
    trace = Trace.load(path)
    shuffled = replace(trace, routed_experts=trace.routed_experts[:, :, ::-1])
    for one in (trace, shuffled, replace(trace, backbone_sha256="")):
        router = TraceRouter(one, backbone)
        replayed, again = backbone.run(tokens, router)
        assert torch.equal(replayed, logits)
        assert all(torch.equal(first, second) for first, second in zip(subsets, again, strict=True))
        _, turned = backbone.run(tokens[[2, 0]], router)
        assert torch.equal(turned[1].view(2, 24, -1), subsets[1].view(4, 24, -1)[[2, 0]])
    with pytest.raises(ValueError, match="trace must hold every sequence that is run, got 1 others"):
        backbone.run(torch.cat((tokens[:1], tokens[:1] + 1)), router)


def test_heads_are_replayed(train_family: Callable[[str], Trained]) -> None:
    """Of a model without experts: an empty list of experts and a mask of heads."""
    dense = train_family("qwen3")
    backbone, tokens = HuggingFaceBackbone(dense.load(), seq_len=24), dense.tokens()
    logits, subsets = backbone.run(tokens, SomeUnits(native=False))
    trace = record(backbone, SomeUnits(native=False), tokens)
    replayed, _ = backbone.run(tokens, TraceRouter(trace, backbone))
    assert torch.equal(replayed, logits)
    assert trace.routed_experts.shape == (96, 3 - len(subsets), 0)
    assert trace.head_mask is not None
    np.testing.assert_array_equal(trace.head_mask, torch.stack(subsets, dim=1).numpy())


def test_a_trace_of_another_model_is_refused(
    olmoe: Trained, backbone: HuggingFaceBackbone, train_family: Callable[[str], Trained]
) -> None:
    """By its hash; without one, by the number of its layers."""
    trace = record(backbone, NativeRouter(), olmoe.tokens())
    other = HuggingFaceBackbone(train_family("qwen3_moe").load(), seq_len=24)
    with pytest.raises(
        ValueError, match=rf"recorded on this backbone, .*{other.sha256()[:12]}.*{backbone.sha256()[:12]}"
    ):
        TraceRouter(trace, other)
    fewer = replace(trace, backbone_sha256="", routed_experts=trace.routed_experts[:, :1])
    with pytest.raises(ValueError, match="trace must have 2 expert sites, got 1"):
        TraceRouter(fewer, other)


@pytest.mark.parametrize("damage", ["missing", "cut off", "text"])
def test_a_file_that_is_no_trace_is_refused(
    olmoe: Trained, backbone: HuggingFaceBackbone, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "trace.npz"
    if damage != "missing":
        record(backbone, NativeRouter(), olmoe.tokens(1)).save(path)
        path.write_bytes(b"no trace" if damage == "text" else path.read_bytes()[:200])
    with pytest.raises(ValueError, match="trace must be a file that --trace wrote, got"):
        Trace.load(path)

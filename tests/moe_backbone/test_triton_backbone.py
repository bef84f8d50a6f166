"""A whole backbone on the GPU kernels, in Triton's interpreter without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_backbone import BackboneConfig, MoETransformer, NativeRouter, Router
from moe_backbone.kernels import count_rows
from moe_backbone.kernels.rows import record_rows, uncounted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def backbone(tiny_backbone: MoETransformer) -> MoETransformer:
    """The tiny backbone on Triton kernels."""
    tiny_backbone.backend = "triton"
    return tiny_backbone.to(DEVICE)


@pytest.mark.parametrize("native", [True, False], ids=["native", "random subsets"])
def test_backbone_equals_the_reference_and_counts_the_same_rows(
    backbone: MoETransformer, tiny_tokens: Tensor, random_subsets: Router, native: bool
) -> None:
    """Same logits, and the rows that the kernels planned are those that the subsets ask for."""
    tokens = tiny_tokens[:2].to(DEVICE)
    with count_rows() as counted:
        logits, subsets = backbone.run(tokens, NativeRouter() if native else random_subsets)
    backbone.backend = "reference"
    replay = iter(subsets)

    class Replay:
        def select(self, view) -> Tensor:
            return next(replay)

    expected, _ = backbone.run(tokens, Replay())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    asked = {"heads": 0, "experts": 0}
    for site, subset in zip(backbone.sites, subsets, strict=True):
        asked[site.kind] += int(subset.sum())
    assert counted == asked


def test_decoding_with_a_cache_equals_the_whole_prompt(backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """Keys and values that lie in a larger cache are read in place."""
    tokens = tiny_tokens[:1, :3].to(DEVICE)
    whole, _ = backbone.run(tokens, NativeRouter())
    cache = backbone.new_cache()
    steps = [backbone.run(tokens[:, i : i + 1], NativeRouter(), cache=cache)[0] for i in range(3)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_backbone_equal_the_reference(backbone: MoETransformer, tiny_tokens: Tensor) -> None:
    """Pretraining on these kernels follows the same gradients."""
    tokens = tiny_tokens[:1, :5].to(DEVICE)
    gradients = {}
    for backend in ("triton", "reference"):
        backbone.backend = backend  # type: ignore[assignment]
        backbone.requires_grad_().zero_grad()
        backbone(tokens).logsumexp(2).sum().backward()
        gradients[backend] = {name: weight.grad.clone() for name, weight in backbone.named_parameters()}
    torch.testing.assert_close(gradients["triton"], gradients["reference"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learning"])
def test_gate_vector_on_these_kernels_equals_the_reference(
    tiny_config: BackboneConfig, tiny_tokens: Tensor, learns: bool
) -> None:
    """They are given scaled projections like any others."""
    backbone = MoETransformer(replace(tiny_config, mixing="gate_vector")).to(DEVICE)
    for layer in backbone.expert_layers:
        layer.vector.data.normal_()  # type: ignore[union-attr]
    tokens = tiny_tokens[:1, :5].to(DEVICE)
    results = []
    for backend in ("triton", "reference"):
        backbone.backend = backend  # type: ignore[assignment]
        backbone.requires_grad_(learns).zero_grad()
        logits = backbone(tokens)
        if learns:
            logits.logsumexp(2).sum().backward()
        gradients = [weight.grad.clone() for weight in backbone.parameters() if weight.grad is not None]
        results.append([logits.detach(), *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_rows_of_a_recomputation_are_not_counted_twice() -> None:
    """A backward pass that runs rows again adds nothing, and counting goes on after it."""
    with count_rows() as rows:
        with uncounted():
            record_rows("heads", 5)
        record_rows("heads", torch.tensor([1, 2]))
    assert rows["heads"] == 3

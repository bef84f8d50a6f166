"""16-bit products beside float32 weights: what is lowered, what is not, and that training survives it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_backbone import BackboneConfig, MoETransformer, NativeRouter
from moe_backbone.corpus import Corpus
from moe_backbone.kernels import BACKENDS
from moe_backbone.precision import DTYPES, autocast, loss_scaler
from moe_backbone.pretrain import Pretraining, backbone_key, native_loss
from moe_backbone.pretrain_config import LATER_SETTINGS, PretrainConfig, shaping

SETTINGS = PretrainConfig(steps=24, sequences=4, eval_every=8, learning_rate=1e-2)
LOWER = sorted(DTYPES)


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("backend", ["auto", "reference", "compact"])
@pytest.mark.parametrize("meaning", ["query", "query_key_value"])
def test_every_backend_runs_close_to_full_precision(
    precision: Any,
    backend: Any,
    meaning: Any,
    tiny_backbone: MoETransformer,
    tiny_tokens: torch.Tensor,
    random_subsets: Any,
) -> None:
    """Logits, gates and the residual stream stay float32; the products do not, so the numbers differ a little."""
    seen = []

    class Watched:
        def select(self, view: Any) -> torch.Tensor:
            seen.append((view.features.dtype, view.scores.dtype))
            subset: torch.Tensor = chosen[view.index]
            return subset

    with torch.no_grad(), tiny_backbone.using(backend, head_meaning=meaning):
        exact, chosen = tiny_backbone.run(tiny_tokens, random_subsets)
        with autocast(precision, "cpu"):
            lower, _ = tiny_backbone.run(tiny_tokens, Watched())
    assert lower.dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32)}
    assert not torch.equal(lower, exact)
    assert (lower - exact).abs().max() < 0.05 * exact.abs().max()
    assert "triton" in BACKENDS  # the one that is missing here needs a GPU


def test_gates_are_computed_in_full(tiny_backbone: MoETransformer, tiny_tokens: torch.Tensor) -> None:
    """From the same features the scores are the same to the bit."""
    features = torch.randn(5, tiny_backbone.hidden_size)
    layer = tiny_backbone.expert_layers[0]
    with autocast("bf16", "cpu"):
        assert torch.equal(layer.scores(features), _outside(layer, features))


def _outside(layer: Any, features: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        scores: torch.Tensor = layer.scores(features)
        return scores


@pytest.mark.parametrize("precision", LOWER)
def test_trains_and_resumes_to_the_bit(
    precision: Any, tiny_corpus: Corpus, tiny_config: BackboneConfig, tmp_path: Path
) -> None:
    """Weights and moments are float32, the loss falls as in full precision, and an interruption leaves no trace."""
    settings = replace(SETTINGS, precision=precision)

    def training(name: str, chosen: PretrainConfig = settings) -> Pretraining:
        return Pretraining(tiny_corpus, tiny_config, chosen, "cpu", tmp_path / name)

    whole = training("whole")
    trained = whole.run()
    assert {weight.dtype for weight in trained.parameters()} == {torch.float32}
    moments = [state["exp_avg"].dtype for state in whole.optimizer.state.values()]
    assert set(moments) == {torch.float32}

    def interrupt(step: int, loss: float) -> None:
        if step == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training("part").run(interrupt)
    resumed = training("part")
    assert resumed.step == 16
    assert resumed.scaler.state_dict().get("_growth_tracker", 16) == 16
    assert resumed.run().sha256() == trained.sha256()
    full = training("full", SETTINGS).run()
    losses = [native_loss(model, tiny_corpus.test, max_tokens=512, device="cpu") for model in (full, trained)]
    assert full.sha256() != trained.sha256()
    assert losses[1] < losses[0] + 0.1


def test_only_fp16_scales_the_loss() -> None:
    """Otherwise the loss passes through as the same tensor, so full precision is what it was to the bit."""
    loss = torch.ones(())
    assert loss_scaler("fp16", "cpu").scale(loss).item() > 1
    assert loss_scaler("bf16", "cpu").scale(loss) is loss
    assert loss_scaler("fp32", "cpu").scale(loss) is loss


def test_kept_backbones_are_found_though_settings_were_added(tiny_corpus: Corpus) -> None:
    """The key of the defaults is what it was before there was a precision; another precision trains other weights."""
    corpus = replace(tiny_corpus, sha256="0" * 64)
    assert backbone_key(corpus, BackboneConfig(), PretrainConfig()) == "47aa5d02b6dabc56"
    assert backbone_key(corpus, BackboneConfig(), PretrainConfig(precision="bf16")) != "47aa5d02b6dabc56"
    assert not set(LATER_SETTINGS) & set(shaping(PretrainConfig()))
    assert shaping(PretrainConfig(precision="bf16"))["precision"] == "bf16"


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, got 'fp8'"):
        PretrainConfig(precision="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", LOWER)
def test_gradients_reach_every_weight(precision: Any, tiny_config: BackboneConfig, tiny_tokens: torch.Tensor) -> None:
    """In float32, close to those of full precision in direction."""
    torch.manual_seed(0)
    backbone = MoETransformer(tiny_config)
    gradients = []
    for chosen in ("fp32", precision):
        backbone.zero_grad()
        with autocast(chosen, "cpu"):
            logits, _ = backbone.run(tiny_tokens, NativeRouter())
        logits.log_softmax(-1)[..., 0].mean().backward()
        gradients.append([weight.grad for weight in backbone.parameters()])
    for exact, lower in zip(*gradients, strict=True):
        assert lower.dtype == torch.float32
        assert torch.cosine_similarity(exact.flatten(), lower.flatten(), dim=0) > 0.98

"""A checkpoint of transformers is trained on, on a mixture, by peft or in part, and ends as a plain checkpoint."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="checkpoints need the extra huggingface")
pytest.importorskip("peft", reason="LoRA and IA3 of checkpoints need the extra finetune")

from moe_backbone.continual import tune
from moe_backbone.corpus import Corpus
from moe_backbone.huggingface import HuggingFaceBackbone, load_model
from moe_backbone.huggingface.tuning import CheckpointContinual
from moe_backbone.mixture import Mixture
from moe_backbone.tuning import Method, TuningConfig

SETTINGS = TuningConfig(steps=6, sequences=4, eval_every=3, rank=2, learning_rate=1e-2)
SEQ_LEN = 16
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
ATTENTION = r"self_attn\.[qkvo]_proj\.weight"
CHANGES: dict[tuple[str, Method], str] = {
    ("Olmoe", "full"): r".*",
    ("Olmoe", "lora"): rf".*({ATTENTION}|experts\.(gate_up|down)_proj)",
    ("Olmoe", "ia3"): r".*self_attn\.[kv]_proj\.weight",
    ("Olmoe", "norms"): r".*norm\.weight",
    ("Olmoe", "top_layers"): r"(model\.layers\.1\.|model\.norm\.|lm_head\.).*",
    ("Qwen2Moe", "lora"): rf".*({ATTENTION}|experts?\.((gate_up|down)_proj|(gate|up|down)_proj\.weight))",
    ("Qwen2Moe", "ia3"): r".*(self_attn\.[kv]_proj|shared_expert\.down_proj)\.weight",
    ("Qwen2Moe", "bitfit"): r".*bias",
}
"""Names of what a method may change, and must."""
Begin = Callable[..., CheckpointContinual]


def _build(kind: str, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    more = {"num_experts": 4} if kind == "Olmoe" else QWEN
    config = getattr(transformers, f"{kind}Config")(**SIZES | more | changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)


@pytest.fixture
def begin(tiny_corpus: Corpus, tmp_path: Path) -> Begin:
    """Begins a training of a fresh model of this kind by this method."""
    mixture = Mixture(names=("one", "two"), corpora=(tiny_corpus, tiny_corpus), first=(0.5, 0.5), last=(0.5, 0.5))

    def make(kind: str, method: Method, name: str = "run", **changes: Any) -> CheckpointContinual:
        tuning = replace(SETTINGS, method=method, **changes)
        partial = tmp_path / f"{name}.partial"
        return CheckpointContinual(mixture, _build(kind), tuning, "cpu", partial, max_tokens=256, seq_len=SEQ_LEN)

    return make


@pytest.mark.parametrize(("kind", "method"), CHANGES, ids=lambda value: value)
def test_only_what_the_method_trains_changes(begin: Begin, kind: str, method: Method, tmp_path: Path) -> None:
    """All else is the same to the bit; the folder holds a plain checkpoint that can be routed and predicts the same."""
    before = _build(kind).state_dict()
    model, outcome = tune(begin(kind, method))
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.fullmatch(CHANGES[kind, method], name)}
    assert outcome.after["one"] < outcome.before["one"]
    model.save_pretrained(tmp_path / "saved")
    again, tokens = load_model(str(tmp_path / "saved")), torch.randint(256, (2, SEQ_LEN))
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert {site.kind for site in HuggingFaceBackbone(again, seq_len=SEQ_LEN).sites} == {"experts"}


def test_the_merged_model_is_what_was_trained(begin: Begin) -> None:
    """Test losses of the wrapped model, its low-rank sums beside the weights, are those of the plain one."""
    training = begin("Olmoe", "lora", learning_rate=3e-2)
    merge, wrapped = training._merged, {}

    def measure() -> Any:
        wrapped.update(training.test_losses(training.backbone))
        return merge()

    training._merged = measure  # type: ignore[method-assign]
    _, outcome = tune(training)
    assert outcome.after == pytest.approx(wrapped, abs=1e-5)
    assert outcome.before["one"] - outcome.after["one"] > 0.1
    assert outcome.frozen_parameters == outcome.parameters


def test_interrupted_training_ends_like_one_that_was_not(begin: Begin) -> None:
    """The new weights are drawn again, and then read back; what came before is measured on the start."""
    whole, told = tune(begin("Olmoe", "lora", "whole"))

    def interrupt(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin("Olmoe", "lora", "part").run(interrupt)
    again = begin("Olmoe", "lora", "part")
    assert again.step == 3
    model, outcome = tune(again)
    assert outcome == told
    after = whole.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in model.state_dict().items())


def test_the_balance_loss_is_the_checkpoints_own(begin: Begin) -> None:
    """By its own weight, where it has one."""
    training = begin("Olmoe", "full")
    tokens, targets = training._draw(4)
    losses = []
    for weight in (0.0, 0.5):
        training.backbone.config.router_aux_loss_coef = weight
        losses.append(training._loss(tokens, targets).item())
    balance = training.backbone(input_ids=tokens, output_router_logits=True).aux_loss.item()
    assert losses[1] - losses[0] == pytest.approx(0.5 * balance, rel=1e-3)


def test_the_methods_own_learning_rate_is_a_tenth(begin: Begin) -> None:
    assert begin("Olmoe", "full", learning_rate=None).pretrain.learning_rate == pytest.approx(1e-4)
    assert begin("Olmoe", "full", learning_rate=2e-5).pretrain.learning_rate == 2e-5


def test_refusals(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checkpoint does not have, and what is not installed."""
    with pytest.raises(ValueError, match="method must train something that the checkpoint has, got bitfit"):
        begin("Olmoe", "bitfit")
    with pytest.raises(ValueError, match="top_layers must be at most 2, got 3"):
        begin("Olmoe", "top_layers", top_layers=3)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(ValueError, match=r"must have the extra finetune installed .*, got no peft"):
        begin("Olmoe", "lora")
    begin("Olmoe", "norms")  # which needs no peft

"""A run on a checkpoint of transformers, from the command line to a model that generates under the router."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="checkpoints need the extra huggingface")
pytest.importorskip("greenlet", reason="checkpoints need the extra huggingface")

import policies
from benchmarks import small_checkpoint
from evaluate_rl import main as evaluate
from moe_backbone.huggingface import load_model, load_tokenizer
from moe_backbone.kernels import count_rows
from train_rl import main as train

SIZES = {"seq-len": 16, "vocab-size": 300, "hidden-size": 32, "intermediate-size": 16, "num-layers": 2}
EXPERTS = {"num-experts": 8, "top-k": 2, "steps": 20, "sequences": 4}


@pytest.fixture(scope="session")
def checkpoint(run_world: Path) -> Path:
    """A small OLMoE with its tokenizer, trained for a moment on the corpus of the runs."""
    folder = run_world / "checkpoint"
    flags = [word for name, value in (SIZES | EXPERTS).items() for word in (f"--{name}", str(value))]
    small_checkpoint.main([str(folder), "--text", str(run_world / "corpus.jsonl"), *flags])
    return folder


@pytest.fixture(scope="session")
def routed_run(start_run: Callable[..., Path], checkpoint: Path) -> Path:
    """Folder of a whole run on the checkpoint."""
    return start_run("routed-checkpoint", checkpoint=checkpoint, seq_len=16, warm_start__num_sequences=2)


def test_the_run_folder_is_that_of_any_run(routed_run: Path, tiny_run: Any) -> None:
    """The same files, in the tokens of the checkpoint's tokenizer; and only experts are sites."""
    assert tiny_run.files <= {path.name for path in routed_run.iterdir()}
    page = (routed_run / "report.html").read_text(encoding="utf-8")
    assert "By first character of the token" in page
    assert "byte's compute" not in page
    assert {site.kind for site in policies.portable.read_sites(routed_run)} == {"experts"}


def test_a_trace_replays_the_router(routed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a trace recorded is scored as the router itself was at that budget."""
    from policies.trace import Trace

    words = [str(routed_run), "--output", str(tmp_path), "--routers", "top-k", "--evaluation.max-tokens", "256"]
    words += ["--evaluation.num-prices", "3", "--evaluation.greedy-tokens", "128", "--device", "cpu"]
    kept = tmp_path / "routing.npz"
    evaluate([*words, "--trace", str(kept), "--trace-cost-limit", "0.9"])
    trace = Trace.load(kept)
    assert trace.routed_experts.shape[:2] == (trace.tokens.size, 2)
    evaluate([*words, "--replay", str(kept)])
    assert '"router": "trace"' in (tmp_path / "evaluation.json").read_text(encoding="utf-8")


def test_the_router_goes_into_the_model(routed_run: Path, checkpoint: Path) -> None:
    """It generates, skips what it counts as skipped, and leaves the model as it was."""
    model, tokenizer = load_model(str(checkpoint)), load_tokenizer(str(checkpoint))
    inputs = tokenizer(["the router sends", "some tokens"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    before = model(**inputs).logits
    dear = policies.attach(model, routed_run, price=2.5)
    with count_rows() as rows:
        text = dear.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert text.shape[0] == 2
    native_rows = 2 * 2 * (inputs["input_ids"].numel() + 2 * 3)  # layers, experts; prompt, and three new tokens each
    assert 0 <= rows["experts"] < native_rows
    overhead = dear.router.overhead_flops / (2 * 2 * 3 * 2 * 32 * 16)
    assert dear.compute == pytest.approx(rows["experts"] / native_rows + overhead, rel=1e-4)
    dear.detach()
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("dense", [True, False])
def test_heads_are_routed(
    start_run: Callable[..., Path], checkpoint: Path, routed_run: Path, run_world: Path, dense: bool
) -> None:
    """Of a dense model for lack of experts, beside the experts on demand; evaluated as any run, one after another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    changes: dict[str, Any] = {"seq_len": 16, "warm_start__num_sequences": 2, "checkpoint": checkpoint}
    words = ["--route-heads"]
    if dense:
        folder, words = run_world / "llama", []
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder)
        load_tokenizer(str(checkpoint)).save_pretrained(folder)
        changes["checkpoint"] = folder
    run = start_run(f"routed-heads-{dense}", *words, **changes)
    kinds = ["heads"] * 2 if dense else ["heads", "experts"] * 2
    assert [site.kind for site in policies.portable.read_sites(run)] == kinds
    assert (run / "report.html").exists()


class TestRefusals:
    """One line each, and no run folder."""

    @pytest.fixture
    def refused(self, run_world: Path, tmp_path: Path, refusal: Callable[..., str]) -> Callable[[Any], str]:
        """What training on a path says."""

        def read(path: Any, *more: str) -> str:
            words = ["--checkpoint", str(path), "--corpus", str(run_world / "corpus.jsonl"), "--seq-len", "16"]
            message = refusal(train, [*words, "--run-dir", str(tmp_path / "run"), *more])
            assert not (tmp_path / "run").exists()
            return message

        return read

    def test_no_folder(self, refused: Callable[..., str], tmp_path: Path) -> None:
        assert f"must be a folder or a hub id, got {tmp_path / 'nowhere'}" in refused(tmp_path / "nowhere")

    @pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_a_part_is_missing(
        self, refused: Callable[..., str], checkpoint: Path, tmp_path: Path, missing: str
    ) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(checkpoint, broken)
        (broken / missing).unlink()
        what = "a tokenizer" if missing == "tokenizer.json" else "a causal language model"
        assert f"checkpoint must hold {what}" in refused(broken)

    def test_cut_off_weights(self, refused: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(checkpoint, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        assert "that transformers can load" in refused(broken)

    def test_windows_longer_than_the_model_reads(self, refused: Callable[..., str], checkpoint: Path) -> None:
        assert "seq_len must be at most 1024 for this model, got 2048" in refused(checkpoint, "--seq-len", "2048")

    def test_without_transformers(
        self, refused: Callable[..., str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
        assert "must have the extra huggingface installed" in refused(checkpoint)

    def test_nothing_to_route(self, refused: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
        """A recurrent model has neither experts nor attention."""
        from transformers import MambaConfig, MambaForCausalLM

        other = tmp_path / "mamba"
        config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
        MambaForCausalLM(config).save_pretrained(other)
        load_tokenizer(str(checkpoint)).save_pretrained(other)
        assert "model must have experts or attention heads" in refused(other)

    def test_a_router_of_another_model(self, routed_run: Path) -> None:
        from transformers import OlmoeConfig, OlmoeForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
        other = OlmoeForCausalLM(OlmoeConfig(vocab_size=300, num_experts=8, num_experts_per_tok=2, **sizes))
        with pytest.raises(ValueError, match=r"router must be made for this backbone, OlmoeForCausalLM .*checkpoint"):
            policies.attach(other, routed_run, price=0.1)
        assert other.config._experts_implementation != "routegym"
        assert other.training

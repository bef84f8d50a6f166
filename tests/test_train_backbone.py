"""The command that trains backbones: from scratch, on a mixture, and checkpoints of transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import small_checkpoint
from moe_backbone.continual import Continual
from moe_backbone.pretrain import Pretraining
from moe_backbone.saved import load_saved, read_about
from train_backbone import main

SIZES = {"hidden-size": 16, "num-layers": 1, "num-heads": 2, "num-experts": 4, "top-k": 2, "intermediate-size": 8}
SCRATCH = [word for name, value in SIZES.items() for word in (f"--backbone.{name}", str(value))]
SCRATCH += ["--backbone.seq-len", "16", "--pretrain.steps", "6", "--pretrain.sequences", "2"]
TUNING = ["--steps", "6", "--eval-every", "2", "--sequences", "2", "--max-tokens", "128"]


@pytest.fixture
def texts(text_folder: Path, tmp_path: Path) -> list[str]:
    """A mixture of the documents of `text_folder`, and of the same in capitals, for the command line."""
    other = tmp_path / "other"
    other.mkdir()
    for path in text_folder.iterdir():
        (other / path.name).write_text(path.read_text(encoding="utf-8").upper(), encoding="utf-8")
    return ["--mix", f"general={text_folder}:0.75..0.25", f"domain={other}:0.25..0.75"]


@pytest.fixture
def base(text_folder: Path, tmp_path: Path) -> Path:
    """Folder of a backbone trained from scratch by the command."""
    main(["--corpus", str(text_folder), "--output", str(tmp_path / "base"), "--max-tokens", "128", *SCRATCH])
    return tmp_path / "base"


def test_a_backbone_from_scratch_is_trained_on_and_told_of(
    base: Path, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses of both texts before and after, what was forgotten, what learned, and that the rest did not."""
    caplog.set_level(logging.INFO)
    output = tmp_path / "tuned"
    main(["--start", str(base), *texts, "--method", "lora", "--rank", "2", "--output", str(output), *TUNING])
    start, tuned, about = load_saved(base), load_saved(output), read_about(output)
    assert tuned.config == start.config
    assert tuned.sha256() != start.sha256() == about["start_sha256"]
    assert torch.equal(tuned.embedding.weight, start.embedding.weight)
    assert about["mix"]["general"]["sha256"] == read_about(base)["corpus_sha256"]
    assert about["mix"]["domain"]["shares"] == [0.25, 0.75]
    assert about["tuning"]["method"] == "lora"
    outcome = about["outcome"]
    printed = capsys.readouterr().out
    for name in ("general", "domain"):
        for when in ("before", "after"):
            assert f"{outcome[when][name]:.4f}" in printed
    said = caplog.text
    assert f"rose by {outcome['after']['general'] - outcome['before']['general']:+.4f}" in said
    assert f"trained: {outcome['trained_parameters']:,} parameters" in said
    assert f"frozen: {start.num_parameters:,} parameters, sha256" in said
    assert "was not trained on" not in said
    assert {path.name for path in output.iterdir()} == {"backbone.safetensors", "backbone.json"}


def test_without_a_start_the_first_text_is_learned_first(
    base: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same backbone as from scratch, out of the cache."""

    def train(self: Pretraining) -> None:
        raise AssertionError("it was trained before")

    run = Continual.run
    monkeypatch.setattr(Pretraining, "run", train)
    monkeypatch.setattr(Continual, "run", lambda self, report: self._merged())
    main([*texts, "--output", str(tmp_path / "tuned"), *TUNING, *SCRATCH])
    assert read_about(tmp_path / "tuned")["start_sha256"] == load_saved(base).sha256()
    monkeypatch.setattr(Continual, "run", run)


def test_the_same_command_goes_on_with_a_stopped_training(
    base: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, and ends as one that was not stopped; a finished one is not overwritten."""
    caplog.set_level(logging.INFO)
    words = ["--start", str(base), *texts, *TUNING, "--output"]
    main([*words, str(tmp_path / "whole")])
    step = Continual._train_step

    def interrupted(self: Continual) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Continual, "_train_step", interrupted)
        with pytest.raises(SystemExit) as caught:
            main([*words, str(tmp_path / "part")])
    assert caught.value.code == 130
    assert "go on with: python train_backbone.py" in caplog.text
    main([*words, str(tmp_path / "part")])
    assert "going on at step 4" in caplog.text
    assert load_saved(tmp_path / "part").sha256() == load_saved(tmp_path / "whole").sha256()
    with pytest.raises(SystemExit, match="output must be a folder without a trained model"):
        main([*words, str(tmp_path / "part")])


def test_another_first_text_than_the_start_knows_is_told(
    base: Path, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Forgetting would be measured on something else."""
    main(["--start", str(base), "--mix", *texts[:0:-1], "--output", str(tmp_path / "tuned"), *TUNING])
    assert "was not trained on domain" in caplog.text


def test_a_checkpoint_is_trained_on(texts: list[str], text_folder: Path, tmp_path: Path) -> None:
    """By peft, in its own tokens; what comes out is a checkpoint with its tokenizer."""
    pytest.importorskip("transformers", reason="checkpoints need the extra huggingface")
    pytest.importorskip("peft", reason="LoRA of checkpoints needs the extra finetune")
    from moe_backbone.huggingface import load_model, load_tokenizer

    sizes = ["--hidden-size", "32", "--intermediate-size", "16", "--num-layers", "1", "--num-experts", "4"]
    more = ["--top-k", "2", "--seq-len", "16", "--vocab-size", "270", "--steps", "4", "--sequences", "2"]
    small_checkpoint.main([str(tmp_path / "model"), "--text", str(text_folder), *sizes, *more])
    output = tmp_path / "tuned"
    words = ["--checkpoint", str(tmp_path / "model"), *texts, "--method", "lora", "--seq-len", "16", *TUNING]
    main([*words, "--output", str(output)])
    before, after = load_model(str(tmp_path / "model")).state_dict(), load_model(str(output)).state_dict()
    assert before.keys() == after.keys()
    changed = {name.partition("layers.0.")[2] for name in before if not torch.equal(before[name], after[name])}
    assert {"mlp.experts.down_proj", "self_attn.q_proj.weight"} <= changed
    assert "mlp.gate.weight" not in changed
    assert load_tokenizer(str(output)).get_vocab() == load_tokenizer(str(tmp_path / "model")).get_vocab()
    outcome = json.loads((output / "training.json").read_text(encoding="utf-8"))["outcome"]
    assert outcome["after"].keys() == {"general", "domain"}
    assert not list(output.glob("*.partial"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start", "HERE"], "mix must say what HERE is trained on, got none"),
        (["--checkpoint", "HERE"], "mix must say what HERE is trained on, got none"),
        (["--mix", "a=HERE:1", "--corpus", "HERE"], "corpus must not be given beside mix, got HERE"),
        (["--mix", "a=HERE:1", "--start", "HERE", "--checkpoint", "x"], "checkpoint must not be given beside start"),
        (["--mix", "a=HERE:1", "--start", "HERE"], "backbone folder must hold readable"),
        (["--mix", "a=HERE:x", *SCRATCH], "mix must have a number or START..END behind the colon, got 'x' for a"),
        (["--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
    ],
)
def test_refusals(
    refusal: Callable[..., str], text_folder: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    """One line each, and nothing is left behind."""
    here = [word.replace("HERE", str(text_folder)) for word in words]
    said = refusal(main, [*here, "--output", str(tmp_path / "output")])
    assert message.replace("HERE", str(text_folder)) in said
    assert not (tmp_path / "output").exists()

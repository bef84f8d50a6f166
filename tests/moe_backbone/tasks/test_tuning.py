"""A backbone learns a task, goes on after a stop, and leaves its start alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.pretrain import native_loss
from moe_backbone.tasks import load_task
from moe_backbone.tasks.tuning import TaskTuning, TuningConfig, tune, widened

SETTINGS = TuningConfig(steps=40, sequences=4, eval_every=10, learning_rate=1e-2)
SIZES = BackboneConfig(
    hidden_size=16, num_layers=1, num_heads=2, num_experts=4, top_k=2, intermediate_size=8, seq_len=32
)


@pytest.fixture
def start() -> MoETransformer:
    """Seeded random weights."""
    return MoETransformer(SIZES)


@pytest.mark.parametrize("kind", ["texts_file", "tags_file"])
def test_labels_are_learned(kind: str, start: MoETransformer, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Better than any guess that knows how often labels are, in both kinds of tasks; the start stays as it was."""
    task, before = load_task(request.getfixturevalue(kind), seq_len=32, lookahead=1), start.sha256()
    path = tmp_path / "tuned.safetensors"
    tuned = tune(path, task, start, SETTINGS)
    assert native_loss(tuned, task.validation, max_tokens=4096, device="cpu") < 0.6
    assert start.sha256() == before
    assert tune(path, task, start, SETTINGS).sha256() == tuned.sha256()


def test_a_stopped_training_goes_on_to_the_bit(texts_file: Path, start: MoETransformer, tmp_path: Path) -> None:
    """From its last look, hidden words and windows drawn included."""
    task = load_task(texts_file, seq_len=32)
    whole = TaskTuning(task, start, SETTINGS, "cpu", tmp_path / "whole").run().sha256()

    def stop(step: int, loss: float) -> None:
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TaskTuning(task, start, SETTINGS, "cpu", tmp_path / "partial").run(stop)
    assert TaskTuning(task, start, SETTINGS, "cpu", tmp_path / "partial").run().sha256() == whole


def test_hidden_words_hide_no_end_and_no_target(texts_file: Path, start: MoETransformer, tmp_path: Path) -> None:
    """With all words hidden only their ends are left to read."""
    task = load_task(texts_file, seq_len=32)
    tuning = TaskTuning(task, start, replace(SETTINGS, hidden_words=1.0), "cpu", tmp_path / "partial")
    tokens, targets = tuning._draw(SETTINGS.sequences)
    assert set(tokens.unique().tolist()) == {0x00, 0x20, 0x0A}
    assert (tokens[targets >= 0] == 0x0A).all()


def test_other_windows_same_weights(start: MoETransformer) -> None:
    """A longer window changes no prediction."""
    tokens = torch.randint(256, (1, 32))
    other = widened(start, 48)
    torch.testing.assert_close(other(tokens), start(tokens))
    assert other(torch.randint(256, (1, 48))).shape == (1, 48, 256)


def test_impossible_settings() -> None:
    """Name, rule and value."""
    with pytest.raises(ValueError, match=r"hidden_words must lie in \[0, 1\], got 2"):
        TuningConfig(hidden_words=2.0)

"""A student with fewer experts learns its teacher's predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_backbone import BackboneConfig, MoETransformer, NativeRouter
from moe_backbone.corpus import Corpus
from moe_backbone.distill import Distillation, DistillConfig, distilled, with_top_k
from moe_backbone.pretrain import PretrainConfig
from moe_backbone.quality import token_divergence
from moe_backbone.saved import WEIGHTS, load_saved

SETTINGS = PretrainConfig(steps=40, sequences=4, eval_every=10, learning_rate=3e-3, balance_weight=0.0)


def test_a_copy_with_fewer_experts_is_the_original_under_that_top_k(
    tiny_backbone: MoETransformer, tiny_tokens: torch.Tensor
) -> None:
    """Its native routing takes that many of the best experts; weights and original stay."""
    student = with_top_k(tiny_backbone, 1)
    _, subsets = student.run(tiny_tokens, NativeRouter())
    assert {int(count) for subset in subsets[1::2] for count in subset.sum(1)} == {1}
    assert tiny_backbone.config.top_k == 2
    weights, others = student.state_dict(), tiny_backbone.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_student_comes_closer_to_its_teacher(
    tiny_corpus: Corpus, tiny_backbone: MoETransformer, tmp_path: Path
) -> None:
    """The KL falls to well below that of the untrained copy; the file is a backbone with fewer experts."""
    tokens, _, _ = tiny_corpus.test.windows(tiny_backbone.config.seq_len, 512)
    expected, _ = tiny_backbone.run(tokens, NativeRouter())

    def divergence(student: MoETransformer) -> float:
        return token_divergence(expected, student.run(tokens, NativeRouter())[0]).mean().item()

    teacher = tiny_backbone.sha256()
    student = distilled(tmp_path / "one", tiny_corpus, tiny_backbone, 1, SETTINGS, DistillConfig())
    assert tiny_backbone.sha256() == teacher
    assert divergence(student) < 0.7 * divergence(with_top_k(tiny_backbone, 1))
    assert load_saved(tmp_path / "one").config.top_k == 1
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["backbone.json", WEIGHTS]
    again = distilled(tmp_path / "one", tiny_corpus, tiny_backbone, 1, SETTINGS, DistillConfig())
    assert again.sha256() == student.sha256()


def test_loss_is_the_weighted_sum_of_both(
    tiny_corpus: Corpus, tiny_backbone: MoETransformer, tiny_config: BackboneConfig, tmp_path: Path
) -> None:
    """At temperature 2 the KL of halved logits, times 4; at weight 0 the text's loss alone, and no teacher runs."""
    tokens, targets, _ = tiny_corpus.train.windows(tiny_config.seq_len, 128)
    student = with_top_k(tiny_backbone, 1)

    def loss(**settings: Any) -> torch.Tensor:
        config = DistillConfig(**settings)
        training = Distillation(tiny_corpus, student, tiny_backbone, SETTINGS, config, "cpu", tmp_path / "none")
        if not config.teacher_weight:
            training.teacher = None  # type: ignore[assignment]
        return training._text_loss(logits, tokens, targets)

    logits, _ = student.run(tokens, NativeRouter())
    expected, _ = tiny_backbone.run(tokens, NativeRouter())
    text = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    softened = 4 * token_divergence(expected / 2, logits / 2).mean()
    torch.testing.assert_close(loss(teacher_weight=0.0), text)
    torch.testing.assert_close(loss(temperature=2.0), softened)
    torch.testing.assert_close(loss(teacher_weight=0.25, temperature=2.0), 0.25 * softened + 0.75 * text)
    everything, _ = with_top_k(tiny_backbone, tiny_config.num_experts).run(tokens, NativeRouter())
    torch.testing.assert_close(loss(teacher_top_k=tiny_config.num_experts), token_divergence(everything, logits).mean())


def test_interrupted_training_ends_like_one_that_was_not(
    tiny_corpus: Corpus, tiny_backbone: MoETransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the last look at the validation text, to the bit."""
    settings = replace(SETTINGS, steps=20, eval_every=5)

    def run(name: str) -> str:
        return distilled(tmp_path / name, tiny_corpus, tiny_backbone, 1, settings, DistillConfig()).sha256()

    whole, step = run("whole"), Distillation._train_step

    def interrupted(self: Distillation) -> None:
        if self.step == 12:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "_train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("part")
    assert (tmp_path / "part" / "student.partial").exists()
    assert run("part") == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"teacher_weight": 1.5}, "teacher_weight must lie in"), ({"temperature": 0}, "temperature must be positive")],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**settings)

"""A student that runs fewer experts natively, trained to predict what its teacher predicts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moe_backbone.checkpoints import discard_checkpoint
from moe_backbone.checks import require, require_fraction
from moe_backbone.corpus import Corpus
from moe_backbone.pretrain import FineTuning, PretrainConfig, native_loss
from moe_backbone.quality import token_divergence
from moe_backbone.saved import WEIGHTS, load_saved, save_backbone
from moe_backbone.sites import NativeRouter
from moe_backbone.transformer import MoETransformer


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a student learns from.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    teacher_weight: float = 1.0
    """Share of the loss that is KL(teacher || student); the rest is that of the text. 0 asks no teacher."""
    temperature: float = 1.0
    """Divides the logits of both; the KL is multiplied by its square (arXiv:1503.02531)."""
    teacher_top_k: int | None = None
    """Experts that the teacher runs for a token; None for its native number."""

    def __post_init__(self) -> None:
        require_fraction(self, "teacher_weight")
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")


def with_top_k(backbone: MoETransformer, top_k: int) -> MoETransformer:
    """A copy whose native routing uses another number of experts: same weights, frozen, on the same device."""
    copy = MoETransformer(replace(backbone.config, top_k=top_k))
    copy.load_state_dict(backbone.state_dict())
    copy.head_meaning = backbone.head_meaning
    return copy.requires_grad_(False).eval().to(next(backbone.parameters()).device)


class Distillation(FineTuning):
    """Fine-tunes a student under its own native routing.

    Args:
        corpus: Text.
        student: Where to start; it is left as it is.
        teacher: Frozen, of the same vocabulary.
        settings: Learning rate, steps and the rest; its random routing is not used.
        distill: What to learn from.
        device: Where to train; the teacher must be there.
        partial: File to go on from if it exists.
    """

    def __init__(
        self,
        corpus: Corpus,
        student: MoETransformer,
        teacher: MoETransformer,
        settings: PretrainConfig,
        distill: DistillConfig,
        device: str,
        partial: Path,
    ) -> None:
        self.teacher, self.distill = teacher, distill
        if distill.teacher_top_k is not None:
            self.teacher = with_top_k(teacher, distill.teacher_top_k)
        super().__init__(corpus, student, settings, lambda generator: NativeRouter(), device, partial)

    def _text_loss(self, logits: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """KL from the teacher's predictions, mixed with the loss of the text."""
        share, temperature = self.distill.teacher_weight, self.distill.temperature
        if not share:
            return super()._text_loss(logits, tokens, targets)
        with torch.no_grad():
            expected, _ = self.teacher.run(tokens, NativeRouter())
        divergence = token_divergence(expected / temperature, logits / temperature).mean() * temperature**2
        if share == 1:
            return divergence
        return share * divergence + (1 - share) * super()._text_loss(logits, tokens, targets)

    def _validation_loss(self) -> float:
        """Of the text, so that students of both kinds stop by the same measure."""
        return native_loss(self.backbone, self.corpus.validation, max_tokens=16_384, device=self.device)


def distilled(
    folder: Path,
    corpus: Corpus,
    teacher: MoETransformer,
    top_k: int,
    settings: PretrainConfig,
    distill: DistillConfig,
    device: str = "cpu",
) -> MoETransformer:
    """A student with `top_k` experts a token, from its folder if it was trained before, else trained and kept there.

    It starts from the teacher's weights. The folder is one of `save_backbone`, with `top_k` in its sizes, so the
    student is its own native backbone. An interrupted training goes on from its last look at the validation text.

    Returns:
        The student in evaluation mode, frozen, on `device`.
    """
    if not (folder / WEIGHTS).exists():
        partial = folder / "student.partial"
        start = with_top_k(teacher, top_k)
        student = Distillation(corpus, start, teacher, settings, distill, device, partial).run()
        about = {"teacher_sha256": teacher.sha256(), "distill": asdict(distill), "settings": asdict(settings)}
        save_backbone(student, folder, about)
        discard_checkpoint(partial)
    student = load_saved(folder, device)
    student.head_meaning = teacher.head_meaning
    return student

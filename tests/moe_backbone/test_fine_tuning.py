"""A backbone is trained on under a router."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_backbone import MoETransformer, SiteView
from moe_backbone.corpus import Corpus
from moe_backbone.pretrain import FineTuning, PretrainConfig, fine_tune, routed_loss

SETTINGS = PretrainConfig(steps=60, sequences=4, eval_every=10, learning_rate=3e-3)


class SomeUnits:
    """Draws from the generator it is given."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def select(self, view: SiteView) -> torch.Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return torch.rand(view.scores.shape, generator=self.generator) < 0.3


def test_learns_what_the_router_needs_and_leaves_the_start_alone(
    tiny_corpus: Corpus, tiny_backbone: MoETransformer, tmp_path: Path
) -> None:
    before = tiny_backbone.sha256()
    tuned = fine_tune(tmp_path / "tuned.safetensors", tiny_corpus, tiny_backbone, SETTINGS, SomeUnits, "cpu")
    assert tiny_backbone.sha256() == before
    router = SomeUnits(torch.Generator().manual_seed(1))
    losses = [
        routed_loss(backbone, router, tiny_corpus.test, max_tokens=512, device="cpu")
        for backbone in (tiny_backbone, tuned)
    ]
    assert losses[1] < losses[0] - 0.5
    assert not any(weight.requires_grad for weight in tuned.parameters())
    again = fine_tune(tmp_path / "tuned.safetensors", tiny_corpus, tiny_backbone, SETTINGS, SomeUnits, "cpu")
    assert again.sha256() == tuned.sha256()
    assert [path.name for path in tmp_path.glob("tuned*")] == ["tuned.safetensors"]


def test_head_meaning_goes_with_the_backbone(
    tiny_corpus: Corpus, tiny_backbone: MoETransformer, tmp_path: Path
) -> None:
    """It is trained under the meaning of its start, and comes out under it, whether it was kept or not."""
    settings, tuned = replace(SETTINGS, steps=5, eval_every=5), {}
    for meaning in ("query", "query_key_value"):
        tiny_backbone.head_meaning = meaning  # type: ignore[assignment]
        for _ in range(2):
            backbone = fine_tune(tmp_path / meaning, tiny_corpus, tiny_backbone, settings, SomeUnits, "cpu")
            assert backbone.head_meaning == meaning
        tuned[meaning] = backbone.sha256()
    assert tuned["query"] != tuned["query_key_value"]


def test_interrupted_training_ends_like_one_that_was_not(
    tiny_corpus: Corpus, tiny_backbone: MoETransformer, tmp_path: Path
) -> None:
    def training(partial: Path) -> FineTuning:
        return FineTuning(tiny_corpus, tiny_backbone, SETTINGS, SomeUnits, "cpu", partial)

    whole = training(tmp_path / "whole").run()

    def interrupt(step: int, loss: float) -> None:
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "part").run(interrupt)
    assert training(tmp_path / "part").run().sha256() == whole.sha256()

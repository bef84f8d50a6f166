"""Training at each precision: a row each, and none is made twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.precision import PrecisionConfig, measure
from moe_backbone.corpus import Corpus
from moe_backbone.pretrain import Pretraining


def test_every_precision_has_a_row(tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at the second, it goes on there; the numbers differ, as the products do."""
    config, run, runs = (
        PrecisionConfig(folder=tmp_path, hidden_size=16, num_layers=1, steps=3, updates=1),
        Pretraining.run,
        [],
    )

    def counted(self: Pretraining) -> object:
        runs.append(self.pretrain.precision)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return run(self)

    monkeypatch.setattr(Pretraining, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(config, tiny_corpus)
    rows = measure(config, tiny_corpus)
    assert runs == ["fp32", "bf16", "bf16", "fp16"]
    assert measure(config, tiny_corpus) == rows
    assert len(runs) == 4
    assert len({row["test_loss"] for row in rows.values()}) == 3
    assert len({row["return"] for row in rows.values()}) == 3

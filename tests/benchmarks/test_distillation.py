"""Students with fewer experts: every row is there, and a stopped command goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.distillation import main
from moe_backbone.distill import Distillation
from moe_backbone.saved import load_saved


def test_command_trains_scores_and_goes_on(
    finished: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Any
) -> None:
    out = tmp_path / "out"
    words = [str(finished), "--output", str(out), "--selection-tokens", "128", "--max-tokens", "256"]
    sizes = ["--settings.steps", "6", "--settings.eval-every", "3", "--settings.sequences", "2"]
    step, steps = Distillation._train_step, []

    def counted(self: Distillation) -> None:
        steps.append(self.config.top_k)
        if len(steps) == 9:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Distillation, "_train_step", counted)
    with pytest.raises(KeyboardInterrupt):
        main([*words, *sizes, "--top-k", "1"])
    main([*words, *sizes, "--top-k", "1"])
    assert steps == [1] * (6 + 3 + 6) + [2] * 6  # the second student was stopped before its first look
    main([*words, *sizes, "--top-k", "1"])
    assert len(steps) == 21
    rows = json.loads((out / "distillation.json").read_text())
    assert [(row["router"], row["setting"]["k"]) for row in rows] == [
        ("teacher", 2), ("none", 1), ("text", 1), ("kl", 1), ("text", 2),
    ]  # fmt: skip
    assert rows[1]["flops"] == pytest.approx(rows[2]["flops"])
    assert load_saved(out / "students" / "kl-1").config.top_k == 1
    assert "fine-tuned on the teacher" in (out / "tables.txt").read_text(encoding="utf-8")
    assert "top_k must lie in [1, 1], got (2,)" in refusal(main, [*words, "--top-k", "2"])

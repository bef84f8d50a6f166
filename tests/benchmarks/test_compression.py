"""Compression beside routing: bit-operations of a row, rows that are kept, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.compression import main
from benchmarks.compression_rows import RowFile, Scorer, row_from_json, row_to_json, stored_weights
from moe_backbone import ComputeMeter, MoETransformer, NativeRouter
from moe_backbone.compression import quantize
from moe_backbone.corpus import Corpus
from moe_backbone.distill import with_top_k
from moe_backbone.saved import save_backbone
from policies.baselines import TopK, UnitPruning

WORDS = ["--num-prices", "2", "--shares", "0.75", "--selection-tokens", "128", "--max-tokens", "256", "--fit-tokens"]


@pytest.fixture
def scorer(tiny_backbone: MoETransformer, tiny_corpus: Corpus) -> Scorer:
    corpus = replace(tiny_corpus, validation=tiny_corpus.train)  # its own is a single document
    made = Scorer(tiny_backbone, corpus, 128, 256)
    made.add("int8", quantize(tiny_backbone).dequantized(), 8)
    return made


def test_bit_operations_of_native_routing(scorer: Scorer, tiny_backbone: MoETransformer) -> None:
    """1 in full; at 8 bits a quarter, but for attention's products of activations, which stay."""
    assert scorer.native.held_out.compute == pytest.approx(1)
    assert scorer.native.flops == pytest.approx(1)
    assert scorer.native.megabytes == pytest.approx(4e-6 * tiny_backbone.num_parameters)
    row = scorer.score("quantised", "int8", None, {})
    config = tiny_backbone.config
    attending = config.num_layers * config.num_heads * 4 * config.head_size * (config.seq_len + 1) / 2
    total = tiny_backbone.fixed_flops + ComputeMeter(tiny_backbone.sites, config.seq_len).native_flops
    assert row.held_out.compute == pytest.approx(0.25 + 0.75 * attending / total)
    assert row.megabytes == pytest.approx(scorer.native.megabytes / 4)
    assert row.held_out.native_documents is scorer.native.held_out.documents
    assert row.held_out.delta_log_likelihood.mean != 0


def test_a_head_that_nobody_uses_costs_no_keys_and_no_storage(scorer: Scorer, tiny_backbone: MoETransformer) -> None:
    """Pruned for all tokens it is gone altogether: query, output, key, value and what they attend to."""
    config, heads = tiny_backbone.config, tiny_backbone.config.num_heads
    kept = {0: torch.arange(heads) > 0}
    row = scorer.score("pruned", "full", UnitPruning(NativeRouter(), kept), {})
    saved = 8 * config.hidden_size * config.head_size + 4 * config.head_size * (config.seq_len + 1) / 2
    total = tiny_backbone.fixed_flops + ComputeMeter(tiny_backbone.sites, config.seq_len).native_flops
    assert row.held_out.compute == pytest.approx(1 - saved / total)
    unused = tiny_backbone.num_parameters - stored_weights(row.held_out, tiny_backbone)
    assert unused >= 4 * config.hidden_size * config.head_size
    assert (unused - 4 * config.hidden_size * config.head_size) % (
        3 * config.hidden_size * config.intermediate_size
    ) == 0


def test_student_is_compared_with_its_teacher(scorer: Scorer, tiny_backbone: MoETransformer) -> None:
    """A copy with fewer experts is the original under that top-k, in every figure."""
    scorer.add("student", with_top_k(tiny_backbone, 1), 32)
    student, routed = scorer.score("student", "student", None, {}), scorer.score("top-k", "full", TopK(k=1), {})
    assert student.held_out.compute == pytest.approx(routed.held_out.compute)
    assert student.flops == pytest.approx(routed.flops)
    assert student.held_out.loss == pytest.approx(routed.held_out.loss)
    assert student.flops < 1


def test_rows_are_kept_and_not_scored_again(scorer: Scorer, tmp_path: Path) -> None:
    made = RowFile(tmp_path / "rows.json", {"text": 1}).get("top-k", {"k": 1}, lambda: scorer.native)

    def refuse() -> None:
        raise AssertionError("scored again")

    kept = RowFile(tmp_path / "rows.json", {"text": 1}).get("top-k", {"k": 1}, refuse)  # type: ignore[arg-type]
    assert row_to_json(kept) == row_to_json(made)
    assert kept.held_out.delta_log_likelihood == made.held_out.delta_log_likelihood
    assert row_to_json(row_from_json(json.loads(json.dumps(row_to_json(made)))))["flops"] == made.flops
    with pytest.raises(ValueError, match="output must be a new folder"):
        RowFile(tmp_path / "rows.json", {"text": 2})
    assert replace(kept, flops=0.0).selection.loss == made.selection.loss


def test_command_writes_tables_figure_and_json_and_goes_on(
    finished: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_corpus: Corpus
) -> None:
    """Stopped in the middle it goes on; every line is there, students too; the second time nothing is scored."""
    from train_rl import load_run

    _, _, backbone = load_run(finished, "cpu")
    assert isinstance(backbone, MoETransformer)
    save_backbone(with_top_k(backbone, 1), tmp_path / "one")
    words = [str(finished), "--output", str(tmp_path / "out"), *WORDS, "128", "--students", str(tmp_path / "one")]
    score, scored = Scorer.score, []

    def counted(self: Scorer, line: str, *rest: object) -> object:
        scored.append(line)
        if len(scored) == 12:
            raise KeyboardInterrupt
        return score(self, line, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Scorer, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    main(words)
    total = len(scored)
    main(words)
    assert scored[total:] == ["native"]
    out = tmp_path / "out"
    before = (out / "tables.txt").read_text(encoding="utf-8")
    main([*words, "--report-only"])
    assert scored[total:] == ["native"]
    assert (out / "tables.txt").read_text(encoding="utf-8") == before
    text = (out / "tables.txt").read_text(encoding="utf-8")
    lines = {point["router"] for point in json.loads((out / "compression.json").read_text())["points"]}
    assert lines >= {
        "quantised",
        "pruned",
        "pruned, int8",
        "learned",
        "learned, int8",
        "learned, int4",
        "student, int8",
    }
    assert lines >= {"learned, pruned", "learned, pruned, int8", "threshold table", "greedy, int8", "top-k"}
    assert all(line in text for line in lines)
    assert (out / "compression.png").stat().st_size > 10_000
    assert len(list((out / "tables").iterdir())) == 2


def test_other_backbones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: run folder must hold"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: output must hold rows\.json to report on"):
        main([str(tmp_path), "--report-only"])

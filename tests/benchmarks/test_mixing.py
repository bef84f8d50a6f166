"""The table of continual training: every row is there, follows from its losses, and is trained once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mixing import MixingConfig, Variant, measure, variants
from moe_backbone import BackboneConfig
from moe_backbone.continual import Continual
from moe_backbone.pretrain import PretrainConfig
from moe_backbone.tuning import TuningConfig


@pytest.fixture
def config(text_folder: Path, tmp_path: Path) -> MixingConfig:
    """Two domains that are easy to tell, on the smallest backbone."""
    domains = []
    for name, change in (("loud", str.upper), ("odd", str.swapcase)):
        (tmp_path / name).mkdir()
        for path in text_folder.iterdir():
            (tmp_path / name / path.name).write_text(change(path.read_text(encoding="utf-8"))[::-1], encoding="utf-8")
        domains.append(f"{name}={tmp_path / name}")
    sizes = BackboneConfig(
        hidden_size=16, num_layers=1, num_heads=2, num_experts=4, top_k=2, intermediate_size=8, seq_len=16
    )
    return MixingConfig(
        domains=tuple(domains),
        output=tmp_path / "mixing",
        general=str(text_folder),
        replays=((0.5, 0.5), (0.1, 0.7)),
        distilled=((0.25, 0.25),),
        beside=False,
        methods=("lora", "norms"),
        max_tokens=128,
        tuning=TuningConfig(steps=4, distill=1.0, eval_every=2, sequences=2),
        backbone=sizes,
        pretrain=PretrainConfig(steps=6, sequences=2),
    )


def test_rows_follow_from_the_losses_and_are_trained_once(
    config: MixingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each domain, before among them; a second call only reads."""
    text = measure(config)
    assert (config.output / "mixing.md").read_text(encoding="utf-8") == text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| full | 50% | 0")]
    assert len(rows) == 2
    for cells, domain in zip(rows, ("loud", "odd"), strict=True):
        folder = config.output / domain
        kept = [
            json.loads((folder / f"{Variant(replay=replay).name}.json").read_text(encoding="utf-8"))["outcome"]
            for replay in ((0.5, 0.5), (0.0, 0.0))
        ]
        change = kept[0]["after"]["general"] / kept[0]["before"]["general"] - 1
        falls = [one["before"][domain] - one["after"][domain] for one in kept]
        assert cells[4:8] == [
            f"{kept[0]['after']['general']:.4f}",
            f"{change:+.1%}",
            f"{kept[0]['after'][domain]:.4f}",
            f"{falls[0] / falls[1]:.1%}",
        ]
        assert cells[8] == ("yes |" if change <= 0.02 and falls[0] >= 0.9 * falls[1] else "no |")
        assert len(list(folder.iterdir())) == len(list(variants(config))) == 8

    assert sum(line.startswith("| lora | 25% distilled | 0 |") for line in text.splitlines()) == 2
    assert sum(line.startswith("| full | 10% to 70% | 0 |") for line in text.splitlines()) == 2

    def run(self: Continual) -> None:
        raise AssertionError("every row is there")

    monkeypatch.setattr(Continual, "run", run)
    assert measure(config) == text


def test_replay_beside_takes_no_sample_from_the_domain(config: MixingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the domain alone has two samples; with half of general text beside them, four."""
    sizes, original = [], Continual.run

    def run(self: Continual, report: Any) -> Any:
        sizes.append((self.mixture.first[0], self.tuning.sequences))
        return original(self, report)

    monkeypatch.setattr(Continual, "run", run)
    text = measure(replace(config, beside=True, replays=((0.5, 0.5),), distilled=(), methods=()))
    assert sorted(set(sizes)) == [(0.0, 2), (0.5, 4)]
    assert "| full | 50%, beside | 0 |" in text


def test_all_text_general_is_refused(config: MixingConfig) -> None:
    with pytest.raises(ValueError, match="must leave a share for the domain"):
        measure(replace(config, distilled=((1.0, 1.0),)))

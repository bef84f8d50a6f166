"""The command line of both commands: presets, flags and help."""

from __future__ import annotations

import pytest

import evaluate_rl
from moe_backbone import BackboneConfig
from train_rl import main, parse
from training_config import PRESETS


def test_presets_parse() -> None:
    """No preset means `small`; flags change one setting of the preset they follow."""
    assert parse([]) == PRESETS["small"][1]
    assert parse(["base"]) == PRESETS["base"][1]
    changed = parse(["base", "--seed", "3", "--backbone.num-layers", "2"])
    assert changed.seed == 3
    assert changed.backbone.num_layers == 2
    assert changed.backbone.hidden_size == PRESETS["base"][1].backbone.hidden_size
    assert parse(["small"]).backbone == BackboneConfig()


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ([], None),
        (["--random-routing"], 0.5),
        (["--random-routing", "--seed", "1"], 0.5),
        (["--random-routing", "0.25"], 0.25),
        (["base", "--random-routing"], 0.5),
    ],
    ids=["none", "bare", "bare before a flag", "half", "bare after a preset"],
)
def test_random_routing_without_a_number_means_half_of_the_sequences(words: list[str], share: float | None) -> None:
    """A bare flag is a share of one half."""
    assert parse(words).random_routing == share


@pytest.mark.parametrize("words", [["--help"], ["base", "--help"]], ids=" ".join)
def test_help_lists_the_settings(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With their units, from the docstrings, and a clean exit."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--run-dir", "--resume", "--env.price-low", "--ppo.advantage", "--random-routing"):
        assert flag in printed


def test_help_of_the_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    """The other command has one too."""
    with pytest.raises(SystemExit) as caught:
        evaluate_rl.main(["--help"])
    assert caught.value.code == 0
    assert "--evaluation.num-prices" in capsys.readouterr().out

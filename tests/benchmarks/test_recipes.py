"""The table of recipes: the compute of an equal loss by hand, and rows that are trained once."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.recipes import Row, compute_for, main, one_curve_of_all


@pytest.fixture
def curve() -> list[Any]:
    """Losses 1.4, 1.2 and 1.1 at computes .4, .6 and 1."""
    points = [SimpleNamespace(compute=compute, loss=loss) for compute, loss in ((0.4, 1.4), (0.6, 1.2), (1.0, 1.1))]
    return [SimpleNamespace(selection=point, held_out=point) for point in points]


def test_compute_for_a_loss_is_linear_between_settings(curve: list[Any]) -> None:
    """Half way in loss is half way in compute; what is never reached is no number; the cheapest is the least."""
    assert compute_for(curve, 1.3) == pytest.approx(0.5)
    assert compute_for(curve, 1.15) == pytest.approx(0.8)
    assert compute_for(curve, 2.0) == pytest.approx(0.4)
    assert math.isnan(compute_for(curve, 1.0))


def test_routers_of_one_price_make_one_curve(curve: list[Any]) -> None:
    """A point of each, by seed."""
    rows = {name: Row(curves=[[point], [point]], native=[]) for name, point in zip("abc", curve, strict=True)}
    merged = one_curve_of_all({"default": Row(curves=[curve, curve], native=[]), **rows})
    assert merged["a router for each price"].curves == [curve, curve]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """One text, whose held-out sections stand in for documents."""
    words = random.Random(0)
    text = " ".join(
        words.choices(["some", "words", "of", "a", "small", "language", "that", "repeats", "itself"], k=12_000)
    )
    (tmp_path / "text.txt").write_text(text)
    return tmp_path / "text.txt"


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_rows_are_trained_once(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call reads the routers of the first and finds the same; adapted backbones and their control too."""
    sizes = "--backbone.hidden-size 16 --backbone.num-layers 1 --backbone.num-heads 2 --backbone.num-experts 4"
    sizes += " --backbone.top-k 2 --backbone.intermediate-size 8 --backbone.seq-len 16 --pretrain.steps 6"
    words = ["backbone", "--only", "default", "late random", "--corpus", str(text_file), *sizes.split()]
    words += ["--output", str(tmp_path), "--total-timesteps", "1000", "--gate-steps", "2", "--max-tokens", "256"]
    main(words)
    first = json.loads((tmp_path / "backbone-validation.json").read_text())
    assert set(first) == {"default", "late random routing"}

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("benchmarks.recipes.train_router", never)
    main(words)
    second = json.loads((tmp_path / "backbone-validation.json").read_text())
    assert second == first

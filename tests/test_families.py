"""Families that train keep what they trained, and refuse what is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import families
from evaluate_rl import Context, evaluation_context
from policies.tied_files import WEIGHTS
from train_rl import load_run

pytestmark = pytest.mark.usefixtures("shared_cache")


@pytest.fixture
def context(finished: Path, tmp_path: Path) -> Context:
    """A finished run, copied."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config, corpus, backbone = load_run(folder, "cpu")
    return evaluation_context(backbone, corpus, config.evaluation, folder=folder, seeds=[config.seed])


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that constants are fitted, in few steps."""
    fit: Callable[..., object] = families.fit_compensation
    times: list[int] = []

    def quick(*args: object) -> object:
        times.append(1)
        return fit(*args, steps=3, progress=False)

    monkeypatch.setattr(families, "fit_compensation", quick)
    return times


def test_constants_of_greedy_search_are_fitted_once(context: Context, fits: list[int]) -> None:
    """Then read; and fitted anew where greedy search looked at other text."""
    first = families.compensated_greedy(context)
    second = families.compensated_greedy(context)
    assert len(fits) == 1
    weights = [spec[0].router.compensation.state_dict() for spec in (first, second)]  # type: ignore[attr-defined]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert any(weight.abs().max() > 0 for name, weight in weights[0].items() if name.endswith("vectors"))
    families.compensated_greedy(replace(context, config=replace(context.config, greedy_tokens=64)))
    assert len(fits) == 2


def test_damaged_constants_are_refused_in_one_line(context: Context, fits: list[int]) -> None:
    families.compensated_greedy(context)
    (context.folder / "rivals" / families.COMPENSATED / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"router folder must hold readable router\.safetensors"):
        families.compensated_greedy(context)

"""A run in which tokens drop their keys, from the command line to the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evaluate_rl
from evaluation.report import load_evaluation
from policies.portable import load_router
from train_rl import load_run, main

pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]
ROUTERS = ["top-k", "random-heads", "greedy"]
MEANING = {"head_meaning": "query_key_value", "env__cache_price": 0.5}


@pytest.fixture(scope="module")
def dropped(start_run: Callable[..., Path]) -> Path:
    """Folder of a run under `query_key_value`."""
    return start_run("dropped", "--evaluation.routers", *ROUTERS, **MEANING)


def test_every_point_says_how_much_of_the_cache_it_keeps(dropped: Path) -> None:
    """Native and top-k all of it, random heads as many as they use; in the JSON, the tables and the page."""
    content = load_evaluation(dropped / "evaluation.json")
    kept = {(point["router"], str(point["setting"])): point["cache"] for point in content["points"]}
    assert {share for (name, _), share in kept.items() if name in ("native", "top-k")} == {1.0}
    assert min(share for (name, _), share in kept.items() if name == "random-heads") < 0.6
    assert all(0 <= share <= 1 for share in kept.values())
    title = "Keys and values kept, % of native bytes"
    assert title in (dropped / "tables.txt").read_text(encoding="utf-8")
    assert title in (dropped / "report.html").read_text(encoding="utf-8")


def test_run_comes_back_under_its_meaning(dropped: Path, finished: Path) -> None:
    """The same weights as without it, and a router that fits no other meaning."""
    config, _, backbone = load_run(dropped, "cpu")
    _, _, other = load_run(finished, "cpu")
    assert (config.head_meaning, backbone.head_meaning, other.head_meaning) == (*2 * ["query_key_value"], "query")
    assert backbone.sha256() == other.sha256()
    load_router(dropped, backbone)
    with pytest.raises(ValueError, match="other kinds, sizes or costs"):
        load_router(dropped, other)


def test_evaluation_alone_scores_the_run_alike(tiny_run: Any, dropped: Path, tmp_path: Path) -> None:
    """And a run under `query` reports no cache."""
    sizes = [word for name, value in tiny_run.evaluation.items() for word in (f"--{name}", str(value))]
    evaluate_rl.main([str(dropped), "--output", str(tmp_path), *sizes, "--routers", *ROUTERS])
    folders = (dropped, tmp_path)
    one, other = (load_evaluation(folder / "evaluation.json")["points"] for folder in folders)
    assert [point["cache"] for point in one] == [point["cache"] for point in other]
    assert [point["compute"] for point in one] == [point["compute"] for point in other]


def test_no_cache_is_reported_where_none_is_dropped(finished: Path) -> None:
    assert not any("cache" in point for point in load_evaluation(finished / "evaluation.json")["points"])
    assert "Keys and values kept" not in (finished / "tables.txt").read_text(encoding="utf-8")


def test_adapted_run_is_held_against_native_routing_of_its_meaning(tiny_run: Any, tmp_path: Path) -> None:
    changes = {**MEANING, "adapt_backbone": 4, "evaluation__routers": "top-k", "cost_limit": 0.7}
    main(tiny_run.words(tmp_path / "run", **changes))
    assert load_run(tmp_path / "run", "cpu")[2].head_meaning == "query_key_value"
    control = load_evaluation(tmp_path / "run" / "evaluation.json")["control"]
    assert (control["compute"], control["cache"]) == (1.0, 1.0)


def test_a_price_of_the_cache_needs_the_meaning(refusal: Callable[..., str]) -> None:
    message = "env.cache_price must be 0 unless head_meaning is query_key_value, got 0.5"
    assert message in refusal(main, ["--env.cache-price", "0.5"])
    assert "query_key_value" in refusal(main, ["--head-meaning", "key"])

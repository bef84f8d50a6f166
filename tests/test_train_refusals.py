"""Corpora, settings and folders that cannot work are refused in one line, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from policies.routing_ppo import RoutingPPO
from train_rl import main

pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    # of SB3's rollout buffer, which leave-one-out advantages do not use
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]


def _empty(folder: Path) -> Path:
    path = folder / "empty.txt"
    path.write_text("")
    return path


def _binary(folder: Path) -> Path:
    path = folder / "binary.txt"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def _short(folder: Path) -> Path:
    path = folder / "short.txt"
    path.write_text("too short to learn from")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "corpus must contain text, got none"),
        (_binary, "corpus file must be UTF-8 text, got binary data in"),
        (_short, "corpus must give every part at least 2 * seq_len=32 bytes"),
        (lambda folder: folder / "missing.txt", "corpus path must be a readable file or folder"),
    ],
    ids=["empty", "binary", "too short", "missing"],
)
def test_impossible_corpus_is_refused(
    tiny_run: Any, tmp_path: Path, make: Callable[[Path], Path], message: str, refusal: Callable[..., str]
) -> None:
    """One line, before anything is trained, and no run folder is left."""
    assert message in refusal(main, tiny_run.words(tmp_path / "runs" / "run", corpus=make(tmp_path)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone__top_k": 99}, "top_k must lie in [1, num_experts=4], got 99"),
        ({"backbone__num_heads": 5}, "hidden_size must be a multiple of 2 * num_heads=10, got 32"),
        ({"env__price_low": "nan"}, "price_low must be positive and finite, got nan"),
        ({"env__price_high": "-1"}, "price_high must be positive and finite, got -1"),
        ({"ppo__num_sequences": 0}, "num_sequences must be at least 1, got 0"),
        ({"ppo__learning_rate": "nan"}, "learning_rate must be positive, got nan"),
        ({"total_timesteps": 0}, "total_timesteps must be at least 1, got 0"),
        ({"pretrain__steps": -1}, "steps must be at least 1, got -1"),
        ({"random_routing": 2.0}, "random_routing must lie in [0, 1], got 2.0"),
        ({"device": "abacus"}, "device must be usable here, got abacus"),
        ({"device": "cuda:99"}, "device must be usable here, got cuda:99"),
        ({"no_such_flag": 1}, "no-such-flag"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_refused(
    tiny_run: Any, tmp_path: Path, changes: dict[str, Any], message: str, refusal: Callable[..., str]
) -> None:
    """The rule and the value, and no run folder is left."""
    run_dir = tmp_path / "runs" / "run"
    assert message in refusal(main, tiny_run.words(run_dir, **changes))
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env__rollouts_per_sequence": 1}, "rollouts_per_sequence must be at least 2 for leave_one_out, got 1"),
        ({"env__action": "count"}, "MultiBinary"),
        ({"evaluation__routers": "nonsense"}, "routers must name some of"),
        ({"evaluation__max_tokens": 8}, "max_tokens must be at least seq_len=16, got 8"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_only_the_parts_can_judge_are_refused_before_training(
    tiny_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
    refusal: Callable[..., str],
) -> None:
    """Not an hour later, and no run folder is left either."""
    learned: list[int] = []
    monkeypatch.setattr(RoutingPPO, "learn", lambda *args, **kwargs: learned.append(1))
    assert message in refusal(main, tiny_run.words(tmp_path / "run", **changes))
    assert not learned
    assert not (tmp_path / "run").exists()


def test_run_folder_that_exists_is_refused_and_kept(tiny_run: Any, finished: Path, refusal: Callable[..., str]) -> None:
    """Nothing of an older run is overwritten."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert "run_dir must be a new folder (or use --resume)" in refusal(main, tiny_run.words(finished))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_resuming_what_is_no_run_is_refused(finished: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    """A missing folder, an empty one, and one whose settings are not ours; none of them is touched."""
    message = "run folder must hold the config.json of a training run"
    assert message in refusal(main, ["--resume", str(tmp_path / "missing")])
    assert not (tmp_path / "missing").exists()
    assert message in refusal(main, ["--resume", str(tmp_path)])
    whole = json.loads((finished / "config.json").read_text())
    changes: tuple[dict[str, Any], ...] = (
        {"colour": "red"},
        {"seed": {}},
        {"backbone": 3},
        {"corpus": 3},
        {"env": whole["env"] | {"colour": "red"}},
    )
    texts = [json.dumps(whole | change) for change in changes]
    for text in ("", "{", "{}", "[]", "null", *texts):
        (tmp_path / "config.json").write_text(text)
        assert message in refusal(main, ["--resume", str(tmp_path)]), text
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

"""A run that was interrupted or crashed goes on, and ends like one that was not."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from envs import RoutingVecEnv, Step
from policies.callbacks import PeriodicSave
from policies.portable import WEIGHTS
from policies.routing_ppo import RoutingPPO
from train_rl import main

pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    # of SB3's rollout buffer, which leave-one-out advantages do not use
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]


def _stop_between_updates(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Before the fourth update."""
    calls: list[int] = []
    on_rollout_start = PeriodicSave._on_rollout_start

    def stopping(self: PeriodicSave) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise error
        on_rollout_start(self)

    monkeypatch.setattr(PeriodicSave, "_on_rollout_start", stopping)


def _stop_inside_an_update(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """At the second site of the fourth update's rollouts."""
    calls: list[int] = []
    step_tensor = RoutingVecEnv.step_tensor

    def stopping(self: RoutingVecEnv, actions: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 3 * self.num_sites + 2:
            raise error
        return step_tensor(self, actions)

    monkeypatch.setattr(RoutingVecEnv, "step_tensor", stopping)


def _stop_inside_learning(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """After a first minibatch of the fourth update."""
    calls: list[int] = []
    descend = RoutingPPO._descend

    def stopping(self: RoutingPPO, loss: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3 * 2 * 3 + 2:
            raise error
        return descend(self, loss)

    monkeypatch.setattr(RoutingPPO, "_descend", stopping)


STOPS = {
    "between updates": _stop_between_updates,
    "rollouts": _stop_inside_an_update,
    "learning": _stop_inside_learning,
}


def _stopped_and_resumed(
    tiny_run: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch, stop: str, error: BaseException
) -> str | int | None:
    """Exit code of the run that was stopped; the folder is that of the run that went on."""
    with monkeypatch.context() as patch:
        STOPS[stop](patch, error)
        with pytest.raises(SystemExit) as caught:
            main(tiny_run.words(run_dir, evaluation__routers="top-k"))
    assert not (run_dir / WEIGHTS).exists()
    torch.rand(5)
    main(["--resume", str(run_dir)])
    assert {path.name for path in run_dir.iterdir()} >= tiny_run.files
    return caught.value.code


def test_first_interrupt_finishes_the_update_saves_and_says_how_to_go_on(
    tiny_run: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A real SIGINT in the middle of an update loses nothing: the checkpoint is that update's end."""
    run_dir, step, calls = tmp_path / "run", RoutingVecEnv.step_tensor, []

    def interrupted(self: RoutingVecEnv, actions: torch.Tensor) -> Step:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, actions)

    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(RoutingVecEnv, "step_tensor", interrupted)
        with pytest.raises(SystemExit) as caught:
            main(tiny_run.words(run_dir, evaluation__routers="top-k", checkpoint_every=1000))
    assert caught.value.code == 130
    assert f"go on with: python train_rl.py --resume {run_dir}" in caplog.text
    assert len(calls) == 4  # one update of four sites
    main(["--resume", str(run_dir)])
    assert tiny_run.same_weights(run_dir, finished)


@pytest.mark.parametrize("stop", STOPS)
def test_run_that_crashed_ends_like_one_that_did_not(
    tiny_run: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    """Wherever it happens, `--resume` goes on from the last checkpoint: the same router to the bit."""
    run_dir = tmp_path / "run"
    assert _stopped_and_resumed(tiny_run, run_dir, monkeypatch, stop, OSError("lost")) == "error: lost"
    assert tiny_run.same_weights(run_dir, finished)


@pytest.mark.parametrize("stop", STOPS)
def test_interrupted_run_ends_like_one_that_was_not(
    tiny_run: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    """Ctrl-C anywhere, in the middle of an update too, then `--resume`: the same router to the bit."""
    run_dir = tmp_path / "run"
    assert _stopped_and_resumed(tiny_run, run_dir, monkeypatch, stop, KeyboardInterrupt()) == 130
    assert tiny_run.same_weights(run_dir, finished)


def test_a_pass_over_the_text_goes_on_where_it_was(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No window is read twice and none is left out because of an interruption."""
    passes = {"order": "passes", "evaluation__routers": "top-k"}
    main(tiny_run.words(tmp_path / "whole", **passes))
    with monkeypatch.context() as patch:
        _stop_between_updates(patch, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            main(tiny_run.words(tmp_path / "run", **passes))
    main(["--resume", str(tmp_path / "run")])
    assert tiny_run.same_weights(tmp_path / "run", tmp_path / "whole")


def test_interrupt_says_how_to_go_on(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last line is the command to type."""
    _stop_between_updates(monkeypatch, KeyboardInterrupt())
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        main(tiny_run.words(tmp_path / "run"))
    assert f"python train_rl.py --resume {tmp_path / 'run'}" in caplog.messages[-1]


def test_finished_run_resumed_learns_nothing_more(
    tiny_run: Any, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is evaluated again, says so, and its router stays."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    with caplog.at_level("INFO"):
        main(["--resume", str(copy)])
    assert "trained to its end before" in caplog.text
    assert tiny_run.same_weights(copy, finished)

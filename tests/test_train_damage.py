"""Checkpoints and routers that are damaged or of another backbone, and a disk that is full."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evaluate_rl
import training_run
from moe_backbone import MoETransformer
from policies.portable import DESCRIPTION, WEIGHTS, load_router
from run_folder import read_config
from train_rl import main
from training_config import TrainConfig

pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    # of SB3's rollout buffer, which leave-one-out advantages do not use
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]


def _resume_with_checkpoint_of(other: Path, words: list[str], run_dir: Path, refusal: Callable[..., str]) -> str:
    """The message; the router that lies in the folder stays as it was."""
    main(words)
    shutil.copy(other / "checkpoints" / "last.zip", run_dir / "checkpoints" / "last.zip")
    router = (run_dir / WEIGHTS).read_bytes()
    message = refusal(main, ["--resume", str(run_dir)])
    assert (run_dir / WEIGHTS).read_bytes() == router
    return message


def test_checkpoint_of_a_backbone_of_other_sizes_is_refused(
    tiny_run: Any, finished: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """Its observations have another length."""
    words = tiny_run.words(tmp_path / "run", evaluation__routers="top-k", backbone__hidden_size=16)
    assert "spaces do not match" in _resume_with_checkpoint_of(finished, words, tmp_path / "run", refusal)


def test_checkpoint_of_a_backbone_with_other_weights_is_refused(
    tiny_run: Any, finished: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """Everything fits, and yet the router would be a stranger's."""
    words = tiny_run.words(tmp_path / "run", evaluation__routers="top-k", pretrain__seed=1)
    message = _resume_with_checkpoint_of(finished, words, tmp_path / "run", refusal)
    assert "checkpoint must be made for this backbone" in message


def test_damaged_checkpoint_is_refused(finished: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    """Cut in half, or no zip at all: one line."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    checkpoint = copy / "checkpoints" / "last.zip"
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no zip"):
        checkpoint.write_bytes(damaged)
        assert "last.zip" in refusal(main, ["--resume", str(copy)])


def test_evaluation_of_what_is_no_run_is_refused(finished: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    """No folder, no router in it, or a router of another backbone."""
    refused = "run folder must hold the config.json of a training run"
    assert refused in refusal(evaluate_rl.main, [str(tmp_path)])
    shutil.copy(finished / "config.json", tmp_path)
    assert "router folder must hold readable" in refusal(evaluate_rl.main, [str(tmp_path)])
    shutil.copy(finished / WEIGHTS, tmp_path)
    description = json.loads((finished / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(description | {"backbone_sha256": "0" * 64}))
    assert "router must be made for this backbone" in refusal(evaluate_rl.main, [str(tmp_path)])
    assert not (tmp_path / "evaluation.json").exists()


def test_router_of_a_run_refuses_another_backbone(finished: Path) -> None:
    """The files know what they were trained on."""
    other = MoETransformer(read_config(finished, TrainConfig).backbone)
    with pytest.raises(ValueError, match="router must be made for this backbone"):
        load_router(finished, other)


def _full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _break(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    if call == "fsync":
        monkeypatch.setattr("os.fsync", _full)
    else:
        monkeypatch.setattr(Path, "replace", _full)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_the_start_leaves_no_run_folder(
    tiny_run: Any,
    finished: Path,
    tmp_path: Path,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
) -> None:
    """Not even the settings could be written."""
    _break(monkeypatch, call)
    assert "No space left on device" in refusal(main, tiny_run.words(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_a_checkpoint_keeps_the_one_before(
    tiny_run: Any,
    finished: Path,
    tmp_path: Path,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
) -> None:
    """One line; the older checkpoint is whole, no scratch file is left, and given room the run ends the same."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        save, saves = training_run.Run.save, []

        def second_fails(self: training_run.Run) -> None:
            saves.append(1)
            if len(saves) == 2:
                _break(patch, call)
            save(self)

        patch.setattr(training_run.Run, "save", second_fails)
        assert "No space left on device" in refusal(main, tiny_run.words(run_dir, evaluation__routers="top-k"))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["last-gates.pt", "last.zip"]
    main(["--resume", str(run_dir)])
    assert tiny_run.same_weights(run_dir, finished)

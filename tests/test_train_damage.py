"""Checkpoints and routers that are damaged or of another backbone, and a disk that is full."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate_rl
import training_run
from moe_backbone import MoETransformer
from policies.portable import DESCRIPTION, WEIGHTS, load_router
from policies.routing_ppo import RoutingPPO
from run_folder import read_config
from train_rl import main
from training_config import TrainConfig

pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    # of SB3's rollout buffer, which leave-one-out advantages do not use
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]


CHECKPOINTS = ("last.pt", "last-previous.pt")


def _refused_with(checkpoint: bytes, run_dir: Path, refusal: Callable[..., str]) -> str:
    """The message where no checkpoint can be used; the router that lies in the folder stays as it was."""
    for name in CHECKPOINTS:
        (run_dir / "checkpoints" / name).write_bytes(checkpoint)
    router = (run_dir / WEIGHTS).read_bytes()
    message = refusal(main, ["--resume", str(run_dir)])
    assert (run_dir / WEIGHTS).read_bytes() == router
    return message


@pytest.mark.parametrize(
    ("change", "actual"),
    [({"backbone__hidden_size": 16}, "made for this backbone"), ({"pretrain__seed": 1}, "made for this backbone")],
    ids=["sizes", "weights"],
)
def test_checkpoint_of_another_backbone_is_refused(
    tiny_run: Any, finished: Path, tmp_path: Path, change: dict[str, Any], actual: str, refusal: Callable[..., str]
) -> None:
    """Where only the weights differ everything fits, and yet the router would be a stranger's."""
    main(tiny_run.words(tmp_path / "run", evaluation__routers="top-k", **change))
    foreign = (finished / "checkpoints" / "last.pt").read_bytes()
    assert actual in _refused_with(foreign, tmp_path / "run", refusal)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A whole run of its own."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def _damages(whole: bytes) -> list[bytes]:
    """Cut in half, empty, no archive, and a byte turned round inside of the weights."""
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    return [whole[:middle], b"", b"no archive", flipped]


@pytest.mark.parametrize("damage", range(4))
def test_damaged_checkpoint_is_skipped_with_a_line(
    tiny_run: Any, finished: Path, copy: Path, damage: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before it is as good: the run ends with the same router."""
    checkpoint = copy / "checkpoints" / "last.pt"
    checkpoint.write_bytes(_damages(checkpoint.read_bytes())[damage])
    main(["--resume", str(copy)])
    assert f"checkpoint: skipped {checkpoint}" in caplog.text
    assert tiny_run.same_weights(copy, finished)


def test_damaged_gates_do_not_matter_where_the_run_has_a_checkpoint(tiny_run: Any, finished: Path, copy: Path) -> None:
    """It holds them too."""
    for kept in (copy / "checkpoints").glob("last-gates*.pt"):
        kept.write_bytes(b"no archive")
    main(["--resume", str(copy)])
    assert tiny_run.same_weights(copy, finished)


@pytest.mark.parametrize("damage", range(4))
def test_damaged_checkpoints_are_refused(copy: Path, damage: int, refusal: Callable[..., str]) -> None:
    """Where none is whole: one line."""
    whole = (copy / "checkpoints" / "last.pt").read_bytes()
    assert "last.pt" in _refused_with(_damages(whole)[damage], copy, refusal)


def test_a_pickle_for_a_checkpoint_is_refused_and_not_run(copy: Path, refusal: Callable[..., str]) -> None:
    """A run folder that somebody sends may hold anything."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (copy / "ran",))

    for kind in (True, False):
        torch.save(Payload(), copy / "evil.pt", _use_new_zipfile_serialization=kind)
        assert "last.pt" in _refused_with((copy / "evil.pt").read_bytes(), copy, refusal)
    assert not (copy / "ran").exists()


def test_a_folder_that_another_process_uses_is_refused(copy: Path, refusal: Callable[..., str]) -> None:
    """Two trainings would write over each other; the lock goes with the process that holds it."""
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, str(copy / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        rule = "run folder must be used by one process at a time"
        assert rule in refusal(main, ["--resume", str(copy)])
        other.kill()
    main(["--resume", str(copy)])


def test_loss_that_is_not_a_number_stops_and_says_where(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    """At the third update, first minibatch; the checkpoint before it is kept and good."""
    run_dir, loss, calls = tmp_path / "run", RoutingPPO._loss, []

    def astray(self: RoutingPPO, lanes: Any) -> Any:
        calls.append(1)
        value, numbers = loss(self, lanes)
        return (value * float("nan") if len(calls) > 2 * 6 else value), numbers

    with monkeypatch.context() as patch:
        patch.setattr(RoutingPPO, "_loss", astray)
        message = refusal(main, tiny_run.words(run_dir, evaluation__routers="top-k"))
    assert f"got nan first at timestep {3 * tiny_run.transitions}, minibatch 0 of the update" in message
    main(["--resume", str(run_dir)])
    assert all(weight.isfinite().all() for weight in tiny_run.weights(run_dir).values())


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
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["last-gates.pt", "last.pt"]
    main(["--resume", str(run_dir)])
    assert tiny_run.same_weights(run_dir, finished)

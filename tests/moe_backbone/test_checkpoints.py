"""What lies beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

from moe_backbone.checkpoints import discard_checkpoint, read_checkpoint, write_checkpoint
from moe_backbone.files import locked


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_scratch_of_a_killed_process_goes_and_the_lock_stays(tmp_path: Path) -> None:
    """The lock of a cached backbone lies beside its checkpoint and is held while that is written."""
    path = tmp_path / "backbone.partial"
    (tmp_path / ".backbone-fresh.partial.x1y2.partial").write_bytes(b"half")
    with locked(path, "backbone"):
        before = _names(tmp_path)
        write_checkpoint(path, {"step": 1})
        write_checkpoint(path, {"step": 2})
        assert before - _names(tmp_path) == {".backbone-fresh.partial.x1y2.partial"}
        assert _names(tmp_path) - before == {"backbone.partial", "backbone-previous.partial"}


def test_a_checkpoint_that_had_no_time_to_take_its_place_is_the_newest(tmp_path: Path) -> None:
    """Killed between two renames, nothing is lost; and nothing is left once the work is done."""
    path, read = tmp_path / "last.pt", []
    for step in range(3):
        write_checkpoint(path, {"step": step})
    path.rename(tmp_path / "last-fresh.pt")
    assert read_checkpoint(path, "checkpoint", read.append)
    assert read == [{"step": 2}]
    discard_checkpoint(path)
    assert not _names(tmp_path)
    assert not read_checkpoint(path, "checkpoint", read.append)

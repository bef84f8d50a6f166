"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_backbone.files import write_atomic, write_text_atomic


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    """An interruption leaves the old content and no temporary file."""
    path = tmp_path / "new" / "notes.txt"
    write_text_atomic(path, "old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, interrupted)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(path.parent.iterdir()) == [path]
    write_text_atomic(path, "new")
    assert path.read_text(encoding="utf-8") == "new"


def test_a_full_disk_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    """Whatever the library calls it that writes; what was there stays."""
    path = tmp_path / "weights"
    path.write_text("before")

    def write(_: Path) -> None:
        raise RuntimeError("[enforce fail] . unexpected pos 64 vs 0")

    with pytest.raises(OSError, match=r"weights could not be written \(is the disk full\?\): .* unexpected pos"):
        write_atomic(path, write)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("weights", "before")]

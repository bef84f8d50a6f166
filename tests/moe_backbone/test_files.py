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

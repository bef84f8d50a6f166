"""Writing files whole or not at all, and by one process at a time."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from moe_backbone import ranks

Read = TypeVar("Read")
DAMAGE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError)
"""What readers of weights raise at files that are cut off, overwritten or of another program."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file through a temporary one, so that a reader sees the old file or the new one, never a part.

    Of the ranks of a job the first one writes, and the others do nothing.

    Args:
        path: Where the file ends up; its folder is made.
        write: Called with the temporary path.

    Raises:
        OSError: As `write` or the file system raise; the old file is still there then.
    """
    if not ranks.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written (is the disk full?): {' '.join(str(error).split())}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(path: Path, what: str, *, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold `path` for this process and the other ranks of its job meanwhile; one that is killed lets go of it.

    Args:
        path: What is held; the lock lies beside it, or in it if it is a folder.
        what: Its name in the message.
        waiting: Called once if another process holds it, after which this one waits; None refuses instead.

    Raises:
        ValueError: If another process holds it.
    """
    if not ranks.is_first():
        yield
        return
    place = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is None:
            raise ValueError(f"{what} must be used by one process at a time, got {path}, which another holds") from None
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_text_atomic(path: Path, text: str) -> None:
    """Write text through a temporary file."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_whole(path: Path, what: str, read: Callable[[Path], Read]) -> Read:
    """Read a file that can be made anew.

    Args:
        path: Where it lies.
        what: Its name in the message.
        read: Called with the path.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return read(path)
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} must be whole (delete it to make it anew), got {path}: {reason}") from None

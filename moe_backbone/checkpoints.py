"""Checkpoints of long work: the last good one is always kept, and reading one runs no code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch

from moe_backbone import ranks
from moe_backbone.files import DAMAGE, write_atomic

logger = logging.getLogger(__name__)

UNUSABLE = (*DAMAGE, BadZipFile, ValueError, IndexError, AttributeError, OSError)
"""What reading a checkpoint raises that is torn, foreign or hostile."""


def _places(path: Path) -> tuple[Path, Path, Path]:
    """Newest first: whole but not yet in its place, as a process was killed just then; in its place; the one before."""
    fresh, before = (path.with_name(f"{path.stem}-{word}{path.suffix}") for word in ("fresh", "previous"))
    return fresh, path, before


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, by the first rank; the one before it stays beside it.

    Args:
        path: Where the newest one lies.
        state: Tensors and plain values, nothing that code would be needed for.

    Raises:
        OSError: As the file system raises; the older ones are still there then.
    """
    if not ranks.is_first():
        return
    fresh, _, before = _places(path)
    for scratch in path.parent.glob(f".{fresh.name}.*"):  # of a process that was killed
        scratch.unlink(missing_ok=True)
    write_atomic(fresh, lambda temporary: torch.save(state, temporary))
    if path.exists():
        path.replace(before)
    fresh.replace(path)


def read_checkpoint(path: Path, what: str, restore: Callable[[dict[str, Any]], None], device: Any = "cpu") -> bool:
    """Go on from the newest checkpoint that can be used; each that cannot is told and skipped.

    Args:
        path: Where the newest one lies.
        what: Its name in messages.
        restore: Called with what `write_checkpoint` was given; raises if it does not fit.
        device: Where tensors go.

    Returns:
        Whether there was one.

    Raises:
        ValueError: If there are some and none can be used.
    """
    reason, found = "", [place for place in _places(path) if place.exists()]
    for place in found:
        try:
            restore(_load(place, device))
            return True
        except UNUSABLE as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            logger.warning("%s: skipped %s: %s", what, place, reason)
    if found:
        raise ValueError(f"{what} must be whole (delete it to make it anew), got {path}: {reason}")
    return False


def _load(path: Path, device: Any) -> dict[str, Any]:
    """What a checkpoint holds; no code in it is run, and no damage overlooked: torch itself compares no checksums."""
    with ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != ZIP_STORED]
        if packed:  # torch packs nothing, and what is packed may be of any size
            raise BadZipFile(f"{packed[0]} in it is compressed")
        if (damaged := archive.testzip()) is not None:
            raise BadZipFile(f"{damaged} in it is damaged")
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def discard_checkpoint(path: Path) -> None:
    """Remove a checkpoint and the one before it, as the work is done; by the first rank."""
    if not ranks.is_first():
        return
    for place in _places(path):
        place.unlink(missing_ok=True)

"""What a training run leaves behind: `runs/<name>/`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from moe_backbone.checks import require
from moe_backbone.files import write_text_atomic
from moe_backbone.plain import from_plain, read_json

LIBRARIES = (
    *("torch", "gymnasium", "stable-baselines3", "numpy", "tensorboard", "safetensors", "transformers"),
    "routegym",
)
Config = TypeVar("Config")


def new_run_folder(path: Path | None, seed: int) -> Path:
    """Make the folder of a new run; None names it by date, time and seed.

    Raises:
        ValueError: If it exists already.
    """
    path = path or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-seed{seed}"
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"run_dir must be a new folder (or use --resume), got {path}, which exists") from None
    return path


def describe_run(folder: Path, config: Any) -> None:
    """Write `config.json`, `command.txt` and `versions.json`."""
    write_text_atomic(folder / "config.json", json.dumps(asdict(config), indent=1, default=str) + "\n")
    write_text_atomic(folder / "command.txt", shlex.join(["python", *sys.argv]) + "\n")
    versions = {name: _version(name) for name in LIBRARIES}
    versions |= {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    write_text_atomic(folder / "versions.json", json.dumps(versions, indent=1) + "\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_config(folder: Path, kind: type[Config]) -> Config:
    """Read `config.json` of a run; settings that came later than the run have their defaults.

    Raises:
        ValueError: If the folder holds no readable configuration of this version.
    """
    try:
        data = read_json(folder / "config.json")
        require(bool(data), "no settings")
        return from_plain(kind, data)
    except ValueError as error:
        raise ValueError(f"run folder must hold the config.json of a training run, got {folder}: {error}") from None

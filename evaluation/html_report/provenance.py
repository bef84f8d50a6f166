"""Where the figures of a page come from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from moe_backbone.corpus import Corpus


def run_provenance(
    folder: Path, corpus: Corpus, *, command: Sequence[str], seeds: Sequence[int], now: datetime | None = None
) -> dict[str, str]:
    """What was run, on what, with what; paths are cut to their last name, so that a page can be passed on.

    Args:
        folder: Run folder; `command.txt` and `versions.json` are read where they exist.
        corpus: Text of training and evaluation.
        command: Words of the command that makes the page.
        seeds: Of routers.
        now: Date of the page; None for the present.
    """
    facts = {
        "run": folder.resolve().name,
        "page made by": without_folders(shlex.join(["python", *command])),
        "trained by": without_folders(_read(folder / "command.txt").strip()),
        "made on": f"{now or datetime.now():%Y-%m-%d %H:%M}",
        "corpus": f"{corpus.name}, sha256 {corpus.sha256}",
        "seeds": " ".join(map(str, seeds)),
    }
    versions = json.loads(_read(folder / "versions.json") or "{}")
    facts["versions of the training run"] = ", ".join(
        f"{name} {version}" for name, version in versions.items() if version
    )
    return {name: fact for name, fact in facts.items() if fact}


def without_folders(command: str) -> str:
    """A command without the folders of its absolute paths.

    Example: `python /home/me/evaluate_rl.py --corpus=/data/a.txt runs/one` gives
    `python evaluate_rl.py --corpus=a.txt runs/one`.
    """
    return shlex.join(_without_folder(word) for word in shlex.split(command))


def _without_folder(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return flag + equals + (Path(value).name if value.startswith(("/", "~")) else value)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""

"""A router's folder on the Hugging Face hub: two files and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_backbone.checks import require
from moe_backbone.files import write_text_atomic
from policies.tied_files import DESCRIPTION, WEIGHTS

CARD = "README.md"
PATTERNS = [WEIGHTS, DESCRIPTION, CARD]


def router_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or that of a hub id once it is downloaded.

    Raises:
        ValueError: If there is no such folder and none can be had from the hub.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    words = str(path_or_id).split("/")
    is_id = len(words) == 2 and all(words) and not str(path_or_id).startswith((".", "~", "/"))
    require(is_id, f"router must be a folder or a hub id such as name/router, got {path_or_id}")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # not installed, no network, no such repository
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"router must be a folder or on the hub, got {path_or_id}: {reason}") from None


def push_router(folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a router's two files and a card to the hub, where `attach` finds them by `repo_id`.

    Args:
        folder: With `router.json` and `router.safetensors`, such as a run folder; nothing else of it is uploaded.
        repo_id: `name/repository`; made if it is not there.
        private: Whether a new repository is private.
        revision: Branch to upload to.

    Returns:
        Address of the commit.

    Raises:
        ValueError: If the folder holds no router.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    missing = [name for name in (WEIGHTS, DESCRIPTION) if not (folder / name).exists()]
    require(not missing, f"router folder must hold {WEIGHTS} and {DESCRIPTION}, got {folder} without {missing}")
    if not (folder / CARD).exists():
        write_text_atomic(folder / CARD, _card(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))))
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    how: dict[str, Any] = {"repo_id": repo_id, "folder_path": folder, "revision": revision}
    return str(api.upload_folder(**how, allow_patterns=PATTERNS, commit_message="Router"))


def _card(description: dict[str, Any]) -> str:
    """What the hub shows."""
    made_for = description.get("backbone_name", "a mixture-of-experts model")
    return f"""---
library_name: routegym
tags: [mixture-of-experts, routing]
---
# Router for {made_for}

Chooses which experts each token uses. Loads no code. For a model whose hash begins with
`{description["backbone_sha256"][:12]}`:

```python
import policies
routed = policies.attach(model, "this/repository", price=0.1)
```
"""

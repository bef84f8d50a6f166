"""A router's folder on the hub: what is uploaded and fetched, told by a hub that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from policies import push_router
from policies.hub import router_folder
from policies.tied_files import DESCRIPTION, WEIGHTS

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the hub needs the extra huggingface")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder: a router's two files, and others."""
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    (tmp_path / DESCRIPTION).write_text(json.dumps({"backbone_sha256": "a" * 64, "backbone_name": "some-moe"}))
    (tmp_path / "router.zip").write_bytes(b"not for others")
    return tmp_path


def test_only_the_router_and_its_card_are_uploaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else of a run folder leaves the machine."""
    calls: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **how: calls.update(repo=name, **how))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **how: calls.update(how) or "address")
    assert push_router(folder, "me/router", private=True) == "address"
    assert (calls["repo"], calls["repo_id"], calls["private"]) == ("me/router", "me/router", True)
    assert set(calls["allow_patterns"]) == {WEIGHTS, DESCRIPTION, "README.md"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "some-moe" in card
    assert "aaaaaaaaaaaa" in card


def test_a_hub_id_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the revision asked for, and only the files of a router."""
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **how: Any) -> str:
        asked.update(how, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert router_folder("me/router", "v1") == folder
    assert (asked["repo_id"], asked["revision"]) == ("me/router", "v1")
    assert WEIGHTS in asked["allow_patterns"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a router, a path that is none, and a hub that cannot be reached: one line each."""
    with pytest.raises(ValueError, match=r"router folder must hold router.safetensors and router.json"):
        push_router(tmp_path, "me/router")
    with pytest.raises(ValueError, match=r"must be a folder or a hub id such as name/router, got /no/such/folder"):
        router_folder("/no/such/folder")

    def unreachable(repo_id: str, **how: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"must be a folder or on the hub, got me/router: no route to host"):
        router_folder("me/router")

"""From a task's file to a backbone, its scores, and a router for it; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_rl
import train_task
from moe_backbone.saved import load_saved, read_about

pytestmark = [
    # of SB3's rollout buffer, which leave-one-out advantages do not use
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]

SIZES = {
    "device": "cpu",
    "seq-len": 32,
    "backbone.hidden-size": 16,
    "backbone.num-layers": 1,
    "backbone.num-heads": 2,
    "backbone.num-experts": 4,
    "backbone.top-k": 2,
    "backbone.intermediate-size": 8,
    "backbone.seq-len": 16,
    "pretrain.steps": 5,
    "tuning.steps": 30,
    "tuning.eval-every": 10,
    "tuning.learning-rate": 1e-2,
}


@pytest.fixture
def tags(tmp_path: Path) -> Path:
    """Documents of two sentences."""
    rows = []
    for number in range(20):
        rows += ["-DOCSTART- O", "", f"{number} O", "Anna I-PER", "Smith I-PER", "left O", "", "Rome I-LOC", "is O", ""]
    path = tmp_path / "tags.conll"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def words(task: Path, output: Path, text: Path) -> list[str]:
    """Command line of a training that takes a second."""
    flags = {"output": output, "corpus": text, **SIZES}
    return [str(task), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


@pytest.mark.usefixtures("cache")
def test_from_a_file_to_a_router(
    tags: Path, tmp_path: Path, text_folder: Path, tiny_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backbone's folder says how it scored and beside what; the router's report scores labels and entities."""
    pytest.importorskip("seqeval")
    output, run = tmp_path / "backbone", tmp_path / "run"
    train_task.main(words(tags, output, text_folder))
    about = read_about(output)
    assert load_saved(output).config.seq_len == 32
    assert [score["name"] for score in about["test"]] == ["majority", "tag-per-word lookup", "backbone, native routing"]
    assert all(score["name"] in capsys.readouterr().out for score in about["test"][:1])
    changes = {"backbone_dir": output, "task": tags, "evaluation__routers": "top-k", "evaluation__max_tokens": 4096}
    train_rl.main(tiny_run.words(run, **changes, total_timesteps=512))
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    native = about["test"][-1]
    assert evaluation["native"]["f1"] == pytest.approx(native["f1"])
    assert evaluation["native"]["accuracy"] == pytest.approx(native["accuracy"])
    assert evaluation["corpus"]["tokens"] == 4 * 6  # four documents of six words
    assert all(0 <= point["f1"] <= 1 for point in evaluation["points"])
    assert "F1 of entities" in (run / "tables.txt").read_text(encoding="utf-8")


@pytest.mark.usefixtures("cache")
def test_a_router_needs_the_task_of_its_backbone(
    tags: Path, tmp_path: Path, text_folder: Path, tiny_run: Any, refusal: Callable[..., str]
) -> None:
    """Another file's labels mean other bytes."""
    output, run = tmp_path / "backbone", tmp_path / "run"
    train_task.main(words(tags, output, text_folder))
    other = tmp_path / "other.conll"
    other.write_text(tags.read_text(encoding="utf-8").replace("LOC", "ORG"), encoding="utf-8")
    message = refusal(train_rl.main, tiny_run.words(run, backbone_dir=output, task=other))
    assert "task must be the one that train_task.py trained" in message
    assert "task must come with backbone_dir" in refusal(train_rl.main, tiny_run.words(run, task=tags))
    assert not run.exists()


def test_bad_rows_are_told_before_anything_is_trained(
    tmp_path: Path, text_folder: Path, refusal: Callable[..., str]
) -> None:
    """One line with the row's own."""
    path = tmp_path / "texts.csv"
    path.write_text("text,label\nhi,a\nthere,\n", encoding="utf-8")
    message = refusal(train_task.main, words(path, tmp_path / "backbone", text_folder))
    assert message == f"error: row must have a label, got none at line 3 of {path}"
    assert not (tmp_path / "backbone").exists()


def test_without_seqeval_the_extra_is_named(
    tags: Path, tmp_path: Path, text_folder: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained."""
    monkeypatch.setitem(__import__("sys").modules, "seqeval", None)
    message = refusal(train_task.main, words(tags, tmp_path / "backbone", text_folder))
    assert ".[tagging]" in message

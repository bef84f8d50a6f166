"""Tasks of lm-evaluation-harness on a checkpoint, natively and under a router: a local task, a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate_tasks
from evaluate_tasks import EXTRA, main
from evaluation.tasks import metrics, tasks_table

WORDS = ["red", "green", "blue", "black", "white", "cold", "warm", "small", "large", "old"]
NUM_QUESTIONS = 20
TASK = "colours"
PRICES = ("0.01", "0.1", "1")
EXPERTS, TOP_K = 8, 2
GROUP = {
    "acc,none": 0.5,
    "acc_stderr,none": float("nan"),
    "exact_match,strict-match": 0.25,
    "exact_match_stderr,strict-match": 0.1,
    "alias": "group",
    "sample_len": 4,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random OLMoE-shaped model and a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("checkpoint")
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OlmoeConfig(
        vocab_size=len(vocabulary), num_experts=EXPERTS, num_experts_per_tok=TOP_K, initializer_range=0.3, **sizes
    )
    torch.manual_seed(0)
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def router(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a router whose logits fall with the price: all experts at the lowest, none at the highest."""
    from moe_backbone.huggingface import HuggingFaceBackbone, load_model
    from policies.linear_router import LinearRouter, RouterSpec
    from policies.portable import save_router

    backbone = HuggingFaceBackbone(load_model(str(checkpoint)), seq_len=8)
    learned = LinearRouter(RouterSpec(hidden_size=backbone.hidden_size, sites=backbone.sites))
    learned.price_weight.data[:, -1] = -10.0
    folder = tmp_path_factory.mktemp("router")
    save_router(learned, folder, backbone)
    return folder


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of one multiple-choice task; lm_eval's own are left out, as listing them takes ten seconds."""
    tasks = pytest.importorskip("lm_eval.tasks", reason=f"needs lm_eval, {EXTRA}")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "question": " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 3 + number % 4)),
            "label": number % 3,
        }
        for number in range(NUM_QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(tmp_path / "data")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": ["cold warm", "small", "old large red"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "colours.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder


def _words(checkpoint: Path, router: Path, tasks: Path, *more: str) -> list[str]:
    return [str(checkpoint), str(router), "--tasks", TASK, "--include-path", str(tasks), "--device", "cpu", *more]


def _bare(checkpoint: Path, tasks: Path) -> dict[str, Any]:
    """What lm_eval itself finds, which loads the checkpoint by itself."""
    import lm_eval

    arguments = {"pretrained": str(checkpoint), "dtype": "float32"}
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks))
    return lm_eval.simple_evaluate(
        "hf", model_args=arguments, tasks=[TASK], task_manager=manager, batch_size=8, device="cpu"
    )["results"][TASK]


def test_native_is_lm_eval_and_prices_buy_compute(
    checkpoint: Path, router: Path, own_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Native is scored as lm_eval scores it; each price spends what its router chooses there, and changes the score."""
    output = tmp_path / "scores.json"
    words = _words(checkpoint, router, own_tasks, "--output", str(output), "--prices", *PRICES)
    main(words)
    table = capsys.readouterr().out
    content = json.loads(output.read_text(encoding="utf-8"))
    native, *priced = content["settings"]
    bare = _bare(checkpoint, own_tasks)
    assert 0 < native["tasks"][TASK]["acc"]["value"] < 1
    for name in ("acc", "acc_norm"):
        found = native["tasks"][TASK][name]
        assert found == {"value": bare[f"{name},none"], "stderr": bare[f"{name}_stderr,none"]}
        assert f"{name},none" in bare
    assert native["compute"] == 1
    assert content["lm_eval"] == version("lm_eval")
    assert [row["price"] for row in priced] == [float(price) for price in PRICES]
    dear, middle, cheap = (row["compute"] for row in reversed(priced))
    assert cheap > EXPERTS / TOP_K > middle > dear > 0  # of the router alone, which has its cost too
    scores = {row["name"]: row["tasks"][TASK]["acc_norm"]["value"] for row in content["settings"]}
    assert len(set(scores.values())) > 1
    lines = [" ".join(line.split()) for line in table.splitlines()]
    for row in content["settings"]:
        line = f"{row['name']} {row['compute']:.3f} {scores[row['name']]:.4f} ± "
        assert sum(shown.startswith(line) for shown in lines) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--tasks": ["colors"]}, "tasks must be known to lm_eval or lie in include_path, got colors"),
        ({0: "nowhere/at/all"}, "checkpoint must "),
        ({1: "."}, "router.json"),
        ({"--cost-limits": ["0.5"]}, "router must be calibrated to follow a cost_limit, got one without"),
    ],
    ids=["task", "checkpoint", "router", "budget"],
)
def test_refuses_before_it_scores(
    change: dict[Any, Any],
    expected: str,
    checkpoint: Path,
    router: Path,
    own_tasks: Path,
    refusal: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line for whatever cannot be had, and nothing is scored."""
    monkeypatch.setattr(evaluate_tasks, "score", lambda *_: pytest.fail("scored"))
    words = _words(checkpoint, router, own_tasks, "--prices", "0.1")
    for where, value in change.items():
        if isinstance(where, int):
            words[where] = value
        else:
            words += [where, *value]
    assert expected in refusal(main, words)


def test_a_task_without_its_data_is_told(
    checkpoint: Path, router: Path, own_tasks: Path, refusal: Callable[..., str]
) -> None:
    """Whatever the data sets' library raises becomes one line."""
    (own_tasks / "rows.jsonl").unlink()
    told = refusal(main, _words(checkpoint, router, own_tasks, "--prices", "0.1"))
    assert f"tasks must be ones that lm_eval can load here, got {TASK}: " in told


def test_names_the_extra(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm_eval."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = refusal(main, ["somewhere", "router", "--tasks", TASK, "--prices", "0.1"])
    assert EXTRA in told
    assert "lm_eval" in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", TASK], "prices or cost_limits must hold at least one, got none"),
        (["--tasks", TASK, "--prices", "0.1", "0"], "prices must be positive and finite, got 0.0"),
        (["--tasks", TASK, "--cost-limits", "1.5"], "cost_limits must lie in (0, 1], got 1.5"),
        (["--tasks", TASK, "--prices", "1", "--limit", "0"], "limit must be at least 1, got 0"),
        (["--tasks", TASK, "--prices", "1", "--num-fewshot", "-1"], "num_fewshot must be at least 0, got -1"),
        (["--tasks", TASK, "--prices", "1", "--include-path", "nowhere"], "include_path must be a folder, got nowhere"),
        (["--tasks", TASK, "--prices", "1", "--output", "."], "output must be a file, got the folder ."),
    ],
    ids=["no setting", "price", "budget", "limit", "examples", "own tasks", "output"],
)
def test_refuses_impossible_settings(words: list[str], expected: str, refusal: Callable[..., str]) -> None:
    """Before anything is loaded, lm_eval or not."""
    assert expected in refusal(main, ["somewhere", "router", *words])


def test_metrics_have_their_error_or_none() -> None:
    """Filters other than `none` stay in the name; what is no metric is left out."""
    assert dict(metrics(GROUP)) == {
        "acc": {"value": 0.5, "stderr": None},
        "exact_match,strict-match": {"value": 0.25, "stderr": 0.1},
    }


def test_a_group_with_a_score_stands_for_its_tasks() -> None:
    """One without has its tasks in the table."""
    score = {"acc": {"value": 0.5, "stderr": 0.1}}
    tasks = {"scored": score, "one": score, "bare": {}, "two": {"f1": {"value": 0.25, "stderr": None}}}
    groups = {"scored": ["one"], "bare": ["two"]}
    table = tasks_table([{"name": "native", "compute": 1.0, "tasks": tasks, "groups": groups}])
    assert [column.header for column in table.columns] == ["routing", "compute", "scored\nacc", "two\nf1"]
    assert [next(column.cells) for column in table.columns] == ["native", "1.000", "0.5000 ± 0.1000", "0.2500"]

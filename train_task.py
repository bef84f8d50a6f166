"""Train a backbone on a task, classification of texts or tagging of words, and hold it against simpler answers.

python train_task.py data/banking77 --corpus TEXT --output backbones/banking77

python train_rl.py --backbone-dir backbones/banking77 --task data/banking77     # then a router for it

A stopped run goes on when the same command is given again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from commands import ending
from evaluation import Evaluator, report_console
from evaluation.task_baselines import TaskScore, baselines
from moe_backbone import BackboneConfig, MoETransformer, ranks
from moe_backbone.corpus import load_corpus
from moe_backbone.pretrain import PretrainConfig, cache_folder, content_key, load_or_train
from moe_backbone.saved import load_saved, save_backbone
from moe_backbone.tasks import TaskCorpus, load_task, require_seqeval
from moe_backbone.tasks.tuning import RECIPE_VERSION, TuningConfig, tune, widened

logger = logging.getLogger("train_task")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Train a backbone on a task and hold it against simpler answers."""

    task: tyro.conf.Positional[Path]
    """Folder with `train*` and, if held out there, `valid*` and `test*`, or one file: `.csv` with the columns text and
    label (or category), or `.conll` or `.txt` with a word a line, its tag last."""
    output: Path
    """Folder for the trained backbone, as `train_rl.py --backbone-dir` takes it."""
    corpus: tuple[Path, ...] = ()
    """Text that the backbone is pretrained on; none for the source of the Python standard library."""
    backbone_dir: Path | None = None
    """Go on from the backbone of this folder instead; `corpus`, `backbone` and `pretrain` are not used then."""
    seq_len: int = 256
    """Tokens of a window."""
    lookahead: int = 0
    """Words that are read behind a word before its tag is asked for. Tagging only."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where there is one."""
    backbone: BackboneConfig = BackboneConfig(seq_len=256)
    pretrain: PretrainConfig = PretrainConfig(sequences=8)
    tuning: TuningConfig = TuningConfig()


def starting_backbone(config: TaskConfig, device: str) -> MoETransformer:
    """The backbone that training on the task begins with, for windows of `seq_len`.

    Raises:
        ValueError: If a folder or text cannot be used.
    """
    if config.backbone_dir is not None:
        backbone = load_saved(config.backbone_dir, device)
    else:
        corpus = load_corpus(config.corpus, seq_len=config.backbone.seq_len)
        backbone = load_or_train(corpus, config.backbone, config.pretrain, device=device)
    return widened(backbone, config.seq_len).to(device)


def tuned(config: TaskConfig, task: TaskCorpus, device: str) -> MoETransformer:
    """The backbone trained on the task; kept in the cache, where a stopped training goes on."""
    start = starting_backbone(config, device)
    key = content_key([RECIPE_VERSION, task.sha256, start.sha256(), asdict(config.tuning)])
    path = cache_folder() / f"task-{key}.safetensors"
    logger.info("task backbone: %s%s", "" if path.exists() else "training once, then kept at ", path)
    return tune(path, task, start, config.tuning, device)


def native_score(backbone: MoETransformer, task: TaskCorpus, device: str) -> TaskScore:
    """Native routing on the whole test part."""
    native = Evaluator(backbone, task.test, max_tokens=10**9, device=device).native
    return TaskScore(name="backbone, native routing", accuracy=native.accuracy, f1=native.f1)


def score_table(task: TaskCorpus, scores: Sequence[TaskScore]) -> Table:
    """A row for each way to answer, test part."""
    what = "words" if task.tagging else "texts"
    count = sum(len(example.labels) for example in task.examples["test"])
    table = Table(title=f"{task.name}, {task.kind}: {count} test {what}", title_justify="left")
    for header in ("answers of", "accuracy, %", *(["F1 of entities, %"] if task.tagging else [])):
        table.add_column(header, justify="left" if header == "answers of" else "right")
    for score in scores:
        cells = [f"{100 * score.accuracy:.2f}", *([] if score.f1 is None else [f"{100 * score.f1:.2f}"])]
        table.add_row(score.name, *cells)
    return table


def run(config: TaskConfig) -> dict[str, Any]:
    """Train, score, save, and return what `backbone.json` says of it."""
    from train_rl import pick_device

    device = ranks.join(pick_device(config.device))
    task = load_task(config.task, seq_len=config.seq_len, lookahead=config.lookahead)
    if task.tagging:
        require_seqeval()
    backbone = tuned(config, task, device)
    scores = [*baselines(task), native_score(backbone, task, device)]
    about = {
        "task": {"name": task.name, "kind": task.kind, "sha256": task.sha256, "lookahead": task.lookahead},
        "labels": dict(zip(task.label_bytes.labels, task.label_bytes.values, strict=True)),
        "examples": {part: len(examples) for part, examples in task.examples.items()},
        "test": [asdict(score) for score in scores],
        "tuning": asdict(config.tuning),
    }
    save_backbone(backbone, config.output, about)
    if ranks.is_first():
        report_console().print(score_table(task, scores), highlight=False)
    logger.info("backbone: %s", config.output)
    return about


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(TaskConfig, description=__doc__, args=arguments)
    with ending("the same command goes on"):
        run(config)


if __name__ == "__main__":
    main()

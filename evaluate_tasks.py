"""Score a checkpoint on tasks of lm-evaluation-harness: natively, and under a router at several prices or budgets.

python evaluate_tasks.py CHECKPOINT ROUTER --tasks arc_easy hellaswag --prices 0.05 0.2 0.8

python evaluate_tasks.py CHECKPOINT ROUTER --tasks mmlu --cost-limits 0.5 --num-fewshot 5 --output mmlu.json
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from evaluation import report_console
from evaluation.tasks import metrics, tasks_table
from moe_backbone.checks import require, require_at_least, require_price
from moe_backbone.files import write_text_atomic
from moe_backbone.huggingface import TokenizerVocabulary, load_model, load_tokenizer
from policies import attach
from policies.hub import router_folder

logger = logging.getLogger("evaluate_tasks")

SCHEMA = 1
EXTRA = "pip install -c constraints.txt -e '.[tasks]'"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a router is asked for; neither is native routing, without a router."""

    price: float | None = None
    cost_limit: float | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.price is not None:
            return f"price {self.price:g}"
        return "native" if self.cost_limit is None else f"cost limit {self.cost_limit:g}"


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Score a checkpoint on tasks of lm-evaluation-harness, natively and under a router.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    checkpoint: tyro.conf.Positional[str]
    """Folder left by `save_pretrained`, or a hub id."""
    router: tyro.conf.Positional[str]
    """Folder with `router.json` and `router.safetensors`, or the hub id of one."""
    tasks: tuple[str, ...]
    """Tasks, groups or tags, by the names that lm_eval knows them by."""
    prices: tuple[float, ...] = ()
    """Prices of compute, nats per native compute; each is one row."""
    cost_limits: tuple[float, ...] = ()
    """Budgets, fractions of native compute; each is one row. The router must be calibrated."""
    limit: int | None = None
    """Questions of each task, the first ones; all of them if not given."""
    num_fewshot: int | None = None
    """Examples before each question; the task's own number if not given."""
    batch_size: int = 8
    """Sequences of a forward pass. Shorter ones are filled up, which `compute` counts as tokens too; 1 for none."""
    include_path: Path | None = None
    """Folder of your own tasks, as YAML."""
    output: Path | None = None
    """JSON file for all metrics, written after every row; none if not given."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where there is one."""
    dtype: str = "auto"
    """`auto` for the checkpoint's own, or a name such as `bfloat16`."""

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks must name at least one, got none")
        require(bool(self.prices or self.cost_limits), "prices or cost_limits must hold at least one, got none")
        for price in self.prices:
            require_price("prices", price)
        for limit in self.cost_limits:
            require(0 < limit <= 1, f"cost_limits must lie in (0, 1], got {limit}")
        require_at_least(self, 1, "batch_size", *(["limit"] if self.limit is not None else []))
        require_at_least(self, 0, *(["num_fewshot"] if self.num_fewshot is not None else []))
        folder, file = self.include_path, self.output
        require(folder is None or folder.is_dir(), f"include_path must be a folder, got {folder}")
        require(file is None or not file.is_dir(), f"output must be a file, got the folder {file}")

    @property
    def settings(self) -> tuple[Setting, ...]:
        """One for each row, native first."""
        priced = (Setting(price=price) for price in self.prices)
        return (Setting(), *priced, *(Setting(cost_limit=limit) for limit in self.cost_limits))


def require_lm_eval() -> None:
    """Refuse to go on without the libraries of the extra.

    Raises:
        ValueError: Names the extra.
    """
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    require(not missing, f"evaluate_tasks.py must have the extra tasks installed ({EXTRA}), got no {missing}")


def load_tasks(config: TasksConfig) -> Any:
    """A manager of lm_eval that knows all tasks and has loaded those wanted once, so that what cannot be had says so.

    Raises:
        ValueError: If lm_eval does not know a task or cannot load it.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if config.include_path is None else str(config.include_path))
    unknown = [task for task in config.tasks if task not in manager.all_tasks]
    require(not unknown, f"tasks must be known to lm_eval or lie in include_path, got {' '.join(unknown)}")
    try:
        manager.load(list(config.tasks))
    except Exception as error:  # whatever datasets, hub, YAML and a task's own code raise
        names = " ".join(config.tasks)
        raise ValueError(f"tasks must be ones that lm_eval can load here, got {names}: {error}") from None
    return manager


def load_checkpoint(config: TasksConfig, router: Path) -> Any:
    """The checkpoint as a model of lm_eval, once the router has been tried on it at every setting.

    Raises:
        ValueError: If the checkpoint cannot be loaded, or the router is not for it or cannot meet a setting.
    """
    from lm_eval.models.huggingface import HFLM

    from train_rl import pick_device

    model = load_model(config.checkpoint, dtype=config.dtype, device=pick_device(config.device))
    size = model.config.get_text_config().vocab_size
    tokenizer = TokenizerVocabulary(load_tokenizer(config.checkpoint), size).tokenizer
    for setting in config.settings[1:]:
        attach(model, router, **asdict(setting)).detach()
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)


def score(lm: Any, manager: Any, config: TasksConfig, setting: Setting, router: Path) -> dict[str, Any]:
    """One row: what was spent, and every metric of every task; the model is steered meanwhile and bare afterwards."""
    from lm_eval import simple_evaluate

    logger.info(setting.name)
    how: dict[str, Any] = {"num_fewshot": config.num_fewshot, "limit": config.limit, "batch_size": config.batch_size}
    with nullcontext() if setting == Setting() else attach(lm.model, router, **asdict(setting)) as routed:
        found = simple_evaluate(lm, tasks=list(config.tasks), task_manager=manager, log_samples=False, **how)
    compute = 1.0 if routed is None else routed.compute
    tasks = {task: dict(metrics(raw)) for task, raw in found["results"].items()}
    row = {"name": setting.name, **asdict(setting), "compute": compute, "tasks": tasks}
    return row | {"groups": found.get("group_subtasks", {}), "task_versions": found.get("versions", {})}


def run(config: TasksConfig) -> list[dict[str, Any]]:
    """Score every setting, write the JSON, print the table, and return its rows."""
    require_lm_eval()
    router, manager = router_folder(config.router), load_tasks(config)
    lm = load_checkpoint(config, router)
    what = {name: getattr(config, name) for name in ("checkpoint", "router", "limit", "num_fewshot", "batch_size")}
    what["lm_eval"] = importlib.metadata.version("lm_eval")
    rows: list[dict[str, Any]] = []
    for setting in config.settings:
        rows.append(score(lm, manager, config, setting, router))
        if config.output is not None:
            write_text_atomic(config.output, json.dumps({"schema": SCHEMA, **what, "settings": rows}, indent=2))
    report_console().print(tasks_table(rows), highlight=False)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    config = tyro.cli(TasksConfig, description=__doc__, args=arguments)
    try:
        run(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()

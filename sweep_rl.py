"""Search settings of train_rl.py with Optuna: kept on disk, gone on with by the same command, hopeless trials cut off.

python sweep_rl.py runs/sweep --search ppo.learning_rate=1e-4:1e-3:log warm_start.steps=200:800 --trials 20
python sweep_rl.py runs/prices --search env.price_low+env.price_high=0.03,0.1,0.3,1 --sampler grid
python sweep_rl.py runs/sweep ... --trials 10 &     # several processes share a study

A trial is a run folder, `runs/sweep/trials/N`, trained on `base` with its settings changed and judged on validation
documents, never on test documents: `python evaluate_rl.py runs/sweep/trials/N` does that for the one you keep.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from commands import ending
from moe_backbone.checks import require, require_at_least
from moe_backbone.files import locked
from run_folder import describe_run
from training_config import TrainConfig

logger = logging.getLogger("sweep_rl")

Goal = Literal["loss_at_50_compute", "loss_at_60_compute", "loss_at_70_compute"]
FOLDER = "folder"
"""Attribute of a trial: the run folder that it goes on with."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Search settings of train_rl.py with Optuna (extra `sweep`)."""

    study: tyro.conf.Positional[Path]
    """Folder of the study; one that exists is gone on with."""
    search: tuple[str, ...]
    """NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C: settings of train_rl.py by dotted name, several that take one
    value joined by +."""
    trials: int = 20
    """Trials that this call adds, those that it goes on with among them."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """What proposes values; `grid` takes every combination of listed values once."""
    goal: Goal = "loss_at_50_compute"
    """What is made small: validation loss at this compute, nats a token."""
    seed: int = 0
    """Of the sampler."""
    base: TrainConfig = TrainConfig()
    """What every trial starts from; its `eval_times` are also the looks at which a trial may be cut off."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "trials")
        require(len(self.search) > 0, "search must name a setting, got none")
        given = self.base.resume or self.base.run_dir
        require(given is None, f"base.run_dir and base.resume must not be given in a sweep, got {given}")
        for item in self.search:
            parse_search(item, self.base)


@dataclass(frozen=True)
class Dimension:
    """One direction of the search."""

    names: tuple[str, ...]
    values: tuple[Any, ...] = ()
    """To choose from; empty for a range."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    """Whether the setting is an integer."""

    @property
    def name(self) -> str:
        """As the study knows it."""
        return "+".join(self.names)

    def suggest(self, trial: Any) -> Any:
        """The trial's value."""
        if self.values:
            return trial.suggest_categorical(self.name, list(self.values))
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


def parse_search(item: str, base: TrainConfig) -> Dimension:
    """Read one word of `--search`.

    Raises:
        ValueError: If it names no setting, or its values are not such.
    """
    joined, _, written = item.partition("=")
    names = tuple(joined.split("+"))
    current = setting(base, names[0])
    for name in names[1:]:
        setting(base, name)
    whole = isinstance(current, int) and not isinstance(current, bool)
    rule = f"search must be NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C, got {item}"
    if ":" in written:
        low, high, *rest = written.split(":")
        require(rest in ([], ["log"]), rule)
        try:
            bounds = float(low), float(high)
        except ValueError:
            raise ValueError(rule) from None
        require(bounds[0] < bounds[1] and all(map(math.isfinite, bounds)), rule)
        return Dimension(names, low=bounds[0], high=bounds[1], log=bool(rest), whole=whole)
    require(bool(written), rule)
    return Dimension(names, values=tuple(_value(word, current) for word in written.split(",")), whole=whole)


def _value(word: str, current: Any) -> Any:
    """A word as a value of the kind that the setting has now."""
    try:
        return json.loads(word) if isinstance(current, bool | int | float | None) else word
    except json.JSONDecodeError:
        return word


def setting(config: Any, name: str) -> Any:
    """The value of a dotted name.

    Raises:
        ValueError: If there is no such setting.
    """
    value = config
    for part in name.split("."):
        known = is_dataclass(value) and part in value.__dataclass_fields__
        require(known, f"search must name settings of train_rl.py, got {name}")
        value = getattr(value, part)
    require(not is_dataclass(value), f"search must name single settings of train_rl.py, got {name}")
    return value


def changed(config: Any, values: dict[str, Any]) -> Any:
    """The configuration with settings of dotted names replaced, all at once, so that rules see them together."""
    nested: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = value
        else:
            own[first] = value
    own |= {name: changed(getattr(config, name), inner) for name, inner in nested.items()}
    return replace(config, **own)


def open_study(config: SweepConfig, dimensions: Sequence[Dimension]) -> Any:
    """The study of the folder.

    Raises:
        ValueError: If Optuna is not installed, or a grid has a range.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ValueError("sweeps need Optuna: pip install -c constraints.txt -e '.[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if config.sampler == "grid":
        ranges = [dimension.name for dimension in dimensions if not dimension.values]
        require(not ranges, f"search must list values for the sampler grid, got a range of {', '.join(ranges)}")
        sampler: Any = optuna.samplers.GridSampler({each.name: list(each.values) for each in dimensions}, config.seed)
    else:
        kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        sampler = kinds[config.sampler](seed=config.seed)
    config.study.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(config.study / "journal.log")))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    return optuna.create_study(
        study_name=config.goal, storage=storage, sampler=sampler, pruner=pruner, load_if_exists=True
    )


def take_up(study: Any, folder: Path) -> None:
    """Queue trials again whose process has gone: they go on from their checkpoints."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        place = Path(trial.user_attrs.get(FOLDER, folder / "trials" / str(trial.number)))
        try:
            if place.exists():
                with locked(place, "trial"):
                    pass
        except ValueError:  # another process is at it
            continue
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={FOLDER: str(place)})
        logger.info("trial %d was interrupted and goes on", trial.number)


def objective(config: SweepConfig, dimensions: Sequence[Dimension], parts: Any, trial: Any) -> float:
    """Train one trial: its goal on validation documents."""
    from optuna import TrialPruned

    from training_run import Run, train_router

    values = {name: each.suggest(trial) for each in dimensions for name in each.names}
    folder = Path(trial.user_attrs.get(FOLDER, config.study / "trials" / str(trial.number)))
    trial.set_user_attr(FOLDER, str(folder))
    settings = changed(config.base, values)
    logger.info("trial %d: %s", trial.number, ", ".join(f"{name} {value}" for name, value in trial.params.items()))
    corpus, backbone = parts

    def watch(run: Run, scalars: dict[str, float]) -> None:
        trial.report(scalars.get(f"eval/{config.goal}", math.inf), run.model.num_timesteps)
        if trial.should_prune():
            raise TrialPruned

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "trial"):
        describe_run(folder, settings)
        run = train_router(settings, folder, corpus, backbone, watch)
        run.watch = None
        return float(run.look()[0].get(f"eval/{config.goal}", math.inf))


def run(config: SweepConfig) -> Any:
    """Add trials to the study and say which is best; returns the study."""
    from train_rl import pick_device
    from training_run import load_parts

    dimensions = [parse_search(item, config.base) for item in config.search]
    study = open_study(config, dimensions)
    take_up(study, config.study)
    parts = load_parts(config.base, pick_device(config.base.device))
    study.optimize(lambda trial: objective(config, dimensions, parts, trial), n_trials=config.trials)
    show(study)
    return study


def show(study: Any) -> None:
    """Print the best trials."""
    from optuna.trial import TrialState

    whole = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    cut = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    logger.info("%d trials to their end, %d cut off", len(whole), len(cut))
    for trial in sorted(whole, key=lambda one: one.value)[:5]:
        values = ", ".join(f"{name} {value}" for name, value in trial.params.items())
        logger.info("%s %.4f: %s (%s)", study.study_name, trial.value, values, trial.user_attrs[FOLDER])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if arguments is None else list(arguments)
    with ending("the same command goes on"):
        run(tyro.cli(SweepConfig, description=__doc__, args=words))


if __name__ == "__main__":
    main()

"""Searching settings: what is proposed, kept, cut off and gone on with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sweep_rl
from policies.callbacks import PeriodicSave
from policies.portable import WEIGHTS
from run_folder import read_config
from sweep_rl import changed, main, parse_search
from training_config import TrainConfig

pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    # of SB3's rollout buffer, which leave-one-out advantages do not use
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]
RATES = ("1e-4", "1e-3")


@pytest.fixture
def words(tiny_run: Any) -> Callable[..., list[str]]:
    """Command line of a sweep of tiny runs."""
    pytest.importorskip("optuna")

    def make(study: Path, *more: str) -> list[str]:
        sizes = {name: value for name, value in tiny_run.sizes.items() if name != "eval-times"}
        flags = {"corpus": tiny_run.corpus, "eval-times": 2, **sizes, **tiny_run.evaluation}
        base = [word for name, value in flags.items() for word in (f"--base.{name}", str(value))]
        return [str(study), *more, *base]

    return make


def _trial(study: Path, number: int) -> TrainConfig:
    return read_config(study / "trials" / str(number), TrainConfig)


def test_words_are_read_as_the_setting_is() -> None:
    """Ranges, logarithmic ones, whole numbers, lists, words, and names that share a value."""
    base = TrainConfig()
    log = parse_search("ppo.learning_rate=1e-4:1e-3:log", base)
    assert (log.low, log.high, log.log, log.whole) == (1e-4, 1e-3, True, False)
    assert parse_search("warm_start.steps=200:800", base).whole
    assert parse_search("compensation=true,false", base).values == (True, False)
    assert parse_search("env.quality=kl,accuracy", base).values == ("kl", "accuracy")
    both = parse_search("env.price_low+env.price_high=0.03,0.1", base)
    assert both.names == ("env.price_low", "env.price_high")
    assert both.values == (0.03, 0.1)


def test_settings_change_together() -> None:
    """Bounds that exclude each other one at a time."""
    config = changed(TrainConfig(), {"env.price_low": 5.0, "env.price_high": 5.0, "seed": 3})
    assert (config.env.price_low, config.env.price_high, config.seed) == (5.0, 5.0, 3)


@pytest.mark.parametrize(
    "word", ["ppo=1,2", "ppo.rate=1,2", "seed", "seed=", "ppo.learning_rate=2:1", "seed=1:2:lin", "seed=a:b"]
)
def test_searches_that_mean_nothing_are_refused(tmp_path: Path, word: str, refusal: Callable[..., str]) -> None:
    """One line that names the word."""
    assert "search must" in refusal(main, [str(tmp_path / "study"), "--search", word])
    assert not (tmp_path / "study").exists()


def test_without_optuna_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    """Nothing else needs it."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "'.[sweep]'" in refusal(main, [str(tmp_path / "study"), "--search", "seed=1,2"])


def test_grid_takes_every_value_once_and_goes_on(
    words: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two calls of one trial each make the grid; each trial is a run folder with a router."""
    study = tmp_path / "study"
    grid = ["--search", f"ppo.learning_rate={','.join(RATES)}", "--sampler", "grid", "--trials", "1"]
    with caplog.at_level("INFO"):
        main(words(study, *grid))
        main(words(study, *grid))
    assert {_trial(study, number).ppo.learning_rate for number in range(2)} == set(map(float, RATES))
    assert all((study / "trials" / str(number) / WEIGHTS).exists() for number in range(2))
    assert "2 trials to their end, 0 cut off" in caplog.text


def test_a_grid_of_a_range_is_refused(
    words: Callable[..., list[str]], tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """It has no values to take one by one."""
    line = refusal(main, words(tmp_path / "study", "--search", "seed=1:5", "--sampler", "grid"))
    assert "search must list values for the sampler grid, got a range of seed" in line


def test_a_trial_whose_process_died_goes_on(
    words: Callable[..., list[str]],
    tiny_run: Any,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From its checkpoint, with its values: the router is that of a run that was not stopped."""
    study = tmp_path / "study"
    search = words(study, "--search", f"seed={tiny_run.seed},{tiny_run.seed}", "--trials", "1")
    calls: list[int] = []

    class KilledError(BaseException):
        """Nothing catches it, as nothing does a SIGKILL."""

    def dying(self: PeriodicSave) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KilledError
        on_rollout_start(self)

    on_rollout_start = PeriodicSave._on_rollout_start
    with monkeypatch.context() as patch:
        patch.setattr(PeriodicSave, "_on_rollout_start", dying)
        patch.setattr("optuna.study._tell._tell_with_warning", lambda **_: pytest.fail("the trial was told of"))
        with pytest.raises(KilledError):
            main(search)
    with caplog.at_level("INFO"):
        main(search)
    assert "trial 0 was interrupted and goes on" in caplog.text
    assert "going on at timestep" in caplog.text
    assert tiny_run.same_weights(study / "trials" / "0", finished)


def test_hopeless_trials_are_cut_off(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the look during training; the study counts them apart."""
    optuna = pytest.importorskip("optuna")
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda self: self.number == 1)
    with caplog.at_level("INFO"):
        main(words(tmp_path / "study", "--search", "seed=1,2", "--sampler", "random", "--trials", "2"))
    assert "1 trials to their end, 1 cut off" in caplog.text
    assert sweep_rl.FOLDER == "folder"

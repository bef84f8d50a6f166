"""One command scores a run over several seeds: what it trains, what it names, and when it refuses."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import evaluate_rl
from envs import RoutingVecEnv, Step
from evaluate_rl import Context, EvaluationConfig, evaluation_context, fixed_points
from evaluation import Interval, Point
from evaluation.checks import Check
from evaluation.report import load_evaluation
from families import Family
from moe_backbone import MoETransformer, NativeRouter
from moe_backbone.corpus import Corpus
from policies.routing_ppo import RoutingPPO

pytestmark = [
    pytest.mark.usefixtures("shared_cache"),
    # of SB3's rollout buffer, which leave-one-out advantages do not use
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]


@dataclass(frozen=True)
class FakePoint:
    """Native routing under another name; `half` claims half of the compute."""

    name: str
    seed: int | None

    setting = {"step": 1}
    router = NativeRouter()


class HalfPoint(FakePoint):
    """What is no router on this backbone brings its own score."""

    def score_on(self, evaluator: Any) -> Point:
        """Native routing of the evaluator's text."""
        point: Point = evaluator.score(self.name, self.router, setting={"width": 1}, seed=self.seed)
        return point


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def words(tiny_run: Any, run_copy: Path) -> list[str]:
    """Command line for that run, without the routers."""
    sizes = {**tiny_run.evaluation, "evaluation.selection-tokens": 64, "device": "cpu"}
    return [str(run_copy), *(word for name, value in sizes.items() for word in (f"--{name}", str(value)))]


def _families(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """Registers two families; returns the contexts with which the first is asked."""
    contexts: list[Context] = []

    def fake(context: Context) -> list[FakePoint]:
        contexts.append(context)
        return [FakePoint("fake-a", seed) for seed in context.seeds]

    families = [
        Family(name="fake", make=fake),
        Family(name="small", make=lambda context: [HalfPoint("small", None)], rival=False),
    ]
    monkeypatch.setattr(evaluate_rl, "FAMILIES", families)
    monkeypatch.setattr("families.FAMILIES", families)
    return contexts


def test_seeds_are_trained_once_and_scored_with_families_that_train(
    tiny_run: Any, words: list[str], run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 8 is trained beside the run's 7 and kept; families are asked for both; no rival is what can't be one."""
    contexts = _families(monkeypatch)
    before = (run_copy / "router.safetensors").read_bytes()
    evaluate_rl.main([*words, "--seeds", "2", "--routers", "random-k", "top-k", "fake", "small"])
    assert (run_copy / "router.safetensors").read_bytes() == before
    assert not tiny_run.same_weights(run_copy, run_copy / "seeds" / "8")
    assert [path.name for path in (run_copy / "seeds").iterdir()] == ["8"]
    assert [(context.seeds, context.folder) for context in contexts] == [((7, 8), run_copy)]

    content = load_evaluation(run_copy / "evaluation.json")
    seeds: dict[str, set[int | None]] = {}
    for point in content["points"]:
        seeds.setdefault(point["router"], set()).add(point["seed"])
    assert seeds == {
        "native": {None},
        "learned": {7, 8},
        "random-k": {7, 8},
        "top-k": {None},
        "fake-a": {7, 8},
        "small": {None},
    }
    assert {name for name, entry in content["summary"].items() if not entry["rival"]} == {"small"}
    assert content["summary"]["learned"]["seeds"] == 2
    assert all(check["equal"] for check in content["checks"])
    assert "mean over 2 seeds" in (run_copy / "tables.txt").read_text()

    monkeypatch.setattr(RoutingPPO, "learn", lambda *args, **kwargs: pytest.fail("trained again"))
    evaluate_rl.main([*words, "--seeds", "2", "--routers", "top-k"])


def test_interrupted_training_of_a_seed_goes_on_with_the_same_command(
    tiny_run: Any, words: list[str], run_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C in the first update saves it; the router is then the one of a training that was not interrupted."""
    words = [*words, "--seeds", "2", "--routers", "top-k"]
    evaluate_rl.main(words)
    whole = run_copy / "seeds" / "8"
    shutil.move(whole, run_copy / "whole")
    step, calls = RoutingVecEnv.step_tensor, []

    def interrupted(self: RoutingVecEnv, actions: Any) -> Step:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, actions)

    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(RoutingVecEnv, "step_tensor", interrupted)
        with pytest.raises(SystemExit) as caught:
            evaluate_rl.main(words)
    assert caught.value.code == 130
    assert f"go on with: python evaluate_rl.py {run_copy}" in caplog.text
    assert len(calls) == tiny_run.num_sites
    evaluate_rl.main(words)
    assert tiny_run.same_weights(whole, run_copy / "whole")


def test_unequal_native_scores_end_the_command_with_an_error(
    words: list[str], run_copy: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    """The report is written and says so; the exit code is for whoever reads no report."""
    interval = Interval(mean=0.001, low=0.0, high=0.002)
    failed = Check(name="native", quantity="accuracy", difference=interval, exact=True, equal=False)
    monkeypatch.setattr(evaluate_rl, "check_native", lambda *points: [failed])
    assert "native routing must score the same twice" in refusal(evaluate_rl.main, [*words, "--routers", "top-k"])
    assert "A/A FAILED: native" in (run_copy / "tables.txt").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--routers", "top-k", "nonsense"], "routers must name some of top-k"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--evaluation.selection-tokens", "0"], "selection_tokens must be at least 1, got 0"),
    ],
    ids=["router", "seeds", "tokens"],
)
def test_impossible_settings_are_refused(
    words: list[str], flags: list[str], message: str, refusal: Callable[..., str]
) -> None:
    """In one message, before anything is loaded."""
    assert message in refusal(evaluate_rl.main, [words[0], *flags])


def test_only_all_or_a_name_asks_for_families_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing named: what needs no training. `all`: every router. A prefix: what starts with it."""
    _families(monkeypatch)
    wanted = {
        names: [name for name, trained in (("top-k", False), ("fake", True)) if config.wants(name, trained=trained)]
        for names in ((), ("all",), ("top",), ("fa",))
        for config in [EvaluationConfig(routers=names)]
    }
    assert wanted == {(): ["top-k"], ("all",): ["top-k", "fake"], ("top",): ["top-k"], ("fa",): ["fake"]}
    assert not EvaluationConfig(routers=("greedy",)).wants("greedy+constants", trained=True)  # it is a name itself
    for names, scored in ((("all",), False), (("all", "small"), True), (("small",), True)):
        assert EvaluationConfig(routers=names).wants("small", trained=True, rival=False) == scored
    assert not EvaluationConfig(routers=("all",)).wants("all-of-them", trained=True, rival=False)
    with pytest.raises(
        ValueError, match=r"routers must name some of top-k .* fake small oracle, or be all, got nonsense"
    ):
        EvaluationConfig(routers=("nonsense",))


def test_routers_that_draw_are_made_for_every_seed_and_others_once(
    tiny_backbone: MoETransformer, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """No setting comes twice."""
    config = EvaluationConfig(max_tokens=160, selection_tokens=160, greedy_tokens=64, routers=("random-k", "top-k"))
    corpus = Corpus(**{**vars(tiny_corpus), "validation": tiny_corpus.test})
    context = evaluation_context(tiny_backbone, corpus, config, folder=tmp_path, seeds=[3, 4])
    points = [(point.name, tuple(point.setting.items())) for point in fixed_points(context)]
    assert len(points) == len(set(points))
    drawn = [dict(setting)["seed"] for name, setting in points if name == "random-k"]
    assert drawn.count(3) == drawn.count(4) == len(drawn) / 2 > 0
    assert [name for name, _ in points].count("top-k") == 5

"""The two commands from end to end: what a run leaves, how it goes on, and how it says no."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate_rl
import train_rl
from envs import RoutingVecEnv, Step
from evaluation.report import KEYS, load_evaluation
from moe_backbone import BackboneConfig, MoETransformer
from policies.baselines import FIXED_NAMES
from policies.callbacks import PeriodicSave
from policies.portable import DESCRIPTION, WEIGHTS, load_router
from policies.routing_ppo import RoutingPPO
from run_folder import LIBRARIES, read_config
from train_rl import PRESETS, TrainConfig, main, parse

NUM_DOCUMENTS, WORDS_PER_DOCUMENT = 60, 40
WORDS = "the router sends every token to an expert and some tokens need no expert at all so they pass for free"
SEED, UPDATES, NUM_PRICES, NUM_SITES = 7, 6, 3, 4
TRANSITIONS = 2 * 2 * 16 * NUM_SITES
"""Of an update: two sequences, two rollouts each, 16 tokens, four sites."""
SIZES = {
    "device": "cpu",
    "seed": SEED,
    "total-timesteps": UPDATES * TRANSITIONS,
    "eval-times": 1,
    "checkpoint-every": 2,
    "backbone.hidden-size": 32,
    "backbone.num-layers": 2,
    "backbone.num-heads": 4,
    "backbone.num-experts": 4,
    "backbone.top-k": 2,
    "backbone.intermediate-size": 16,
    "backbone.seq-len": 16,
    "pretrain.steps": 10,
    "pretrain.sequences": 4,
    "pretrain.eval-every": 5,
    "ppo.num-sequences": 2,
    "ppo.batch-size": TRANSITIONS // 2,
    "env.rollouts-per-sequence": 2,
}
EVALUATION = {"evaluation.max-tokens": 256, "evaluation.num-prices": NUM_PRICES, "evaluation.greedy-tokens": 128}
RUN_FILES = {
    "config.json",
    "command.txt",
    "versions.json",
    "router.zip",
    "router.safetensors",
    "router.json",
    "checkpoints",
    "evaluation.json",
    "tables.txt",
    "tradeoff.png",
}
POINT_KEYS = {
    "router",
    "setting",
    "seed",
    "compute",
    "router_overhead",
    "compute_total",
    "accuracy",
    "log_likelihood",
    "accuracy_retained",
    "delta_log_likelihood",
    "units_per_token",
    "distinct_units",
    "load_cv",
    "seconds",
}
SUMMARY_KEYS = {"hypervolume", "aiq", "compute_at_99_accuracy", "accuracy_at_50_compute"}
# of SB3's rollout buffer, which leave-one-out advantages do not use
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def _words(corpus: Path, run_dir: Path, **changes: Any) -> list[str]:
    """Command line of a tiny run; changes are named with `__` for a dot."""
    flags: dict[str, Any] = {"corpus": corpus, "run-dir": run_dir, **SIZES, **EVALUATION}
    flags |= {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a corpus, shared by all tests here so that the backbone is trained once."""
    folder = tmp_path_factory.mktemp("world")
    chance = random.Random(SEED)
    texts = [" ".join(chance.choices(WORDS.split(), k=WORDS_PER_DOCUMENT)) for _ in range(NUM_DOCUMENTS)]
    lines = [json.dumps({"text": f"{number}: {text}"}) for number, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for the module, in place of an empty one for each test."""
    monkeypatch.setenv("ROUTEGYM_CACHE", str(world / "cache"))
    return world / "cache"


@pytest.fixture
def corpus(world: Path) -> Path:
    """A small text file."""
    return world / "corpus.jsonl"


@pytest.fixture(scope="module")
def finished(world: Path) -> Iterator[Path]:
    """Folder of one whole run, started as from a shell."""
    run_dir = world / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROUTEGYM_CACHE", str(world / "cache"))
        patch.setattr("sys.argv", ["train_rl.py", *_words(world / "corpus.jsonl", run_dir)])
        main()
        yield run_dir


def _fails(words: list[str], capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None] = main) -> str:
    """What a user reads when a command refuses: the exit message, or what the parser printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        command(words)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    code = caught.value.code
    if isinstance(code, str):  # the interpreter prints it and exits with 1
        assert "\n" not in code
        assert code.startswith("error: ")
        return code
    assert code not in (0, None)
    return " ".join(printed.replace("│", " ").split())


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / WEIGHTS)


def _same_weights(one: Path, other: Path) -> bool:
    first, second = _weights(one), _weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What a run leaves


def test_run_folder_holds_what_the_design_says(finished: Path) -> None:
    """Every file, TensorBoard's among them, and no scratch file."""
    names = {path.name for path in finished.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert names - events == RUN_FILES
    assert len(events) == 1
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["last.zip"]
    assert (finished / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_run_folder_says_how_it_was_made(finished: Path, corpus: Path) -> None:
    """Settings that read back equal, the command, and the versions of all libraries."""
    assert read_config(finished, TrainConfig) == parse(_words(corpus, finished))
    command = (finished / "command.txt").read_text()
    assert command.startswith("python train_rl.py --corpus ")
    assert f"--seed {SEED}" in command
    versions = json.loads((finished / "versions.json").read_text())
    assert set(versions) >= {*LIBRARIES, "python", "system"}
    assert versions["torch"] == torch.__version__


def test_evaluation_follows_the_schema(finished: Path) -> None:
    """Schema 1: native first, the learned router once a price with its seed and its own cost, on the test part."""
    content = load_evaluation(finished / "evaluation.json")
    assert set(content) == KEYS
    assert content["corpus"]["split"] == "test"
    assert content["corpus"]["documents"] >= 2
    assert len(content["backbone"]["sites"]) == NUM_SITES
    assert content["native"]["log_likelihood"] < 0
    points = content["points"]
    for point in points:
        assert set(point) == POINT_KEYS
        assert len(point["units_per_token"]) == NUM_SITES
        interval = point["delta_log_likelihood"]
        assert interval["low"] <= interval["mean"] <= interval["high"]
        assert 0 <= point["accuracy"] <= 1
    assert points[0]["router"] == "native"
    assert points[0]["compute"] == pytest.approx(1.0)
    learned = [point for point in points if point["router"] == "learned"]
    prices = [point["setting"]["price"] for point in learned]
    low, high = PRESETS["small"][1].env.price_low, PRESETS["small"][1].env.price_high
    assert prices == pytest.approx([low, (low * high) ** 0.5, high], rel=1e-3)
    assert {point["seed"] for point in learned} == {SEED}
    for point in learned:
        assert 0 < point["router_overhead"] < point["compute"]
    assert {point["router"] for point in points} == {"native", "learned", *FIXED_NAMES}
    assert set(content["summary"]) == {point["router"] for point in points} - {"native"}
    assert all(set(entry) == SUMMARY_KEYS for entry in content["summary"].values())


def test_tensorboard_shows_learning_routing_and_evaluation(finished: Path) -> None:
    """SB3's names, ours beside them, and a figure."""
    events = EventAccumulator(str(finished)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        "rollout/ep_rew_mean",
        "train/gradient_norm",
        "train/flip_rate",
        "train/approx_kl",
        "train/learning_rate",
        "time/fps",
        "reward/quality",
        "reward/cost",
        "routing/compute",
        "routing/load_cv",
        "units_per_token/layer1.experts",
        "eval/native_loss",
    }
    assert "figures/tradeoff" in events.Tags()["images"]
    assert len(events.Scalars("rollout/ep_rew_mean")) == UPDATES
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0] / 2


def test_both_saved_routers_are_the_same_and_have_learned(finished: Path) -> None:
    """The zip for SB3 and the portable files hold equal weights, which are no longer zero."""
    model = RoutingPPO.load(finished / "router.zip", device="cpu")
    router = model.policy.router  # type: ignore[union-attr]
    weights = _weights(finished)
    assert set(weights) == {"weight", "price_weight"}
    for name, weight in router.state_dict().items():
        assert torch.equal(weight.cpu(), weights[name])
        assert weight.abs().max() > 1e-4
    assert model.num_timesteps == UPDATES * TRANSITIONS


def test_evaluation_alone_repeats_the_learned_points(finished: Path, tmp_path: Path) -> None:
    """`evaluate_rl.py` on the run folder: the same numbers to the last digit, time aside, and the run untouched."""
    before = (finished / "evaluation.json").read_bytes()
    words = [word for name, value in EVALUATION.items() for word in (f"--{name}", str(value))]
    evaluate_rl.main([str(finished), "--output", str(tmp_path), "--device", "cpu", *words])

    def points(folder: Path) -> list[dict[str, Any]]:
        content = load_evaluation(folder / "evaluation.json")
        return [{name: value for name, value in point.items() if name != "seconds"} for point in content["points"]]

    assert points(tmp_path) == points(finished)
    assert (finished / "evaluation.json").read_bytes() == before


def test_same_command_learns_the_same_router_and_another_seed_another(
    finished: Path, corpus: Path, tmp_path: Path
) -> None:
    """To the bit; every difference of a run is in its folder and its seed."""
    torch.rand(3)
    main(_words(corpus, tmp_path / "again", evaluation__routers="top-k"))
    assert _same_weights(tmp_path / "again", finished)
    main(_words(corpus, tmp_path / "other", evaluation__routers="top-k", seed=SEED + 1))
    assert not _same_weights(tmp_path / "other", finished)


# Interrupted and gone on


def _stop_between_updates(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Before the fourth update."""
    calls: list[int] = []
    on_rollout_start = PeriodicSave._on_rollout_start

    def stopping(self: PeriodicSave) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise error
        on_rollout_start(self)

    monkeypatch.setattr(PeriodicSave, "_on_rollout_start", stopping)


def _stop_inside_an_update(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """At the second site of the fourth update's rollouts."""
    calls: list[int] = []
    step_tensor = RoutingVecEnv.step_tensor

    def stopping(self: RoutingVecEnv, actions: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 3 * NUM_SITES + 2:
            raise error
        return step_tensor(self, actions)

    monkeypatch.setattr(RoutingVecEnv, "step_tensor", stopping)


def _stop_inside_learning(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """After a first minibatch of the fourth update."""
    calls: list[int] = []
    descend = RoutingPPO._descend

    def stopping(self: RoutingPPO, loss: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3 * 2 * 3 + 2:
            raise error
        return descend(self, loss)

    monkeypatch.setattr(RoutingPPO, "_descend", stopping)


STOPS = {
    "between updates": _stop_between_updates,
    "rollouts": _stop_inside_an_update,
    "learning": _stop_inside_learning,
}


def _stopped_and_resumed(
    words: list[str], run_dir: Path, monkeypatch: pytest.MonkeyPatch, stop: str, error: BaseException
) -> str | int | None:
    """Exit code of the run that was stopped; the folder is that of the run that went on."""
    with monkeypatch.context() as patch:
        STOPS[stop](patch, error)
        with pytest.raises(SystemExit) as caught:
            main(words)
    assert not (run_dir / WEIGHTS).exists()
    torch.rand(5)
    main(["--resume", str(run_dir)])
    assert {path.name for path in run_dir.iterdir()} >= RUN_FILES
    return caught.value.code


def test_first_interrupt_finishes_the_update_saves_and_says_how_to_go_on(
    finished: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A real SIGINT in the middle of an update loses nothing: the checkpoint is that update's end."""
    run_dir, step, calls = tmp_path / "run", RoutingVecEnv.step_tensor, []

    def interrupted(self: RoutingVecEnv, actions: torch.Tensor) -> Step:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, actions)

    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(RoutingVecEnv, "step_tensor", interrupted)
        with pytest.raises(SystemExit) as caught:
            main(_words(corpus, run_dir, evaluation__routers="top-k", checkpoint_every=1000))
    assert caught.value.code == 130
    assert f"go on with: python train_rl.py --resume {run_dir}" in caplog.text
    assert len(calls) == 4  # one update of four sites
    main(["--resume", str(run_dir)])
    assert _same_weights(run_dir, finished)


@pytest.mark.parametrize("stop", STOPS)
def test_run_that_crashed_ends_like_one_that_did_not(
    finished: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    """Wherever it happens, `--resume` goes on from the last checkpoint: the same router to the bit."""
    run_dir = tmp_path / "run"
    words = _words(corpus, run_dir, evaluation__routers="top-k")
    assert _stopped_and_resumed(words, run_dir, monkeypatch, stop, OSError("lost")) == "error: lost"
    assert _same_weights(run_dir, finished)


@pytest.mark.parametrize("stop", STOPS)
def test_interrupted_run_ends_like_one_that_was_not(
    finished: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    """Ctrl-C anywhere, in the middle of an update too, then `--resume`: the same router to the bit."""
    run_dir = tmp_path / "run"
    words = _words(corpus, run_dir, evaluation__routers="top-k")
    assert _stopped_and_resumed(words, run_dir, monkeypatch, stop, KeyboardInterrupt()) == 130
    assert _same_weights(run_dir, finished)


def test_interrupt_says_how_to_go_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last line is the command to type."""
    _stop_between_updates(monkeypatch, KeyboardInterrupt())
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        main(_words(corpus, tmp_path / "run"))
    assert f"python train_rl.py --resume {tmp_path / 'run'}" in caplog.messages[-1]


def test_finished_run_resumed_learns_nothing_more(finished: Path, tmp_path: Path) -> None:
    """It is evaluated again, and its router stays."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    main(["--resume", str(copy)])
    assert _same_weights(copy, finished)


# How it says no


def _empty(folder: Path) -> Path:
    path = folder / "empty.txt"
    path.write_text("")
    return path


def _binary(folder: Path) -> Path:
    path = folder / "binary.txt"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def _short(folder: Path) -> Path:
    path = folder / "short.txt"
    path.write_text("too short to learn from")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "corpus must contain text, got none"),
        (_binary, "corpus file must be UTF-8 text, got binary data in"),
        (_short, "corpus must give every part at least 2 * seq_len=32 bytes"),
        (lambda folder: folder / "missing.txt", "corpus path must be a readable file or folder"),
    ],
    ids=["empty", "binary", "too short", "missing"],
)
def test_impossible_corpus_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], message: str
) -> None:
    """One line, before anything is trained, and no run folder is left."""
    assert message in _fails(_words(make(tmp_path), tmp_path / "runs" / "run"), capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone__top_k": 99}, "top_k must lie in [1, num_experts=4], got 99"),
        ({"backbone__num_heads": 5}, "hidden_size must be a multiple of 2 * num_heads=10, got 32"),
        ({"env__price_low": "nan"}, "price_low must be positive and finite, got nan"),
        ({"env__price_high": "-1"}, "price_high must be positive and finite, got -1"),
        ({"ppo__num_sequences": 0}, "num_sequences must be at least 1, got 0"),
        ({"ppo__learning_rate": "nan"}, "learning_rate must be positive, got nan"),
        ({"total_timesteps": 0}, "total_timesteps must be at least 1, got 0"),
        ({"pretrain__steps": -1}, "steps must be at least 1, got -1"),
        ({"random_routing": 2.0}, "random_routing must lie in [0, 1], got 2.0"),
        ({"device": "abacus"}, "device must be usable here, got abacus"),
        ({"device": "cuda:99"}, "device must be usable here, got cuda:99"),
        ({"no_such_flag": 1}, "no-such-flag"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    """The rule and the value, and no run folder is left."""
    run_dir = tmp_path / "runs" / "run"
    assert message in _fails(_words(corpus, run_dir, **changes), capsys)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env__rollouts_per_sequence": 1}, "rollouts_per_sequence must be at least 2 for leave_one_out, got 1"),
        ({"env__action": "count"}, "MultiBinary"),
        ({"evaluation__routers": "nonsense"}, "routers must name some of"),
        ({"evaluation__max_tokens": 8}, "max_tokens must be at least seq_len=16, got 8"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_only_the_parts_can_judge_are_refused_before_training(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Not an hour later, and no run folder is left either."""
    learned: list[int] = []
    monkeypatch.setattr(RoutingPPO, "learn", lambda *args, **kwargs: learned.append(1))
    assert message in _fails(_words(corpus, tmp_path / "run", **changes), capsys)
    assert not learned
    assert not (tmp_path / "run").exists()


def test_run_folder_that_exists_is_refused_and_kept(
    finished: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of an older run is overwritten."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert "run_dir must be a new folder (or use --resume)" in _fails(_words(corpus, finished), capsys)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_resuming_what_is_no_run_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing folder, an empty one, and one whose settings are not ours; none of them is touched."""
    message = "run folder must hold the config.json of a training run"
    assert message in _fails(["--resume", str(tmp_path / "missing")], capsys)
    assert not (tmp_path / "missing").exists()
    assert message in _fails(["--resume", str(tmp_path)], capsys)
    whole = json.loads((finished / "config.json").read_text())
    changes = (
        {"colour": "red"},
        {"seed": {}},
        {"backbone": 3},
        {"corpus": 3},
        {"env": whole["env"] | {"colour": "red"}},
    )
    texts = [json.dumps(whole | change) for change in changes]
    for text in ("", "{", "{}", "[]", "null", *texts):
        (tmp_path / "config.json").write_text(text)
        assert message in _fails(["--resume", str(tmp_path)], capsys), text
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def _resume_with_checkpoint_of(other: Path, words: list[str], run_dir: Path, capsys: Any) -> str:
    """The message; the router that lies in the folder stays as it was."""
    main(words)
    shutil.copy(other / "checkpoints" / "last.zip", run_dir / "checkpoints" / "last.zip")
    router = (run_dir / WEIGHTS).read_bytes()
    message = _fails(["--resume", str(run_dir)], capsys)
    assert (run_dir / WEIGHTS).read_bytes() == router
    return message


def test_checkpoint_of_a_backbone_of_other_sizes_is_refused(
    finished: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its observations have another length."""
    words = _words(corpus, tmp_path / "run", evaluation__routers="top-k", backbone__hidden_size=16)
    assert "spaces do not match" in _resume_with_checkpoint_of(finished, words, tmp_path / "run", capsys)


def test_checkpoint_of_a_backbone_with_other_weights_is_refused(
    finished: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything fits, and yet the router would be a stranger's."""
    words = _words(corpus, tmp_path / "run", evaluation__routers="top-k", pretrain__seed=1)
    message = _resume_with_checkpoint_of(finished, words, tmp_path / "run", capsys)
    assert "checkpoint must be made for this backbone" in message


def test_damaged_checkpoint_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut in half, or no zip at all: one line."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    checkpoint = copy / "checkpoints" / "last.zip"
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no zip"):
        checkpoint.write_bytes(damaged)
        assert "last.zip" in _fails(["--resume", str(copy)], capsys)


def _full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_the_start_leaves_no_run_folder(
    finished: Path, corpus: Path, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Not even the settings could be written."""
    _break(monkeypatch, call)
    assert "No space left on device" in _fails(_words(corpus, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def _break(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    if call == "fsync":
        monkeypatch.setattr("os.fsync", _full)
    else:
        monkeypatch.setattr(Path, "replace", _full)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_a_checkpoint_keeps_the_one_before(
    finished: Path, corpus: Path, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One line; the older checkpoint is whole, no scratch file is left, and given room the run ends the same."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        save, saves = train_rl.Run.save, []

        def second_fails(self: train_rl.Run) -> None:
            saves.append(1)
            if len(saves) == 2:
                _break(patch, call)
            save(self)

        patch.setattr(train_rl.Run, "save", second_fails)
        assert "No space left on device" in _fails(_words(corpus, run_dir, evaluation__routers="top-k"), capsys)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["last.zip"]
    main(["--resume", str(run_dir)])
    assert _same_weights(run_dir, finished)


def test_evaluation_of_what_is_no_run_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No folder, no router in it, or a router of another backbone."""
    refused = "run folder must hold the config.json of a training run"
    assert refused in _fails([str(tmp_path)], capsys, evaluate_rl.main)
    shutil.copy(finished / "config.json", tmp_path)
    assert "router folder must hold readable" in _fails([str(tmp_path)], capsys, evaluate_rl.main)
    shutil.copy(finished / WEIGHTS, tmp_path)
    description = json.loads((finished / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(description | {"backbone_sha256": "0" * 64}))
    assert "router must be made for this backbone" in _fails([str(tmp_path)], capsys, evaluate_rl.main)
    assert not (tmp_path / "evaluation.json").exists()


def test_router_of_a_run_refuses_another_backbone(finished: Path) -> None:
    """The files know what they were trained on."""
    other = MoETransformer(read_config(finished, TrainConfig).backbone)
    with pytest.raises(ValueError, match="router must be made for this backbone"):
        load_router(finished, other)


# The command line


def test_presets_parse() -> None:
    """No preset means `small`; flags change one setting of the preset they follow."""
    assert parse([]) == PRESETS["small"][1]
    assert parse(["base"]) == PRESETS["base"][1]
    changed = parse(["base", "--seed", "3", "--backbone.num-layers", "2"])
    assert changed.seed == 3
    assert changed.backbone.num_layers == 2
    assert changed.backbone.hidden_size == PRESETS["base"][1].backbone.hidden_size
    assert parse(["small"]).backbone == BackboneConfig()


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ([], None),
        (["--random-routing"], 0.5),
        (["--random-routing", "--seed", "1"], 0.5),
        (["--random-routing", "0.25"], 0.25),
        (["base", "--random-routing"], 0.5),
    ],
    ids=["none", "bare", "bare before a flag", "half", "bare after a preset"],
)
def test_random_routing_without_a_number_means_half_of_the_sequences(words: list[str], share: float | None) -> None:
    """A bare flag is a share of one half."""
    assert parse(words).random_routing == share


@pytest.mark.parametrize("words", [["--help"], ["base", "--help"]], ids=" ".join)
def test_help_lists_the_settings(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With their units, from the docstrings, and a clean exit."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--run-dir", "--resume", "--env.price-low", "--ppo.advantage", "--random-routing"):
        assert flag in printed


def test_help_of_the_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    """The other command has one too."""
    with pytest.raises(SystemExit) as caught:
        evaluate_rl.main(["--help"])
    assert caught.value.code == 0
    assert "--evaluation.num-prices" in capsys.readouterr().out

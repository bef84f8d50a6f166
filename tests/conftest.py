"""What every test starts from: one seed, its own cache, a tiny backbone or run, scratch memory filled with NaN."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer, SiteView
from moe_backbone.corpus import Corpus, load_corpus

if not torch.cuda.is_available():  # before any kernel is decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = 0
NUM_DOCUMENTS, WORDS_PER_DOCUMENT = 24, 60
RUN_DOCUMENTS, RUN_WORDS = 60, 40
SENTENCE = "the router sends every token to an expert and some tokens need no expert at all so they pass for free"


class RandomSubsets:
    """Router that switches each unit of each token on with chance one half."""

    def __init__(self, seed: int = SEED) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return torch.rand(view.scores.shape, generator=self.generator) < 0.5


class TinyRun:
    """Command line of a training run that takes a second, and what such a run is known by.

    Args:
        corpus: Text file to train on.
    """

    seed, num_updates, num_sites = 7, 6, 4
    transitions = 2 * 2 * 16 * num_sites
    """Of an update: two sequences, two rollouts each, 16 tokens, four sites."""
    sizes = {
        "device": "cpu",
        "seed": seed,
        "total-timesteps": num_updates * transitions,
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
        "warm-start.steps": 4,
        "warm-start.num-sequences": 2,
        "ppo.num-sequences": 2,
        "ppo.batch-size": transitions // 2,
        "env.rollouts-per-sequence": 2,
    }
    evaluation = {"evaluation.max-tokens": 256, "evaluation.num-prices": 3, "evaluation.greedy-tokens": 128}
    files = {
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
        "report.html",
    }

    def __init__(self, corpus: Path) -> None:
        self.corpus = corpus

    def words(self, run_dir: Path, **changes: Any) -> list[str]:
        """Command line of the run; changes are named with `__` for a dot."""
        flags: dict[str, Any] = {"corpus": self.corpus, "run-dir": run_dir, **self.sizes, **self.evaluation}
        flags |= {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def weights(self, run_dir: Path) -> dict[str, Tensor]:
        """Those of the router that a run has left, by name."""
        return load_file(run_dir / "router.safetensors")

    def same_weights(self, one: Path, other: Path) -> bool:
        """Whether two runs have left the same router, to the bit."""
        first, second = self.weights(one), self.weights(other)
        return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def pytest_configure() -> None:
    """One thread, as tiny sizes are; deterministic mode fills empty tensors with NaN, so a read of one shows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(scope="session")
def train_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Trains a family of transformers' models by its name on real text, each once; see `trained_families.py`."""
    logging = pytest.importorskip("transformers").utils.logging
    logging.disable_progress_bar()
    pytest.importorskip("greenlet")
    from trained_families import real_text, trained

    text = real_text()
    if text is None:
        pytest.skip("ROUTEGYM_DATA names no folder of real text")
    return functools.cache(lambda name: trained(name, tmp_path_factory.mktemp(name), text))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed of every global generator, set before each test."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of trained backbones, empty at the start of each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ROUTEGYM_CACHE", str(folder))
    return folder


@pytest.fixture
def tiny_config() -> BackboneConfig:
    """The smallest sizes at which every rule still shows."""
    return BackboneConfig(
        hidden_size=32, num_layers=2, num_heads=4, num_experts=4, top_k=2, intermediate_size=16, seq_len=16
    )


@pytest.fixture
def tiny_backbone(tiny_config: BackboneConfig, seed: int) -> MoETransformer:
    """Seeded random weights, frozen."""
    return MoETransformer(tiny_config).requires_grad_(False).eval()


@pytest.fixture
def tiny_tokens(tiny_config: BackboneConfig, seed: int) -> Tensor:
    """Three full sequences (3, seq_len), int64."""
    return torch.randint(tiny_config.vocab_size, (3, tiny_config.seq_len))


@pytest.fixture
def random_subsets() -> RandomSubsets:
    """Seeded router with a random subset for every token at every site."""
    return RandomSubsets()


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Folder of documents in English-like words, each different."""
    folder = tmp_path / "text"
    folder.mkdir()
    words = random.Random(SEED)
    for number in range(NUM_DOCUMENTS):
        text = " ".join(words.choices(SENTENCE.split(), k=WORDS_PER_DOCUMENT))
        (folder / f"{number:02d}.txt").write_text(f"{number}: {text}.\n", encoding="utf-8")
    return folder


@pytest.fixture
def tiny_corpus(text_folder: Path, tiny_config: BackboneConfig) -> Corpus:
    """The documents of `text_folder`, split for `tiny_config`."""
    return load_corpus([text_folder], seq_len=tiny_config.seq_len)


@pytest.fixture(scope="session")
def run_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a corpus and a cache, shared by all tests of runs so that their backbone is trained once."""
    folder = tmp_path_factory.mktemp("world")
    words = random.Random(TinyRun.seed)
    texts = [" ".join(words.choices(SENTENCE.split(), k=RUN_WORDS)) for _ in range(RUN_DOCUMENTS)]
    lines = [json.dumps({"text": f"{number}: {text}"}) for number, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def shared_cache(run_world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for all tests of runs, in place of an empty one for each test."""
    monkeypatch.setenv("ROUTEGYM_CACHE", str(run_world / "cache"))
    return run_world / "cache"


@pytest.fixture(scope="session")
def tiny_run(run_world: Path) -> TinyRun:
    """Runs on a small text file."""
    return TinyRun(run_world / "corpus.jsonl")


@pytest.fixture(scope="session")
def start_run(run_world: Path, tiny_run: TinyRun) -> Callable[..., Path]:
    """Makes the folder of a whole run of this name, started as from a shell with these settings and further words."""
    from train_rl import main  # needs Stable-Baselines3, without which the tests of the backbone run too

    def start(name: str, *more: str, **changes: Any) -> Path:
        run_dir = run_world / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ROUTEGYM_CACHE", str(run_world / "cache"))
            patch.setattr("sys.argv", ["train_rl.py", *tiny_run.words(run_dir, **changes), *more])
            main()
        return run_dir

    return start


@pytest.fixture(scope="session")
def finished(start_run: Callable[..., Path]) -> Path:
    """Folder of one whole run."""
    return start_run("finished")


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a user reads when a command refuses: the exit message, or what the parser printed."""

    def read(command: Callable[[list[str]], None], words: list[str]) -> str:
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

    return read

"""What every test starts from: one seed, its own cache, a tiny backbone, scratch memory filled with NaN."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_backbone import BackboneConfig, MoETransformer, SiteView
from moe_backbone.corpus import Corpus, load_corpus

if not torch.cuda.is_available():  # before any kernel is decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = 0
NUM_DOCUMENTS, WORDS_PER_DOCUMENT = 24, 60
SENTENCE = "the router sends every token to an expert and some tokens need no expert at all so they pass for free"


class RandomSubsets:
    """Router that switches each unit of each token on with chance one half."""

    def __init__(self, seed: int = SEED) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def select(self, view: SiteView) -> Tensor:
        """Choose the units that run: bool (num_tokens, num_units)."""
        return torch.rand(view.scores.shape, generator=self.generator) < 0.5


def pytest_configure() -> None:
    """One thread, as tiny sizes are; deterministic mode fills empty tensors with NaN, so a read of one shows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


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

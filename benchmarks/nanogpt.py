"""Beside nanoGPT on tiny Shakespeare: a mixture of experts of equal active parameters, trained on as much text.

python -m benchmarks.nanogpt input.txt                              # its run for a CPU; minutes on two cores
python -m benchmarks.nanogpt input.txt --setting gpu --device cuda  # its run for a GPU

nanoGPT trains on the first 90 % of the text and reports the rest: 1.88 nats a character after 2,000 steps on a CPU,
over 20 random batches, and 1.4697 on a GPU, the lowest of many looks (github.com/karpathy/nanoGPT, README). Here all
of the rest is scored, once, at the end, in windows side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from commands import ending
from moe_backbone import BackboneConfig
from moe_backbone.corpus import Corpus, Split, load_corpus
from moe_backbone.pretrain import PretrainConfig, load_or_train, native_loss
from moe_backbone.vocabulary import BYTES
from training_config import PRESETS

TRAIN_SHARE = 0.9
LOOKED_AT = 16_384
"""Last characters of the training text, by which the weights to keep are chosen: nothing that is reported chooses."""
DENSE_INNER = 4
"""nanoGPT's inner width over its width."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A published run, and ours beside it."""

    published: float
    """nanoGPT's loss, nats a character."""
    backbone: BackboneConfig
    pretrain: PretrainConfig


CPU = Setting(
    published=1.88,
    backbone=BackboneConfig(vocab_size=128, num_heads=4, intermediate_size=84, seq_len=64),
    pretrain=PretrainConfig(steps=2000, sequences=12),
)
"""4 layers of width 128, 12 windows of 64 characters a step."""
BASE = PRESETS["base"][1]
GPU = Setting(published=1.4697, backbone=replace(BASE.backbone, vocab_size=128), pretrain=BASE.pretrain)
"""The preset `base`: 6 layers of width 384, 64 windows of 256 characters a step."""
SETTINGS = {"cpu": CPU, "gpu": GPU}


@dataclass(frozen=True, kw_only=True)
class NanoGPTConfig:
    """Which run, on what."""

    text: tyro.conf.Positional[Path]
    """`input.txt` of tiny Shakespeare."""
    setting: Literal["cpu", "gpu"] = "cpu"
    """Which of nanoGPT's runs."""
    seeds: tuple[int, ...] = (0,)
    """Of weights and batches."""
    device: str = "cpu"
    """`cpu` or `cuda`."""


def read_split(path: Path) -> Corpus:
    """The text cut where nanoGPT cuts it.

    Raises:
        ValueError: If it cannot be read as text.
    """
    checked = load_corpus([path])  # refuses what is no text
    text = path.read_bytes()
    cut = int(TRAIN_SHARE * len(text.decode()))
    parts = {"train": text[:cut], "validation": text[cut - LOOKED_AT : cut], "test": text[cut:]}
    splits = {}
    for name, part in parts.items():
        tokens = BYTES.encode(part)[:-1]
        splits[name] = Split(name=name, tokens=tokens, document_ids=tokens.long() * 0)
    return Corpus(name=path.name, sha256=checked.sha256 + "-nanogpt", **splits)


def active_parameters(config: BackboneConfig) -> tuple[int, int]:
    """Weights that a token meets in our layers, and in those of a dense model of the same width.

    Example: width 128, 4 layers, 4 of 16 experts of width 84 have 786,432, as a dense model of inner width 512 has.
    """
    attention = 4 * config.hidden_size**2
    experts = 3 * config.hidden_size * config.intermediate_size * config.top_k
    gate = config.hidden_size * config.num_experts
    dense = 2 * DENSE_INNER * config.hidden_size**2
    return config.num_layers * (attention + experts + gate), config.num_layers * (attention + dense)


def loss_of(corpus: Corpus, setting: Setting, seed: int, device: str) -> float:
    """Train once, from where it was stopped, and score everything that nanoGPT held out; nats a character."""
    backbone = load_or_train(corpus, setting.backbone, replace(setting.pretrain, seed=seed), device=device)
    return native_loss(backbone, corpus.test, max_tokens=len(corpus.test.tokens), device=device)


def compare(config: NanoGPTConfig) -> Table:
    """Train with every seed, and lay the losses beside nanoGPT's."""
    setting, corpus = SETTINGS[config.setting], read_split(config.text)
    ours, dense = active_parameters(setting.backbone)
    shown = Table("model", "active parameters in layers", "loss on the last 10 %, nats a character")
    shown.add_row("nanoGPT, dense, as published", f"{dense:,}", f"{setting.published:g}")
    for seed in config.seeds:
        name = f"{setting.backbone.top_k} of {setting.backbone.num_experts} experts, seed {seed}"
        shown.add_row(name, f"{ours:,}", f"{loss_of(corpus, setting, seed, config.device):.4f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(NanoGPTConfig, description=__doc__, args=arguments)
    with ending():
        Console().print(compare(config))


if __name__ == "__main__":
    main()

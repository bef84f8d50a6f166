"""Continual training on a domain, with and without replay of what the backbone knows, by every method; one table.

python -m benchmarks.mixing --domains books=PATH peps=PATH      # three hours on one core

The general text is what the default backbone was trained on, the source of the Python standard library. Losses are of
test documents; early stopping and the weights that are kept go by validation documents. Finished rows are kept in the
output folder, and the same command goes on after them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from commands import ending
from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.checkpoints import discard_checkpoint
from moe_backbone.checks import require
from moe_backbone.continual import Continual, Outcome, continual_key, tune
from moe_backbone.files import write_text_atomic
from moe_backbone.mixture import Mixture, load_mixture
from moe_backbone.pretrain import PretrainConfig, load_or_train
from moe_backbone.tuning import Method, TuningConfig

logger = logging.getLogger(__name__)

GENERAL = "general"
LARGEST_RISE, LEAST_FALL = 0.02, 0.9
"""What replay must hold: the general loss at most 2 % higher, and 90 % of the fall of the domain loss."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """What is trained, and on what it is scored."""

    domains: tuple[str, ...]
    """NAME=PATH of each domain."""
    output: Path = Path("runs/mixing")
    """Folder of finished rows and of the table, `mixing.md`."""
    general: str = ""
    """Path of what the backbone was trained on; nothing for the source of the Python standard library."""
    distilled: tuple[tuple[float, float], ...] = ((0.4, 0.4),)
    """Shares of general text, at the first step and at the last, that is distilled from the start; the first pair, or
    else the first of `replays`, with every seed, and for the methods."""
    replays: tuple[tuple[float, float], ...] = ((0.5, 0.5),)
    """Shares of general text that is learned like any other."""
    beside: bool = True
    """Whether replay comes beside as many samples of the domain as without it, in a larger step; else in place of
    some."""
    methods: tuple[Method, ...] = ("lora", "top_layers", "ia3", "norms")
    """Beside all weights."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the text drawn; the first alone for all but the domain alone and the first replay."""
    max_tokens: int = 32_768
    """Test tokens of each text."""
    tuning: TuningConfig = TuningConfig(steps=600, distill=2.0)
    """Its `distill` is for the distilled rows."""
    backbone: BackboneConfig = BackboneConfig()
    pretrain: PretrainConfig = PretrainConfig()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row for each domain."""

    method: Method = "full"
    replay: tuple[float, float] = (0.0, 0.0)
    """Share of the samples that are general text, at the first step and at the last."""
    distilled: bool = False
    """Whether that stays close to the start, or is learned like any other text."""
    beside: bool = False
    """Whether it comes beside as many samples of the domain as without it."""
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        first, last = self.replay
        moving, how = f"-{last:g}" if last != first else "", "-distilled" if self.distilled else ""
        place = "-beside" if self.beside else ""
        return f"{self.method}-replay{first:g}{moving}{how}{place}-seed{self.seed}"

    @property
    def share(self) -> str:
        """Of general text, as the table shows it."""
        first, last = self.replay
        how = (" distilled" if self.distilled else "") + (", beside" if self.beside else "")
        return f"{first:.0%}" + (f" to {last:.0%}" if last != first else "") + how

    def sequences(self, alone: int) -> int:
        """Of a step, if the domain alone has `alone`."""
        return round(alone / (1 - sum(self.replay) / 2)) if self.beside else alone


def variants(config: MixingConfig) -> Iterator[Variant]:
    """All rows, what the claim hangs on first, and its other seeds last."""
    first = config.seeds[0]
    common: dict[str, Any] = {"beside": config.beside, "seed": first}
    tried = [Variant(replay=share, distilled=True, **common) for share in config.distilled]
    tried += [Variant(replay=share, **common) for share in config.replays]
    require(bool(tried), "replays or distilled must give a share, got none")
    for row in tried:
        require(sum(row.replay) < 2, f"replays and distilled must leave a share for the domain, got {row.replay}")
    yield from (Variant(seed=first), *tried)
    yield from (replace(tried[0], method=method) for method in config.methods)
    for seed in config.seeds[1:]:
        yield from (Variant(seed=seed), replace(tried[0], seed=seed))


def train_row(config: MixingConfig, start: MoETransformer, mixture: Mixture, folder: Path, variant: Variant) -> Outcome:
    """The outcome of one variant on one domain: from its file, or trained, and kept there."""
    first, last = variant.replay
    mixture = replace(mixture, first=(first, 1 - first), last=(last, 1 - last))
    distill = config.tuning.distill if variant.distilled else 0.0
    sequences = variant.sequences(config.tuning.sequences)
    tuning = replace(config.tuning, method=variant.method, distill=distill, sequences=sequences, seed=variant.seed)
    key, path = continual_key(mixture, start.sha256(), tuning), folder / f"{variant.name}.json"
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["key"] == [key, config.max_tokens]:
        return Outcome(**kept["outcome"])
    logger.info("%s: %s", mixture.describe(), variant.name)
    partial = folder / f"{key}.partial"
    training = Continual(mixture, start, tuning, "cpu", partial, max_tokens=config.max_tokens)
    _, outcome = tune(training)
    write_text_atomic(path, json.dumps({"key": [key, config.max_tokens], "outcome": asdict(outcome)}, indent=1) + "\n")
    discard_checkpoint(partial)
    return outcome


def table(domain: str, rows: dict[Variant, Outcome]) -> str:
    """Rows of one domain as Markdown, as far as they are there."""
    first = next(iter(rows.values()))
    lines = [
        f"| {domain} | replay | seed | trained | general loss | change | {domain} loss | fall / domain only | holds |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| before | | | | {first.before[GENERAL]:.4f} | | {first.before[domain]:.4f} | | |",
    ]
    alone = {variant.seed: outcome for variant, outcome in rows.items() if variant == Variant(seed=variant.seed)}
    order = ("full", "lora", "top_layers", "ia3", "norms", "bitfit")
    for variant in sorted(rows, key=lambda row: (order.index(row.method), row.distilled, row.replay, row.seed)):
        outcome = rows[variant]
        change = outcome.after[GENERAL] / outcome.before[GENERAL] - 1
        falls = [(one.before[domain] - one.after[domain]) for one in (outcome, alone[variant.seed])]
        share = falls[0] / falls[1]
        holds = "yes" if change <= LARGEST_RISE and share >= LEAST_FALL else "no"
        trained = f"{outcome.trained_parameters:,} ({outcome.trained_parameters / outcome.parameters:.2%})"
        lines.append(
            f"| {variant.method} | {variant.share} | {variant.seed} | {trained} | {outcome.after[GENERAL]:.4f} | "
            f"{change:+.1%} | {outcome.after[domain]:.4f} | {share:.1%} | {holds if any(variant.replay) else ''} |"
        )
    return "\n".join(lines) + "\n"


def measure(config: MixingConfig) -> str:
    """Train every row, write the table after each, and return it."""
    mixtures: dict[str, Mixture] = {}
    for word in config.domains:
        mixture = load_mixture([f"{GENERAL}={config.general}:1", f"{word}:1"], seq_len=config.backbone.seq_len)
        mixtures[mixture.names[1]] = mixture
    require(len(mixtures) == len(config.domains) > 0, f"domains must have different names, got {config.domains}")
    known = next(iter(mixtures.values())).corpora[0]
    start = load_or_train(known, config.backbone, config.pretrain)
    rows: dict[str, dict[Variant, Outcome]] = {domain: {} for domain in mixtures}
    text = ""
    for variant in variants(config):
        for domain, mixture in mixtures.items():
            rows[domain][variant] = train_row(config, start, mixture, config.output / domain, variant)
            text = "\n".join(table(name, found) for name, found in rows.items() if found)
            write_text_atomic(config.output / "mixing.md", text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(MixingConfig, description=__doc__, args=arguments)
    with ending("the same command goes on"):
        text = measure(config)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

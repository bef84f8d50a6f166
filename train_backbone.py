"""Train a backbone on text, or train one on: on a mixture of what it knows and of a new domain.

python train_backbone.py --output base    # from scratch, on Python's own library

python train_backbone.py --start base --mix general=:0.7 domain=books:0.3 --method lora --output tuned

python train_rl.py --backbone-dir tuned --corpus books    # learn a router for it

A stopped training goes on when the same command is given again.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from commands import ending
from moe_backbone import BackboneConfig, ranks
from moe_backbone.checkpoints import discard_checkpoint
from moe_backbone.checks import require, require_at_least
from moe_backbone.continual import Continual, Outcome, continual_key, tune
from moe_backbone.corpus import load_corpus
from moe_backbone.files import write_text_atomic
from moe_backbone.mixture import Mixture, load_mixture
from moe_backbone.pretrain import PretrainConfig, load_or_train, native_loss
from moe_backbone.saved import DESCRIPTION, load_saved, read_about, save_backbone
from moe_backbone.tuning import TuningConfig

logger = logging.getLogger("train_backbone")

TRAINING = "training.json"
"""How a checkpoint was trained on, in its folder."""


@dataclass(frozen=True, kw_only=True)
class TrainBackboneConfig:
    """Train a backbone on text, or train one on, on a mixture of texts.

    Raises:
        ValueError: If settings do not go together; the message gives name, rule and actual value.
    """

    output: Path
    """Folder for the trained backbone."""
    corpus: tuple[Path, ...] = ()
    """Text to train on from scratch: files and folders, `.jsonl` or `.gz`; none for the source of the Python standard
    library. Not with `mix`."""
    mix: tuple[str, ...] = ()
    """Texts to train on further, what the backbone knows first: NAME=PATH:RATIO, or NAME=PATH:START..END for a ratio
    that moves linearly, or NAME=PATH to go by size. PATH may be several with commas between, or nothing for the source
    of the Python standard library. Every sample of a batch draws its text at random by these ratios; one of ratio 0 is
    only measured."""
    temperature: float = 1.0
    """Without ratios: texts are drawn by size ** (1 / temperature)."""
    start: Path | None = None
    """Folder of the backbone that is trained on, as this command leaves it; None for one trained from scratch on the
    first text of `mix`."""
    checkpoint: str | None = None
    """Train this on instead: folder or hub id of a causal language model of transformers. Needs the extra
    `finetune`."""
    tuning: Annotated[TuningConfig, tyro.conf.arg(name="")] = TuningConfig()
    max_tokens: int = 65_536
    """Test tokens of each text for the losses before and after."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where there is one."""
    seq_len: int = 128
    """Tokens of a window, for `checkpoint`."""
    dtype: str = "float32"
    """Of `checkpoint` while it is trained and in the folder: `auto` for its own, or `float32`, `bfloat16`."""
    backbone: BackboneConfig = BackboneConfig()
    pretrain: PretrainConfig = PretrainConfig()

    def __post_init__(self) -> None:
        require_at_least(self, 2, "seq_len")
        require_at_least(self, 1, "max_tokens")
        if self.mix:
            require(not self.corpus, f"corpus must not be given beside mix, got {' '.join(map(str, self.corpus))}")
            both = self.start is not None and self.checkpoint is not None
            require(not both, f"checkpoint must not be given beside start, got {self.checkpoint}")
        else:
            given = self.checkpoint if self.start is None else self.start
            require(given is None, f"mix must say what {given} is trained on, got none")


def pretrain(config: TrainBackboneConfig, device: str) -> None:
    """Train from scratch, or take what was trained before from the cache, and save it."""
    corpus = load_corpus(config.corpus, seq_len=config.backbone.seq_len)
    backbone = load_or_train(corpus, config.backbone, config.pretrain, device=device)
    loss = native_loss(backbone, corpus.test, max_tokens=config.max_tokens, device=device)
    about = {"corpus": corpus.name, "corpus_sha256": corpus.sha256, "pretrain": asdict(config.pretrain)}
    save_backbone(backbone, config.output, about | {"test_loss": loss})
    logger.info("%d parameters, %.4f nats a byte on test documents of %s", backbone.num_parameters, loss, corpus.name)


def continue_backbone(config: TrainBackboneConfig, device: str) -> Outcome:
    """Train a backbone of our own on, and save it."""
    start = None if config.start is None else load_saved(config.start, device)
    seq_len = config.backbone.seq_len if start is None else start.config.seq_len
    mixture = load_mixture(config.mix, temperature=config.temperature, seq_len=seq_len)
    if config.start is None:
        start = load_or_train(mixture.corpora[0], config.backbone, config.pretrain, device=device)
    elif read_about(config.start).get("corpus_sha256") not in (None, mixture.corpora[0].sha256):
        logger.warning(
            "%s was not trained on %s, so the forgetting below is of another text", *(config.start, mixture.names[0])
        )
    assert start is not None
    partial = config.output / f"{continual_key(mixture, start.sha256(), config.tuning)}.partial"
    training = Continual(mixture, start, config.tuning, device, partial, max_tokens=config.max_tokens)
    backbone, outcome = tune(training, reporter(training))
    save_backbone(backbone, config.output, about(config, mixture, outcome) | {"start_sha256": start.sha256()})
    discard_checkpoint(partial)
    show(mixture, outcome)
    return outcome


def continue_checkpoint(config: TrainBackboneConfig, device: str) -> Outcome:
    """Train a checkpoint of transformers on, and save it with its tokenizer as transformers does."""
    from moe_backbone.huggingface import TokenizerVocabulary, load_model, load_tokenizer
    from moe_backbone.huggingface.backbone import fingerprint
    from moe_backbone.huggingface.tuning import CheckpointContinual

    assert config.checkpoint is not None
    tokenizer = load_tokenizer(config.checkpoint)
    model = load_model(config.checkpoint, dtype=config.dtype, device=device)
    vocabulary = TokenizerVocabulary(tokenizer, model.config.get_text_config().vocab_size)
    mixture = load_mixture(config.mix, temperature=config.temperature, seq_len=config.seq_len, vocabulary=vocabulary)
    partial = config.output / f"{continual_key(mixture, fingerprint(model), config.tuning)}.partial"
    sizes = {"max_tokens": config.max_tokens, "seq_len": config.seq_len}
    training = CheckpointContinual(mixture, model, config.tuning, device, partial, **sizes)
    model, outcome = tune(training, reporter(training))
    if ranks.is_first():
        model.save_pretrained(config.output)
        tokenizer.save_pretrained(config.output)
    write_text_atomic(config.output / TRAINING, json.dumps(about(config, mixture, outcome), indent=1) + "\n")
    discard_checkpoint(partial)
    show(mixture, outcome)
    return outcome


def about(config: TrainBackboneConfig, mixture: Mixture, outcome: Outcome) -> dict[str, Any]:
    """How a model was trained on, JSON values."""
    texts = {
        name: {"corpus": corpus.name, "sha256": corpus.sha256, "shares": [first, last]}
        for name, corpus, first, last in zip(mixture.names, mixture.corpora, mixture.first, mixture.last, strict=True)
    }
    return {"mix": texts, "tuning": asdict(config.tuning), "outcome": asdict(outcome)}


def reporter(training: Continual) -> Callable[[int, float], None]:
    """Says the validation losses at every look."""

    def report(step: int, loss: float) -> None:
        each = ", ".join(f"{name} {value:.4f}" for name, value in training.losses.items())
        logger.info("step %d: validation loss %s; by the mixture %.4f", step, each, loss)

    return report


def show(mixture: Mixture, outcome: Outcome) -> None:
    """Print losses before and after, forgetting, what learned and what did not."""
    if not ranks.is_first():
        return
    table = Table("text", "share", "before", "after", "change", title="test loss, nats a token")
    for name, first, last in zip(mixture.names, mixture.first, mixture.last, strict=True):
        share = f"{first:.3g}" if first == last else f"{first:.3g} to {last:.3g}"
        before, after = outcome.before[name], outcome.after[name]
        table.add_row(name, share, f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.1%}")
    Console().print(table)
    known = mixture.names[0]
    forgotten = outcome.after[known] - outcome.before[known]
    logger.info("forgetting: the loss on %s rose by %+.4f nats a token", known, forgotten)
    trained, total = outcome.trained_parameters, outcome.parameters
    logger.info("trained: %s parameters, %.2f %% of %s", f"{trained:,}", 100 * trained / total, f"{total:,}")
    logger.info("kept: step %d of %d, the best on validation documents", outcome.best_step, outcome.steps)
    same = f"{outcome.frozen_parameters:,} parameters, sha256 {outcome.frozen_sha256[:16]} before and after"
    logger.info("frozen: %s", same if outcome.frozen_parameters else "none")


def run(config: TrainBackboneConfig) -> None:
    """Do what the settings ask for."""
    from train_rl import pick_device

    done = config.output / (TRAINING if config.checkpoint else DESCRIPTION)
    require(not done.exists(), f"output must be a folder without a trained model, got {config.output}")
    device = ranks.join(pick_device(config.device))
    if config.checkpoint is not None:
        continue_checkpoint(config, device)
    elif config.mix:
        continue_backbone(config, device)
    else:
        pretrain(config, device)
    logger.info("saved in %s", config.output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if arguments is None else list(arguments)
    with ending(f"go on with: {shlex.join(['python', 'train_backbone.py', *words])}"):
        run(tyro.cli(TrainBackboneConfig, description=__doc__, args=words))


if __name__ == "__main__":
    main()

"""Learn a router and prove it: backbone, environment, PPO, evaluation, run folder.

python train_rl.py                      # small preset, minutes on a laptop CPU
python train_rl.py base --device cuda   # larger backbone, one GPU
python train_rl.py --checkpoint PATH --corpus TEXT    # your own mixture-of-experts model
python train_rl.py --resume runs/NAME   # go on with an interrupted run
torchrun --nproc-per-node 4 train_rl.py --run-dir runs/NAME     # on several GPUs or processes
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from commands import ending
from moe_backbone import Backbone, MoETransformer, ranks
from moe_backbone.corpus import Corpus, load_corpus
from moe_backbone.files import locked
from moe_backbone.pretrain import load_weights
from policies.portable import WEIGHTS
from run_folder import describe_run, new_run_folder, read_config
from training_config import PRESETS, TrainConfig
from training_run import ADAPTED, load_backbone, load_given, load_parts, train_router

logger = logging.getLogger("train_rl")


def pick_device(name: str) -> str:
    """`auto` becomes `cuda` where there is one.

    Raises:
        ValueError: If the device cannot be used here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be usable here, got {name}: {str(error).splitlines()[0]}") from None
    return name


def load_run(folder: Path, device: str) -> tuple[TrainConfig, Corpus, Backbone]:
    """Settings, corpus and backbone of a finished run, the backbone as it was adapted to the router if it was.

    Raises:
        ValueError: If the folder holds no run.
    """
    config = read_config(folder, TrainConfig)
    corpus, backbone = load_parts(config, device)
    if config.adapt_backbone:
        if not (folder / ADAPTED).exists():
            raise ValueError(f"run must have adapted its backbone (go on with --resume), got no {ADAPTED} in {folder}")
        assert isinstance(backbone, MoETransformer)
        load_weights(backbone, folder / ADAPTED)
    return config, corpus, backbone


def _restarted(config: TrainConfig) -> Path | None:
    """The folder of the run that torchrun starts again after a rank has died; None at a first start."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    folder = config.run_dir
    return folder if again and folder is not None and (folder / "config.json").exists() else None


def run(config: TrainConfig) -> Path:
    """Train and evaluate; returns the run folder."""
    started, resumed = time.perf_counter(), config.resume or _restarted(config)
    if resumed is not None:
        config = read_config(resumed, TrainConfig)
    device = ranks.join(pick_device(config.device))
    parts: Any = load_given(config, device)  # what is wrong with it is told first
    corpus = parts[0] if parts else load_corpus(config.corpus, seq_len=config.backbone.seq_len)
    folder = ranks.broadcast(lambda: resumed or new_run_folder(config.run_dir, config.seed))
    logger.info("run: %s  (TensorBoard: tensorboard --logdir %s)", folder, folder.parent)
    try:
        with locked(folder, "run folder"):
            if resumed is None:
                describe_run(folder, config)
            backbone = parts[1] if parts else load_backbone(config, corpus, device)
            if (folder / WEIGHTS).exists():
                logger.info("run: trained to its end before, so it is only scored again")
            current = train_router(config, folder, corpus, backbone)
            trained = time.perf_counter()
            current.evaluate()
    except KeyboardInterrupt:
        logger.info("\nstopped; go on with: python train_rl.py --resume %s", shlex.quote(str(folder)))
        sys.exit(130)
    except (ValueError, OSError):
        if resumed is None and ranks.is_first() and not (folder / "checkpoints").exists():  # nothing to go on with
            shutil.rmtree(folder)
        raise
    logger.info(
        "training %.0f s, router of %s parameters, evaluation %.0f s; router and report.html are in %s",
        trained - started,
        f"{sum(weights.numel() for weights in current.router.parameters()):,}",
        time.perf_counter() - trained,
        folder,
    )
    return folder


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Settings from the command line; the small preset unless another is named first."""
    words = list(arguments)
    if not words or words[0] not in PRESETS:
        words.insert(0, "small")
    for flag, value in (("--random-routing", "0.5"), ("--adapt-backbone", "600")):
        if flag in words:
            place = words.index(flag) + 1
            if place == len(words) or words[place].startswith("-"):  # bare flag
                words.insert(place, value)
    return tyro.extras.overridable_config_cli(PRESETS, args=words, description=__doc__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if arguments is None else list(arguments)
    config = parse(words)
    logger.info("$ %s", shlex.join(["python", "train_rl.py", *words]))
    with ending():
        run(config)


if __name__ == "__main__":
    main()

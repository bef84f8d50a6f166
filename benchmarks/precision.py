"""Pretraining and PPO in float32, bf16 and fp16: what is learned, and how long a step takes.

python -m benchmarks.precision FOLDER                    # a tiny model; minutes on a CPU, most of them in 16 bits
python -m benchmarks.precision FOLDER --device cuda --hidden-size 384
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import tyro
from rich.table import Table

from benchmarks.measure import versions
from evaluation import report_console
from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.corpus import Corpus, load_corpus
from moe_backbone.files import write_text_atomic
from moe_backbone.precision import Precision
from moe_backbone.pretrain import PretrainConfig, Pretraining, native_loss
from moe_backbone.saved import load_saved, save_backbone
from training_config import PPOConfig, TrainConfig
from training_run import build_model


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Train the same small model and router at each precision."""

    folder: tyro.conf.Positional[Path]
    """Where rows and the table go; rows that are there are not made again."""
    device: str = "cpu"
    hidden_size: int = 32
    num_layers: int = 2
    steps: int = 300
    """Optimiser steps of pretraining."""
    updates: int = 30
    """Of PPO, on the model pretrained in float32."""
    seed: int = 0


def pretrained(config: PrecisionConfig, corpus: Corpus, precision: Precision) -> tuple[MoETransformer, dict[str, Any]]:
    """A model, its loss on test text (run in float32) and the time of a step."""
    sizes = BackboneConfig(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=4,
        num_experts=8,
        top_k=2,
        intermediate_size=config.hidden_size,
        seq_len=64,
    )
    settings = PretrainConfig(
        steps=config.steps, sequences=16, eval_every=config.steps, seed=config.seed, precision=precision
    )
    training = Pretraining(corpus, sizes, settings, config.device, config.folder / f"{precision}.partial")
    started, first = time.perf_counter(), training.step
    backbone = training.run().requires_grad_(False).eval()
    seconds = (time.perf_counter() - started) / max(1, config.steps - first)
    loss = native_loss(backbone, corpus.test, max_tokens=16_384, device=config.device)
    return backbone, {"test_loss": loss, "step_ms": 1e3 * seconds}


def routed(config: PrecisionConfig, corpus: Corpus, backbone: MoETransformer, precision: Precision) -> dict[str, Any]:
    """Mean return of the last third of PPO's updates, nats, and the time of one."""
    settings = TrainConfig(
        seed=config.seed,
        backbone=backbone.config,
        ppo=PPOConfig(num_sequences=4, batch_size=1024, learning_rate=3e-3, precision=precision),
        compensation=False,
    )
    model = build_model(settings, backbone, corpus)
    steps = model.n_envs * model.n_steps
    returns, started = [], time.perf_counter()
    for update in range(config.updates):
        model.learn(steps, reset_num_timesteps=update == 0)
        assert model.ep_info_buffer is not None
        returns.append(model.ep_info_buffer[-1]["r"])
    last = returns[-max(1, config.updates // 3) :]
    seconds = (time.perf_counter() - started) / config.updates
    return {"return": sum(last) / len(last), "update_ms": 1e3 * seconds}


def measure(config: PrecisionConfig, corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Rows by precision; float32 comes first, as PPO routes its model at each."""
    path = config.folder / "precision.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    about = {**asdict(config), "folder": None, "corpus": corpus.sha256}
    rows: dict[str, dict[str, Any]] = known.get("rows", {}) if known.get("about") == about else {}
    for precision in get_args(Precision):
        if precision not in rows:
            trained, row = pretrained(config, corpus, precision)
            if precision == "fp32":
                save_backbone(trained, config.folder / "model")
            rows[precision] = row | routed(
                config, corpus, load_saved(config.folder / "model", config.device), precision
            )
            write_text_atomic(path, json.dumps({"about": about, "versions": versions(), "rows": rows}, indent=1) + "\n")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config = tyro.cli(PrecisionConfig, description=__doc__, args=arguments)
    torch.manual_seed(config.seed)
    corpus = load_corpus(seq_len=64)
    table = Table("precision", "test loss, nats", "ms a step", "PPO return, nats", "ms an update")
    for precision, row in measure(config, corpus).items():
        cells = (f"{row['test_loss']:.4f}", f"{row['step_ms']:.0f}", f"{row['return']:.4f}", f"{row['update_ms']:.0f}")
        table.add_row(precision, *cells)
    report_console().print(table)


if __name__ == "__main__":
    main()

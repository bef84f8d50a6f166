"""Make a small mixture-of-experts checkpoint that is really trained, to try RouteGym's checkpoint commands on.

python -m benchmarks.small_checkpoint FOLDER                     # OLMoE-shaped, 21 M parameters
python -m benchmarks.small_checkpoint FOLDER --text notes.txt --minutes 2
"""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from moe_backbone import ranks
from moe_backbone.corpus import load_corpus
from moe_backbone.files import write_text_atomic
from moe_backbone.huggingface import TokenizerVocabulary
from moe_backbone.huggingface.loading import require_transformers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SmallCheckpointConfig:
    """Train a byte-pair tokenizer and an OLMoE-shaped model on text, and save both."""

    folder: tyro.conf.Positional[Path]
    """Where the checkpoint goes, made new."""
    text: tuple[Path, ...] = ()
    """Files and folders; none for the source of the Python standard library."""
    steps: int = 1500
    """Most optimiser steps."""
    minutes: float = 20.0
    """Longest training."""
    sequences: int = 16
    """Windows of a step."""
    seq_len: int = 128
    """Tokens of a window."""
    learning_rate: float = 2e-3
    """AdamW's at its peak."""
    vocab_size: int = 1024
    """Tokens of the tokenizer."""
    hidden_size: int = 192
    intermediate_size: int = 88
    num_layers: int = 6
    num_experts: int = 64
    top_k: int = 8
    seed: int = 0


def byte_pair_tokenizer(documents: list[str], vocab_size: int) -> Any:
    """A fast tokenizer trained on documents, with one special token that ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def olmoe(config: SmallCheckpointConfig) -> Any:
    """An untrained model of the configured sizes."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    sizes = OlmoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.hidden_size // 32,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        max_position_embeddings=1024,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return OlmoeForCausalLM(sizes)


def train(model: Any, split: Any, config: SmallCheckpointConfig) -> float:
    """Train on random windows until steps or minutes are over; mean loss of the last tenth, nats a token."""
    draws, started, losses = np.random.default_rng(config.seed), time.monotonic(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    with ranks.bar(total=config.steps, desc="checkpoint", unit="step") as bar:
        for step in range(config.steps):
            done = max(step / config.steps, (time.monotonic() - started) / (60 * config.minutes))
            if done >= 1:
                break
            rate = config.learning_rate * min(1.0, 25 * done + 0.02) * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.param_groups[0]["lr"] = rate
            tokens, _ = split.sample(config.sequences, config.seq_len, draws)
            loss = model(input_ids=tokens, labels=tokens, output_router_logits=True).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
    model.eval()
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(SmallCheckpointConfig, description=__doc__, args=arguments)
    try:
        require_transformers()
        config.folder.mkdir(parents=True)
        raw = load_corpus(config.text, seq_len=config.seq_len)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(config.seed)
    sample = bytes(raw.train.tokens[:4_000_000].tolist()).decode("utf-8", errors="ignore").split("\x00")
    tokenizer = byte_pair_tokenizer(sample, config.vocab_size)
    vocabulary = TokenizerVocabulary(tokenizer, config.vocab_size)
    corpus = load_corpus(config.text, seq_len=config.seq_len, vocabulary=vocabulary)
    model = olmoe(config)
    logger.info("%s: %d training tokens, %d parameters", corpus.name, len(corpus.train.tokens), model.num_parameters())
    loss = train(model, corpus.train, config)
    model.save_pretrained(config.folder)
    tokenizer.save_pretrained(config.folder)
    write_text_atomic(config.folder / "LOSS", f"{loss:.4f} nats a token at the end of training\n")
    logger.info("loss %.4f nats a token; checkpoint in %s", loss, config.folder)


if __name__ == "__main__":
    main()

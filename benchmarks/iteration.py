"""One iteration of the default training job against native forward passes over the same token rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measure import Measured, Row, agree, compare, interleave, milliseconds
from moe_backbone import MoETransformer
from moe_backbone.corpus import load_corpus
from training_config import PPOConfig, TrainConfig
from training_run import build_model

FORWARDS = 3
"""Native forward passes that an iteration may cost."""
CONFIG = TrainConfig(device="cpu", ppo=PPOConfig(learning_rate=1e-9))
"""The defaults, but for a router that stays as it starts: one that learns to skip would make later rounds cheaper."""


def rows() -> Iterator[Row]:
    """Rollouts and update of leave-one-out PPO together; the weights of the backbone do not matter for time."""
    torch.manual_seed(0)
    backbone = MoETransformer(CONFIG.backbone).requires_grad_(False).eval()
    model = build_model(CONFIG, backbone, load_corpus(seq_len=CONFIG.backbone.seq_len))
    env = model.get_env()
    assert env is not None
    decisions = env.num_envs * len(backbone.sites)
    model.learn(decisions)
    mdp = env.mdp  # type: ignore[attr-defined]
    tokens = mdp.batch.tokens
    forward = torch.no_grad()(partial(backbone, tokens))
    compute = sum(
        mdp.meter.flops(index, subset, torch.arange(tokens.shape[1]).repeat(len(tokens))).mean()
        for index, subset in enumerate(mdp.subsets)
    )

    def measure() -> Measured:
        native, iteration = interleave((forward, partial(model.learn, decisions, reset_num_timesteps=False)))
        detail = {"forwards": iteration / native, "compute": float(compute / mdp.meter.native_flops)}
        detail |= {"native_ms": milliseconds(native), "iteration_ms": milliseconds(iteration)}
        sizes = {"token_rollouts": tokens.numel(), "decisions": decisions, "copies": mdp.batch.copies}
        return FORWARDS * native / iteration, {**detail, "sizes": sizes, "epochs": CONFIG.ppo.n_epochs}

    equal = agree(mdp.batch.native_logits, forward())
    yield compare("iteration/default-job", bar=1.0, equal=equal, measure=measure)

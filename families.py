"""Families of routers that are trained, or otherwise take long: scored when `--routers` names them, or all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from evaluation import Evaluator, Point, PointSpec
from moe_backbone import MoETransformer
from moe_backbone.checks import require
from moe_backbone.compensation import Compensation
from policies.compensated import CompensatedRouter, fit_compensation
from policies.tied_files import DESCRIPTION, load_tied, save_tied
from run_folder import read_config
from smaller_models import FAMILY, SmallerModel, score_smaller_model, smaller_models

if TYPE_CHECKING:  # both know the evaluation, which knows this
    from evaluate_rl import Context
    from training_config import TrainConfig

logger = logging.getLogger("evaluate_rl")

COMPENSATED = "greedy+constants"
COMPENSATION_TOKENS = 400_000
"""Training tokens that the compensation of greedy search is fitted on."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Routers that belong together in the table."""

    name: str
    make: Callable[[Context], Sequence[PointSpec]]
    """Gives a spec for each setting and seed (`name`, `setting`, `router`, `seed`); keeps what it trains in the run
    folder of the context, so that the next call is short."""
    rival: bool = True
    """Whether it is a router, which can be the best other one; what is none is made only if it is named."""
    of_checkpoints: bool = True
    """Whether there is one for a checkpoint of transformers too."""


@dataclass(frozen=True, kw_only=True)
class SmallerSpec:
    """A smaller backbone under its own native routing, as a row of the table."""

    model: SmallerModel
    config: TrainConfig
    context: Context
    name: str = FAMILY

    @property
    def setting(self) -> dict[str, Any]:
        """What is smaller."""
        return dict(self.model.setting)

    def score_on(self, evaluator: Evaluator) -> Point:
        """On the windows of the main backbone; the smaller one is trained first if it is not in the cache."""
        device = next(self.context.backbone.parameters()).device
        return score_smaller_model(
            self.model, evaluator, self.context.corpus, self.config.pretraining, device=str(device)
        )


def run_config(context: Context) -> TrainConfig:
    """Settings of the run, with the evaluation of now."""
    from training_config import TrainConfig

    return replace(read_config(context.folder, TrainConfig), evaluation=context.config)


def trained_rivals(name: str, context: Context) -> list[PointSpec]:
    """A rival of `train_rivals.py` at each seed."""
    from train_rivals import train_rival

    config, corpus = run_config(context), context.corpus
    made: list[PointSpec] = []
    for seed in context.seeds:
        made += train_rival(name, config, context.backbone, corpus, seed, context.folder)
    return made


def compensated_greedy(context: Context) -> list[PointSpec]:
    """Greedy search's routers with constants in place of what they skip, as the learned router has them."""
    from evaluate_rl import greedy_points
    from policies.baselines import FixedPoint

    backbone, corpus = context.backbone, context.corpus
    points = greedy_points(backbone, corpus, *context.training_windows)[1:]
    device = next(backbone.parameters()).device
    kept, asked = context.folder / "rivals" / COMPENSATED, {"greedy_tokens": context.config.greedy_tokens}
    spec, weights = load_tied(kept, backbone, COMPENSATED) if (kept / DESCRIPTION).exists() else ({}, {})
    compensation = Compensation(backbone.sites, backbone.hidden_size)
    if spec == asked:
        compensation.load_state_dict(weights)
    else:
        tokens = corpus.train.windows(backbone.config.seq_len, COMPENSATION_TOKENS)[0].to(device)
        compensation = fit_compensation(backbone, [point.router for point in points], tokens)
        save_tied(kept, backbone, COMPENSATED, asked, compensation.state_dict())
    compensation = compensation.requires_grad_(False).to(device)
    return [
        FixedPoint(COMPENSATED, {"step": step}, CompensatedRouter(point.router, compensation))
        for step, point in enumerate(points, 1)
    ]


def smaller_native(context: Context) -> list[PointSpec]:
    """Smaller backbones, trained as long; a row each, and none can be the best other router: they are no routers."""
    config = run_config(context)
    rule = "routers must not name smaller-native for a backbone that the run did not train"
    require(config.backbone_dir is None, f"{rule}, got {config.backbone_dir}")
    specs = [SmallerSpec(model=model, config=config, context=context) for model in smaller_models(config.backbone)]
    return list(specs)  # type: ignore[arg-type]


def native_control(context: Context) -> Point | None:
    """Native routing of the backbone that was trained on as long without a router; None if none was trained on."""
    from training_run import tuned_natively

    config, held_out = run_config(context), context.held_out
    if not config.adapt_backbone:
        return None
    device = str(next(context.backbone.parameters()).device)
    backbone = tuned_natively(config, context.corpus, device)
    own = Evaluator(backbone, held_out.split, max_tokens=held_out.num_tokens, device=device).native
    return replace(own, router="native-fine-tuned", native_documents=held_out.native.documents)


FAMILIES: list[Family] = [
    *(
        Family(name=name, make=partial(trained_rivals, name), of_checkpoints=name != "l0-gating")
        for name in ("gating", "l0-gating", "ada-k", "a2c", "reinforce", "dqn")
    ),
    Family(name=COMPENSATED, make=compensated_greedy),
    Family(name=FAMILY, make=smaller_native, rival=False, of_checkpoints=False),
]
"""In the order of the table."""


def wanted_families(context: Context) -> list[Family]:
    """Families that the context asks for.

    Raises:
        ValueError: If one is named that there is none of for a checkpoint.
    """
    wants = context.config.wants
    wanted = [family for family in FAMILIES if wants(family.name, trained=True, rival=family.rival)]
    return [family for family in wanted if family.of_checkpoints or possible(family.name, context)]


def possible(name: str, context: Context) -> bool:
    """Whether what only our own transformer can do can be done; says so if it was not asked for by name.

    Raises:
        ValueError: If it was.
    """
    if isinstance(context.backbone, MoETransformer):
        return True
    routers = context.config.routers
    named = any(name.startswith(prefix) for prefix in routers)
    require(not named, f"routers must not name {name} for a checkpoint, got {' '.join(routers)}")
    logger.info("%s: left out, as there is none for a checkpoint", name)
    return False

"""One training run in its folder: gates, PPO, calibration, and adaptation of the backbone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Figure, Logger, configure
from stable_baselines3.common.utils import LinearSchedule

from envs import CorpusSource, RoutingMDP, RoutingVecEnv
from evaluate_rl import LearnedPoint, evaluate, evaluation_context, write_report
from evaluation import Evaluator, Scored, loss_at, tradeoff_figure, usage_figure
from moe_backbone import Backbone, MoETransformer, NativeRouter, ranks
from moe_backbone.checkpoints import read_checkpoint, write_checkpoint
from moe_backbone.checks import require
from moe_backbone.corpus import Corpus, load_corpus
from moe_backbone.files import write_atomic
from moe_backbone.huggingface import HuggingFaceBackbone, TokenizerVocabulary, load_model, load_tokenizer
from moe_backbone.pretrain import PretrainConfig, backbone_key, cache_folder, fine_tune, load_or_train
from moe_backbone.saved import load_saved, read_about
from moe_backbone.tasks import TaskCorpus, load_task
from policies.calibration import Calibration, calibrate
from policies.callbacks import GateSteps, PeriodicEvaluation, PeriodicSave, ProgressBar, RoutingMetrics, asked_to_stop
from policies.cost_limit import SPREAD, CostLimit
from policies.gating import GateTrainer, GatingConfig
from policies.linear_router import LinearRouter
from policies.portable import save_router
from policies.routing_ppo import RoutingPPO
from policies.sampled import SampledRouter
from train_rivals import router_spec
from training_config import TrainConfig

logger = logging.getLogger("train_rl")

Watch = Callable[["Run", dict[str, float]], object]
ADAPTED = "backbone.safetensors"
NATIVE_SHARE = 0.6
"""Share of the sequences on which an adapted backbone is trained under native routing."""
CALIBRATION_TOKENS, CALIBRATION_PRICES = 8192, 20


def load_backbone(config: TrainConfig, corpus: Corpus, device: str) -> MoETransformer:
    """The trained backbone of a run, under the run's head meaning."""
    backbone = load_or_train(corpus, config.backbone, config.pretraining, device=device)
    backbone.head_meaning = config.head_meaning
    return backbone


def load_parts(config: TrainConfig, device: str) -> tuple[Corpus, Backbone]:
    """The corpus and the backbone of a run: one that is given, or one trained on the corpus."""
    if (given := load_given(config, device)) is not None:
        return given
    corpus = load_corpus(config.corpus, seq_len=config.backbone.seq_len)
    return corpus, load_backbone(config, corpus, device)


def load_given(config: TrainConfig, device: str) -> tuple[Corpus, Backbone] | None:
    """The run's corpus and the backbone that it names: a checkpoint of transformers, or a folder; None without either.

    Raises:
        ValueError: If it cannot be loaded.
    """
    if config.checkpoint is not None:
        return load_checkpoint(config, device)
    if config.backbone_dir is None:
        return None
    backbone = load_saved(config.backbone_dir, device)
    backbone.head_meaning = config.head_meaning
    if config.task is not None:
        return load_own_task(config.task, config.backbone_dir, backbone.config.seq_len), backbone
    return load_corpus(config.corpus, seq_len=backbone.config.seq_len), backbone


def load_own_task(path: Path, backbone_dir: Path, seq_len: int) -> TaskCorpus:
    """The task that the backbone of a folder was trained on.

    Raises:
        ValueError: If it cannot be read, or is another one.
    """
    about = read_about(backbone_dir).get("task", {})
    task = load_task(path, seq_len=seq_len, lookahead=about.get("lookahead", 0))
    rule = f"task must be the one that train_task.py trained {backbone_dir} on ({about.get('name', 'none')})"
    require(task.sha256 == about.get("sha256"), f"{rule}, got {path}")
    return task


def load_checkpoint(config: TrainConfig, device: str) -> tuple[Corpus, HuggingFaceBackbone]:
    """The run's checkpoint, and the corpus in its tokens; says how much of its compute can be routed at all.

    Raises:
        ValueError: If it cannot be loaded, has no tokenizer, or nothing in it can be routed.
    """
    assert config.checkpoint is not None
    tokenizer = load_tokenizer(config.checkpoint)
    where: dict[str, Any] = {"device_map": config.device_map} if config.device_map else {"device": device}
    model = load_model(config.checkpoint, dtype=config.dtype, **where)
    name = Path(config.checkpoint).name if Path(config.checkpoint).exists() else config.checkpoint
    heads = True if config.route_heads else None
    backbone = HuggingFaceBackbone(model, seq_len=config.seq_len, heads=heads, name=name)
    logger.info("checkpoint %s: %s", name, backbone.describe())
    vocabulary = TokenizerVocabulary(tokenizer, backbone.config.vocab_size)
    return load_corpus(config.corpus, seq_len=config.seq_len, vocabulary=vocabulary), backbone


def build_model(config: TrainConfig, backbone: Backbone, corpus: Corpus) -> RoutingPPO:
    """Environment and PPO of a run."""
    ppo = config.ppo
    lanes = ppo.num_sequences * config.env.rollouts_per_sequence * backbone.config.seq_len
    source = CorpusSource(corpus.train, backbone.config.seq_len, order=config.order)
    env = RoutingVecEnv(lanes, backbone, source, config.env, seed=config.seed)
    rule = "ppo.advantage must be leave_one_out under more than one rank"
    require(ranks.world_size() == 1 or ppo.advantage == "leave_one_out", f"{rule}, got {ppo.advantage}")
    model = RoutingPPO(
        "RouterPolicy",
        env,
        advantage=ppo.advantage,  # type: ignore[arg-type]
        learning_rate=LinearSchedule(ppo.learning_rate, 0.03 * ppo.learning_rate, 1.0),
        n_epochs=ppo.n_epochs,
        batch_size=ppo.batch_size,
        clip_range=ppo.clip_range,
        ent_coef=ppo.ent_coef,
        max_grad_norm=ppo.max_grad_norm,
        target_kl=ppo.target_kl,
        precision=ppo.precision,
        policy_kwargs={"router_spec": router_spec(config, backbone).to_json(), "critic": ppo.advantage == "gae"},
        seed=config.seed,
        device=next(backbone.parameters()).device,
        # rows of kept keys are counted on the host, and a checkpoint's own code may do anything
        cuda_graph=config.head_meaning == "query" and config.checkpoint is None,
    )
    if not ranks.is_first():  # weights begin equal, draws do not
        env.seed(ranks.own_seed(config.seed))
        torch.manual_seed(ranks.own_seed(config.seed))
    return model


def build_gates(
    config: TrainConfig, gating: GatingConfig, router: LinearRouter, parts: tuple[Corpus, Backbone], **kept: Any
) -> GateTrainer:
    """Training of a router by back-propagation on the run's text and prices; `kept` goes to `GateTrainer`."""
    corpus, backbone = parts
    rules = replace(config.env, rollouts_per_sequence=1, action="subset")
    source = CorpusSource(corpus.train, backbone.config.seq_len)
    mdp = RoutingMDP(backbone, source, rules, num_sequences=gating.num_sequences)
    generator = np.random.default_rng(ranks.own_seed(config.seed))

    def restore(state: Any) -> None:
        generator.bit_generator.state = state

    quality: str = config.env.quality
    if quality == "accuracy":
        logger.info("gates: accuracy has no gradient, so they learn from log-likelihood")
        quality = "log_likelihood"
    generators = (lambda: generator.bit_generator.state, restore)
    return GateTrainer(
        router,
        backbone,
        lambda: mdp.draw(generator),
        gating,
        quality=quality,
        credit=config.env.credit,
        load_prices=config.env.load_prices,
        cache_price=config.env.cache_price,
        seed=config.seed,
        generators=generators,
        **kept,
    )


class Run:
    """One training run in its folder.

    Args:
        config: Settings.
        folder: Where it lies.
        corpus: Text.
        backbone: Frozen.
        first: The run before the backbone was adapted, whose router is trained on; None for that run itself.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, corpus: Corpus, backbone: Backbone, first: Run | None = None
    ) -> None:
        self.config, self.folder, self.corpus, self.backbone = config, folder, corpus, backbone
        self.watch: Watch | None = None
        self.model = build_model(config, backbone, corpus)
        self.total_timesteps, self.gating, self._stage = config.total_timesteps, config.warm_start, "last"
        if first is not None:
            self.router.load_state_dict(first.router.state_dict())
            self.total_timesteps, self._stage = config.total_timesteps // 2, "adapted"
            sharpness = self.gating.sharpness[1]  # it has learned to be sharp already
            self.gating = replace(self.gating, steps=self.gating.steps // 2, sharpness=(sharpness, sharpness))
        self.checkpoint = folder / "checkpoints" / f"{self._stage}.pt"
        self.gates = self._build_gates()
        if read_checkpoint(self.checkpoint, "checkpoint", self._restore, self.model.device):
            logger.info("going on at timestep %d of %d", self.model.num_timesteps, self.total_timesteps)
        self.model.set_logger(configure(str(folder), ["tensorboard"]) if ranks.is_first() else Logger(None, []))
        device = next(backbone.parameters()).device
        self.validation = Evaluator(backbone, corpus.validation, max_tokens=8192, device=device)
        self.context = evaluation_context(backbone, corpus, config.evaluation, folder=folder, seeds=[config.seed])

    @property
    def router(self) -> LinearRouter:
        """What is learned."""
        return self.model.policy.router  # type: ignore[return-value]

    def _restore(self, state: dict[str, Any]) -> None:
        made_for = str(state["backbone_sha256"])
        require(
            made_for == self.backbone.sha256(),
            f"it must be made for this backbone (sha256 {self.backbone.sha256()[:12]}), got one for {made_for[:12]}",
        )
        self.model.restore(state["model"])
        self.gates.restore(state["gates"])

    def save(self) -> None:
        """Write the checkpoint; the one before it stays."""
        learned = {"model": self.model.state(), "gates": self.gates.state()}
        write_checkpoint(self.checkpoint, {"backbone_sha256": self.backbone.sha256(), **learned})

    def train(self) -> None:
        """Learn until `total_timesteps`; the first Ctrl-C finishes the update under way and saves."""
        remaining = self.total_timesteps - self.model.num_timesteps
        if remaining > 0:
            saver = PeriodicSave(self.save, self.config.checkpoint_every)
            bar = ProgressBar(self.total_timesteps)
            with asked_to_stop(saver), closing(bar):
                fresh = self.model.num_timesteps == 0
                if fresh and not self.gates.run(stop=lambda: saver.stop_requested):
                    raise KeyboardInterrupt
                self.model.learn(remaining, callback=self._callbacks(saver, bar), reset_num_timesteps=fresh)
            self.save()

    def export(self) -> None:
        """Measure what the router spends at each price, and write it in both formats."""
        self.router.calibration = self._calibrate()
        write_atomic(self.folder / "router.zip", lambda path: self.model.save(path))
        save_router(self.router, self.folder, self.backbone)

    def _build_gates(self) -> GateTrainer:
        """Training by back-propagation, where it was when the model was saved."""

        def report(step: int, figures: dict[str, float]) -> None:
            for name, value in figures.items():
                self.model.logger.record(f"warm_start/{name}", value)
            self.model.logger.dump(step)

        update = self.model.n_envs * self.model.n_steps * ranks.world_size()
        updates = math.ceil(self.total_timesteps / update)
        later = self.gating.per_update * (updates - 1)
        kept = self.folder / "checkpoints" / f"{self._stage}-gates.pt"
        parts = (self.corpus, self.backbone)
        where: dict[str, Any] = {"checkpoint": kept, "later_steps": later, "report": report}
        return build_gates(self.config, self.gating, self.router, parts, **where)

    def _calibrate(self) -> Calibration:
        """What the router spends at each price, on validation documents."""
        tokens = self.corpus.validation.windows(self.backbone.config.seq_len, CALIBRATION_TOKENS)[0]
        low, high = self.config.env.price_low, self.config.env.price_high
        prices = np.geomspace(low, high, CALIBRATION_PRICES)
        if hasattr(self.model, "lagrangian_multiplier"):  # finer where the budget lies
            near = self.model.lagrangian_multiplier * np.geomspace(1 / SPREAD, SPREAD, CALIBRATION_PRICES // 2)
            prices = np.unique(np.concatenate((prices, near)))
        return calibrate(self.router, self.backbone, tokens.to(self.model.device), map(float, prices))

    def _cost_limit(self) -> CostLimit:
        """Holds the run's budget, beginning at the price that the router meets it at now."""
        assert self.config.cost_limit is not None
        now, limit = self._calibrate(), self.config.cost_limit
        return CostLimit(
            limit,
            lagrangian_multiplier_init=now.price(max(limit, min(now.computes))),
            overhead=self.router.at_price(1.0).overhead_flops / self.model.env.mdp.meter.native_flops,  # type: ignore[union-attr]
        )

    def _callbacks(self, saver: PeriodicSave, bar: ProgressBar) -> CallbackList:
        config = self.config
        shown: dict[str, Any] = {"seed": config.seed, "quality": config.env.quality, "advantage": config.ppo.advantage}
        shown |= {"learning_rate": config.ppo.learning_rate, "total_timesteps": config.total_timesteps}
        callbacks: list[BaseCallback] = [RoutingMetrics(shown), saver]
        if self.gating.per_update:
            callbacks.append(GateSteps(self.gates, self.gating.per_update))
        if config.cost_limit is not None:
            callbacks.append(self._cost_limit())
        if config.eval_times and ranks.is_first():
            callbacks.append(PeriodicEvaluation(self.look, config.eval_times))
        return CallbackList([*callbacks, bar])

    def look(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Score the router on validation documents at a few prices: scalars and figures for TensorBoard."""
        prices = np.geomspace(self.config.env.price_low, self.config.env.price_high, 6)
        specs = [LearnedPoint(learned=self.router, price=float(price), seed=self.config.seed) for price in prices]
        points = [
            self.validation.score(spec.name, spec.router, setting=spec.setting, price=spec.price) for spec in specs
        ]
        curve = [Scored.on_one_text(point) for point in points]
        scalars = {"eval/native_loss": self.validation.native.loss}
        for percent in (50, 60, 70):
            loss = loss_at(curve, percent / 100)
            if loss is not None:
                scalars[f"eval/loss_at_{percent}_compute"] = loss
        middle = min(points, key=lambda point: abs(point.compute - 0.6))
        names = [site.name for site in self.backbone.sites]
        if self.watch is not None:
            self.watch(self, scalars)
        figures = {
            "figures/tradeoff": tradeoff_figure({"learned": [curve]}, self.validation.native),
            "figures/unit_use": usage_figure(middle.usage, names),
        }
        return scalars, figures

    def evaluate(self) -> None:
        """Score the learned router and all fixed ones on the test documents."""
        evaluation = evaluate(self.context, {self.config.seed: self.router})
        if not ranks.is_first():
            return
        figure = write_report(evaluation, self.context)
        self.model.logger.record(
            "figures/all_routers", Figure(figure, close=False), exclude=("stdout", "log", "json", "csv")
        )
        self.model.logger.dump(self.model.num_timesteps)


def train_router(
    config: TrainConfig, folder: Path, corpus: Corpus, backbone: Backbone, watch: Watch | None = None
) -> Run:
    """Train the router of a run, its backbone under it and the router again if that is asked for, and write it.

    Training goes on from its checkpoints. The run that is returned has the backbone that the router is for. `watch` is
    called with the run and its scalars at every look during training.
    """
    current = Run(config, folder, corpus, backbone)
    current.watch = watch
    current.train()
    if config.adapt_backbone:
        current = adapt(config, folder, current)
        current.train()
    current.export()
    return current


def adapt(config: TrainConfig, folder: Path, first: Run) -> Run:
    """Train the backbone on under the learned router, and stand before training the router again.

    A part of the sequences stays native. The adapted backbone is kept in the run's folder.
    """
    logger.info("backbone: training on under the learned router, then kept at %s", folder / ADAPTED)
    rules = config.env
    first.router.requires_grad_(False)

    def sampled(generator: torch.Generator) -> SampledRouter:
        prices = (rules.price_low, rules.price_high)
        return SampledRouter(first.router, native_share=NATIVE_SHARE, prices=prices, generator=generator)

    settings = adaptation_settings(config)
    device = str(next(first.backbone.parameters()).device)
    assert isinstance(first.backbone, MoETransformer)
    backbone = fine_tune(folder / ADAPTED, first.corpus, first.backbone, settings, sampled, device)
    return Run(config, folder, first.corpus, backbone, first)


def adaptation_settings(config: TrainConfig) -> PretrainConfig:
    """How the backbone is trained on: twice the sequences of a step, a third of the learning rate."""
    return replace(
        config.pretraining,
        steps=config.adapt_backbone,
        sequences=2 * config.pretrain.sequences,
        learning_rate=config.pretrain.learning_rate / 3,
    )


def tuned_natively(config: TrainConfig, corpus: Corpus, device: str) -> MoETransformer:
    """The run's backbone, trained on as long as an adapted one under native routing: what that must be held against."""
    key = backbone_key(corpus, config.backbone, config.pretraining)
    path = cache_folder() / f"tuned-{key}-{config.adapt_backbone}.safetensors"
    logger.info("backbone: training on as long under native routing, for comparison; kept at %s", path)
    start, settings = load_backbone(config, corpus, device), adaptation_settings(config)
    with start.using(head_meaning="query"):  # nothing is dropped natively, so runs of both meanings share it
        backbone = fine_tune(path, corpus, start, settings, lambda generator: NativeRouter(), device)
    backbone.head_meaning = config.head_meaning
    return backbone

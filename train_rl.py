"""Learn a router and prove it: backbone, environment, PPO, evaluation, run folder.

python train_rl.py                      # small preset, minutes on a laptop CPU
python train_rl.py base --device cuda   # larger backbone, one GPU
python train_rl.py --resume runs/NAME   # go on with an interrupted run
"""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Figure, configure
from stable_baselines3.common.utils import LinearSchedule
from tqdm.contrib.logging import logging_redirect_tqdm

from envs import CorpusSource, EnvConfig, RoutingVecEnv
from evaluate_rl import EvaluationConfig, LearnedPoint, evaluate, evaluation_context, write_report
from evaluation import Evaluator, Scored, loss_at, tradeoff_figure, usage_figure
from moe_backbone import BackboneConfig, MoETransformer
from moe_backbone.checks import require_at_least
from moe_backbone.corpus import Corpus, load_corpus
from moe_backbone.files import write_atomic
from moe_backbone.pretrain import PretrainConfig, load_or_train
from policies.callbacks import PeriodicEvaluation, PeriodicSave, ProgressBar, RoutingMetrics
from policies.linear_router import RouterSpec
from policies.portable import save_router
from policies.routing_ppo import RoutingPPO
from run_folder import describe_run, new_run_folder, read_config

logger = logging.getLogger("train_rl")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """How the router learns; names as in Stable-Baselines3.

    Raises:
        ValueError: If a value is impossible; the message gives name, rule and actual value.
    """

    advantage: str = "leave_one_out"
    """`leave_one_out`: against other rollouts of the same tokens, no critic. `gae`: SB3's own, with a critic."""
    num_sequences: int = 8
    """Different sequences of an update; each is rolled out `env.rollouts_per_sequence` times."""
    learning_rate: float = 3e-3
    """Adam's learning rate at the start; falls linearly to 3 % of it."""
    n_epochs: int = 3
    """Passes over an update's rollouts."""
    batch_size: int = 4096
    """Transitions of a minibatch: (token, site) pairs."""
    clip_range: float = 0.2
    """Clip of the probability ratio."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Clip of the gradient's norm."""
    target_kl: float | None = None
    """Stop an update when the KL estimate passes 1.5 times this; None for never."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_sequences", "n_epochs", "batch_size")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.advantage not in ("leave_one_out", "gae"):
            raise ValueError(f"advantage must be leave_one_out or gae, got {self.advantage!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Learn a router for a mixture-of-experts backbone and compare it with every other at equal compute."""

    run_dir: Path | None = None
    """Folder of the run, made new; None for runs/DATE-TIME-seedN."""
    resume: Path | None = None
    """Folder of an interrupted run to go on with; its own settings are used, all others here are ignored."""
    total_timesteps: int = 26_000_000
    """(token, site) decisions to learn from; rounded up to whole updates."""
    seed: int = 0
    """Seed of routers, rollouts and the text drawn; the backbone has its own, `pretrain.seed`."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto` for CUDA where there is one."""
    corpus: tuple[Path, ...] = ()
    """Files and folders of text, `.jsonl` or `.gz`; none for the source of the Python standard library."""
    order: Literal["random", "passes"] = "random"
    """How rollouts read the training text: windows at random places, or pass after pass over all of it, where
    `env.native_cache_mb` keeps what native routing made of a window for the next pass."""
    random_routing: float | None = None
    """Share of sequences pretrained under random subsets: 0 for none, 0.5 if no value is given; None for
    `pretrain.random_routing`."""
    eval_times: int = 4
    """Short looks at the validation documents during training, for TensorBoard."""
    checkpoint_every: int = 50
    """Updates between two checkpoints."""
    backbone: BackboneConfig = BackboneConfig()
    pretrain: PretrainConfig = PretrainConfig()
    env: EnvConfig = EnvConfig(rollouts_per_sequence=4, price_low=0.01, price_high=2.5)
    ppo: PPOConfig = PPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        require_at_least(self, 1, "total_timesteps", "checkpoint_every")
        require_at_least(self, 0, "eval_times", "seed")
        if self.random_routing is not None:
            replace(self.pretrain, random_routing=self.random_routing)


PRESETS = {
    "small": ("2.7 M parameters; minutes on a laptop CPU.", TrainConfig()),
    "base": (
        "26 M parameters, for one GPU.",
        TrainConfig(
            total_timesteps=100_000_000,
            backbone=BackboneConfig(hidden_size=384, num_layers=6, num_heads=6, intermediate_size=448, seq_len=256),
            pretrain=PretrainConfig(steps=5000, sequences=64, learning_rate=1e-3),
            ppo=PPOConfig(num_sequences=16, batch_size=16_384),
        ),
    ),
}


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


def load_parts(config: TrainConfig, device: str) -> tuple[Corpus, MoETransformer]:
    """The corpus and the trained backbone of a run."""
    corpus = load_corpus(config.corpus, seq_len=config.backbone.seq_len)
    return corpus, load_backbone(config, corpus, device)


def load_backbone(config: TrainConfig, corpus: Corpus, device: str) -> MoETransformer:
    """The trained backbone of a run."""
    pretrain = config.pretrain
    if config.random_routing is not None:
        pretrain = replace(pretrain, random_routing=config.random_routing)
    return load_or_train(corpus, config.backbone, pretrain, device=device)


def build_model(config: TrainConfig, backbone: MoETransformer, corpus: Corpus) -> RoutingPPO:
    """Environment and PPO of a run."""
    ppo = config.ppo
    lanes = ppo.num_sequences * config.env.rollouts_per_sequence * backbone.config.seq_len
    source = CorpusSource(corpus.train, backbone.config.seq_len, order=config.order)
    env = RoutingVecEnv(lanes, backbone, source, config.env, seed=config.seed)
    spec = RouterSpec(
        hidden_size=backbone.hidden_size,
        sites=tuple(backbone.sites),
        price_low=config.env.price_low,
        price_high=config.env.price_high,
    )
    return RoutingPPO(
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
        policy_kwargs={"router_spec": spec.to_json(), "critic": ppo.advantage == "gae"},
        seed=config.seed,
        device=next(backbone.parameters()).device,
    )


class Run:
    """One training run in its folder."""

    def __init__(self, config: TrainConfig, folder: Path, corpus: Corpus, device: str) -> None:
        """Load or train the backbone, build the environment, and restore the checkpoint if there is one."""
        self.config, self.folder, self.corpus = config, folder, corpus
        self.backbone = load_backbone(config, corpus, device)
        self.model = build_model(config, self.backbone, self.corpus)
        self.checkpoint = folder / "checkpoints" / "last.zip"
        if self.checkpoint.exists():
            self._restore()
        self.model.set_logger(configure(str(folder), ["tensorboard"]))
        self.validation = Evaluator(self.backbone, self.corpus.validation, max_tokens=8192, device=device)
        self.context = evaluation_context(
            self.backbone, self.corpus, config.evaluation, folder=folder, seeds=[config.seed]
        )

    def _restore(self) -> None:
        env = self.model.env
        self.model = RoutingPPO.load(self.checkpoint, env=env, device=self.model.device)
        made_for = getattr(self.model, "backbone_sha256", "none")
        if made_for != self.backbone.sha256():
            raise ValueError(
                f"checkpoint must be made for this backbone (sha256 {self.backbone.sha256()[:12]}), "
                f"got one for {made_for[:12]} in {self.checkpoint}"
            )
        self.model.restore_generators()
        logger.info("going on at timestep %d of %d", self.model.num_timesteps, self.config.total_timesteps)

    def save(self) -> None:
        """Write the checkpoint, the old one staying until the new one is whole."""
        self.model.keep_generators()
        self.model.backbone_sha256 = self.backbone.sha256()  # type: ignore[attr-defined]
        write_atomic(self.checkpoint, lambda path: self.model.save(path))

    def train(self) -> None:
        """Learn until `total_timesteps`; the first Ctrl-C finishes the update under way and saves."""
        remaining = self.config.total_timesteps - self.model.num_timesteps
        if remaining > 0:
            saver = PeriodicSave(self.save, self.config.checkpoint_every)
            bar = ProgressBar(self.config.total_timesteps)
            with _asked_to_stop(saver), closing(bar):
                fresh = self.model.num_timesteps == 0
                self.model.learn(remaining, callback=self._callbacks(saver, bar), reset_num_timesteps=fresh)
            self.save()
        write_atomic(self.folder / "router.zip", lambda path: self.model.save(path))
        save_router(self.model.policy.router, self.folder, self.backbone)  # type: ignore[arg-type]

    def _callbacks(self, saver: PeriodicSave, bar: ProgressBar) -> CallbackList:
        config = self.config
        shown: dict[str, Any] = {"seed": config.seed, "quality": config.env.quality, "advantage": config.ppo.advantage}
        shown |= {"learning_rate": config.ppo.learning_rate, "total_timesteps": config.total_timesteps}
        callbacks: list[BaseCallback] = [RoutingMetrics(shown), saver]
        if config.eval_times:
            callbacks.append(PeriodicEvaluation(self.look, config.eval_times))
        return CallbackList([*callbacks, bar])

    def look(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Score the router on validation documents at a few prices: scalars and figures for TensorBoard."""
        router = self.model.policy.router
        prices = np.geomspace(self.config.env.price_low, self.config.env.price_high, 6)
        specs = [LearnedPoint(learned=router, price=float(price), seed=self.config.seed) for price in prices]  # type: ignore[arg-type]
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
        figures = {
            "figures/tradeoff": tradeoff_figure({"learned": [curve]}, self.validation.native),
            "figures/unit_use": usage_figure(middle.usage, names),
        }
        return scalars, figures

    def evaluate(self) -> None:
        """Score the learned router and all fixed ones on the test documents."""
        router = self.model.policy.router
        evaluation = evaluate(self.context, {self.config.seed: router})  # type: ignore[dict-item]
        figure = write_report(evaluation, self.backbone, self.corpus, self.folder)
        self.model.logger.record(
            "figures/all_routers", Figure(figure, close=False), exclude=("stdout", "log", "json", "csv")
        )
        self.model.logger.dump(self.model.num_timesteps)


@contextmanager
def _asked_to_stop(saver: PeriodicSave) -> Iterator[None]:
    """While open, the first SIGINT or SIGTERM asks `saver` to stop; the next one acts as it always does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        saver.stop_requested = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(config: TrainConfig) -> Path:
    """Train and evaluate; returns the run folder."""
    started, resumed = time.perf_counter(), config.resume
    if resumed is not None:
        config = read_config(resumed, TrainConfig)
    device = pick_device(config.device)
    corpus = load_corpus(config.corpus, seq_len=config.backbone.seq_len)
    folder = resumed or new_run_folder(config.run_dir, config.seed)
    logger.info("run: %s  (TensorBoard: tensorboard --logdir %s)", folder, folder.parent)
    try:
        if resumed is None:
            describe_run(folder, config)
        current = Run(config, folder, corpus, device)
        current.train()
        trained = time.perf_counter()
        current.evaluate()
    except KeyboardInterrupt:
        logger.info("\nstopped; go on with: python train_rl.py --resume %s", shlex.quote(str(folder)))
        sys.exit(130)
    except (ValueError, OSError):
        if resumed is None and not (folder / "checkpoints").exists():  # nothing to go on with
            shutil.rmtree(folder)
        raise
    logger.info(
        "training %.0f s, evaluation %.0f s; router, evaluation.json and tradeoff.png are in %s",
        trained - started,
        time.perf_counter() - trained,
        folder,
    )
    return folder


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Settings from the command line; the small preset unless another is named first."""
    words = list(arguments)
    if not words or words[0] not in PRESETS:
        words.insert(0, "small")
    if "--random-routing" in words:  # bare flag
        place = words.index("--random-routing") + 1
        if place == len(words) or words[place].startswith("-"):
            words.insert(place, "0.5")
    return tyro.extras.overridable_config_cli(PRESETS, args=words, description=__doc__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if arguments is None else list(arguments)
    config = parse(words)
    logger.info("$ %s", shlex.join(["python", "train_rl.py", *words]))
    try:
        with logging_redirect_tqdm():  # a line of the log must not cut a progress bar
            run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Settings of a training run, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from envs import EnvConfig
from evaluate_rl import EvaluationConfig
from moe_backbone import BackboneConfig
from moe_backbone.checks import require, require_at_least
from moe_backbone.precision import Precision, require_precision
from moe_backbone.pretrain import PretrainConfig
from moe_backbone.sites import HeadMeaning
from policies.gating import GatingConfig


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
    learning_rate: float = 3e-4
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
    precision: Precision = "fp32"
    """Of the forward passes of rollouts and of the policy in the update; weights, probabilities, rewards and optimiser
    are float32 under each, and so are warm start and evaluation. `fp16` is for `leave_one_out`."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_sequences", "n_epochs", "batch_size")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.advantage not in ("leave_one_out", "gae"):
            raise ValueError(f"advantage must be leave_one_out or gae, got {self.advantage!r}")
        require_precision(self.precision)
        unscaled = self.precision == "fp16" and self.advantage == "gae"
        require(not unscaled, f"precision must be fp32 or bf16 for advantage gae, got {self.precision}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Learn a router for a mixture-of-experts backbone and compare it with every other at equal compute."""

    run_dir: Path | None = None
    """Folder of the run, made new; None for runs/DATE-TIME-seedN."""
    resume: Path | None = None
    """Folder of an interrupted run to go on with; its own settings are used, all others here are ignored."""
    total_timesteps: int = 13_000_000
    """(token, site) decisions that PPO learns from, after the warm start; rounded up to whole updates."""
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
    checkpoint: str | None = None
    """Route this instead of a backbone of our own: folder or hub id of a mixture-of-experts model of transformers, or
    of a dense one, by its attention heads. Needs the extra `huggingface`; its weights are never changed."""
    backbone_dir: Path | None = None
    """Route the backbone of this folder, as `train_backbone.py` leaves it, instead of one trained on the corpus;
    `backbone` and `pretrain` are not used then."""
    task: Path | None = None
    """Train the router on this task instead of a corpus: file or folder as `train_task.py` takes it, which left
    `backbone_dir`. Scored is what is scored there: labels, not the next byte."""
    seq_len: int = 128
    """Tokens of a window, for `checkpoint`."""
    dtype: str = "auto"
    """Of `checkpoint`: `auto` for its own, or `float32`, `bfloat16`, `float16`."""
    device_map: str | None = None
    """How transformers spreads `checkpoint` over devices, such as `auto`; needs accelerate."""
    route_heads: bool = False
    """Whether attention heads of `checkpoint` are routed beside its experts; only attending is saved then."""
    backbone: BackboneConfig = BackboneConfig()
    pretrain: PretrainConfig = PretrainConfig()
    env: EnvConfig = EnvConfig(rollouts_per_sequence=4, price_low=0.01, price_high=2.5)
    cost_limit: float | None = None
    """Budget instead of prices: mean compute to train for, a fraction of native with the router's own cost; a Lagrange
    multiplier finds the price."""
    head_meaning: HeadMeaning = "query"
    """What a token skips in a head that it does not use. `query`: only to attend, as later tokens attend to its key and
    value. `query_key_value`: these too, so that later tokens cannot attend to it there and the cache holds less. The
    backbone is trained with all heads on, so it is the same under both."""
    adapt_backbone: int = 0
    """Steps of training the backbone on under the learned router, after which the router is trained again; 0 for
    none, 600 if no value is given."""
    compensation: bool = True
    """Whether the router brings constants that stand in for skipped units; trained in the warm start, then kept."""
    warm_start: GatingConfig = GatingConfig()
    ppo: PPOConfig = PPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        require_at_least(self, 1, "total_timesteps", "checkpoint_every")
        require_at_least(self, 0, "eval_times", "seed", "adapt_backbone")
        limit = self.cost_limit
        require(limit is None or 0 < limit <= 1, f"cost_limit must lie in (0, 1], got {limit}")
        known = get_args(HeadMeaning)
        require(
            self.head_meaning in known, f"head_meaning must be one of {', '.join(known)}, got {self.head_meaning!r}"
        )
        rule = "env.cache_price must be 0 unless head_meaning is query_key_value"
        priced = self.env.cache_price > 0 and self.head_meaning == "query"
        require(not priced, f"{rule}, got {self.env.cache_price}")
        require(
            self.task is None or self.backbone_dir is not None, f"task must come with backbone_dir, got {self.task}"
        )
        if self.backbone_dir is not None:
            require(self.checkpoint is None, f"checkpoint must not be given beside backbone_dir, got {self.checkpoint}")
            rule = "adapt_backbone must be 0 with backbone_dir"
            require(not self.adapt_backbone, f"{rule}, got {self.adapt_backbone}")
        if self.checkpoint is not None:
            require(not self.adapt_backbone, f"adapt_backbone must be 0 for a checkpoint, got {self.adapt_backbone}")
            require(
                self.head_meaning == "query", f"head_meaning must be query for a checkpoint, got {self.head_meaning}"
            )
        _ = self.pretraining  # refuses an impossible share

    @property
    def pretraining(self) -> PretrainConfig:
        """How the backbone is trained, `random_routing` in it."""
        share = self.pretrain.random_routing if self.random_routing is None else self.random_routing
        return replace(self.pretrain, random_routing=share)


PRESETS = {
    "small": ("2.7 M parameters; minutes on a laptop CPU.", TrainConfig()),
    "base": (
        "32 M parameters, of which a token meets as many as in a dense model of this size; for one GPU.",
        TrainConfig(
            total_timesteps=100_000_000,
            backbone=BackboneConfig(hidden_size=384, num_layers=6, num_heads=6, intermediate_size=254, seq_len=256),
            pretrain=PretrainConfig(steps=5000, sequences=64, learning_rate=1e-3),
            ppo=PPOConfig(num_sequences=16, batch_size=16_384),
        ),
    ),
}
